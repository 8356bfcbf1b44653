"""Builders shared by the merge tests: tiny models, peft adapters on disk, and plain models from a view."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qconv.errors import AdapterError
from qconv.merge import load_adapter
from qconv.types import Checkpoint, TensorSpec

TINY_LLAMA = Path(__file__).parent / "data" / "tiny-llama"
PREFIX = "base_model.model."
Q_PROJ = PREFIX + "model.layers.0.self_attn.q_proj."
Q_WEIGHT = "model.layers.0.self_attn.q_proj.weight"
N, K, R = 4, 6, 2
ADAPTER_CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": R, "lora_alpha": 4, "target_modules": ["q_proj"]}
IDS = torch.tensor([[3, 17, 10, 5, 9, 21, 22, 8], [1, 2, 31, 11, 30, 7, 7, 4]])


class TensorsInMemory:
    """A `Checkpoint` over a dict of tensors."""

    def __init__(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None):
        self.location = "memory"
        self.config = dict(config or {})
        self.tensors = dict(tensors)

    def specs(self) -> Mapping[str, TensorSpec]:
        return {
            name: TensorSpec(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype)
            for name, tensor in self.tensors.items()
        }

    def read(self, name: str, device: str = "cpu") -> Tensor:
        return self.tensors[name].clone().to(device)


def llama() -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()


def gpt2(vocab_size: int = 64) -> nn.Module:
    """Conv1D linears ``[in, out]``, with a square one (``attn.c_proj``), biases, and a tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(11)
    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=2,
        vocab_size=vocab_size,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    return _shaken(GPT2LMHeadModel(config))


def qwen2(tied: bool = False) -> nn.Module:
    """Biases on q, k and v."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(12)
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
    )
    return _shaken(Qwen2ForCausalLM(config))


def _shaken(model: nn.Module) -> nn.Module:
    """Initial weights are small and biases zero, so that mistakes would hardly show: makes all of them matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def trained(model: nn.Module, seed: int = 0, config_class: str = "LoraConfig", **config: Any) -> nn.Module:
    """A peft model on ``model``, every trainable parameter moved as training would."""
    import peft

    torch.manual_seed(seed)
    defaults = {"r": 4, "lora_alpha": 6} if config_class == "LoraConfig" else {}
    adapted = peft.get_peft_model(model, getattr(peft, config_class)(**{**defaults, **config}))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                scale = 0.1 if parameter.ndim >= 2 and min(parameter.shape) <= 16 else 0.02
                parameter.add_(torch.randn_like(parameter) * scale)
    return adapted.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def save_model(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def plain_model(view: Checkpoint, folder: Path) -> nn.Module:
    """An ordinary transformers model of the view's tensors and config, through its own loader."""
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True)
    tensors = {name: view.read(name).float().contiguous() for name in view.specs()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(view.config)))
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], info
    return model.eval()


def edit_adapter(folder: Path, out: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A copy of an adapter folder whose tensors have passed through ``edit``."""
    out.mkdir(parents=True)
    (out / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    state = edit(load_file(folder / "adapter_model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, out / "adapter_model.safetensors")
    return out


def toy_base(**more: Tensor) -> TensorsInMemory:
    """A few tensors of a model ``[N, K]``; only names and shapes matter."""
    torch.manual_seed(5)
    tensors = {
        "model.embed_tokens.weight": torch.randn(10, K),
        Q_WEIGHT: torch.randn(N, K),
        "model.layers.0.self_attn.q_proj.bias": torch.randn(N),
        "model.layers.0.self_attn.o_proj.weight": torch.randn(K, K),
        "model.norm.weight": torch.randn(K),
        "lm_head.weight": torch.randn(10, K),
    }
    return TensorsInMemory({**tensors, **more}, {"model_type": "llama", "tie_word_embeddings": False, "vocab_size": 10})


def factors() -> dict[str, Tensor]:
    torch.manual_seed(6)
    return {Q_PROJ + "lora_A.weight": torch.randn(R, K), Q_PROJ + "lora_B.weight": torch.randn(N, R)}


def write_adapter(folder: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**ADAPTER_CONFIG, **config}))
    save_file(factors() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def refused(
    folder: Path, *words: str, error: type[Exception] = AdapterError, on: TensorsInMemory | None = None
) -> None:
    with pytest.raises(error) as caught:
        load_adapter(folder, on or toy_base())
    message = str(caught.value)
    for word in (str(folder), *words):
        assert word in message, f"{word!r} is not in: {message}"


def change(edit: Callable[[dict[str, Tensor]], None]) -> dict[str, Tensor]:
    tensors = factors()
    edit(tensors)
    return tensors
