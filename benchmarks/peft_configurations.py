"""What becomes of every configuration in peft's own list of tests: merged as peft runs it, or refused with a reason.

    git clone https://github.com/huggingface/peft
    python benchmarks/peft_configurations.py ./peft

The list is that of ``tests/test_custom_models.py`` (small modules) and ``tests/test_decoder_models.py`` (language
models; built here from tiny configs, so that nothing is downloaded). peft makes and saves each adapter, every parameter
is moved as training would, and it is merged here. Merged means that the model with all merged tensors computes what the
unmerged one computes, to 1e-5. The table of docs/adapters.md goes to standard output, every configuration to standard
error with ``--all``; one that is neither merged nor refused makes the exit status 1.
"""

from __future__ import annotations

import copy
import importlib
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from qconv.errors import QconvError
from qconv.merge import WithoutSmallest, load_adapter, merge
from qconv.types import TensorSpec

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 8},
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
IDS = torch.tensor([[3, 17, 10, 5, 9, 1, 3, 8]])
TOLERANCE = 1e-5


class InMemory:
    """A `Checkpoint` over a model's tensors."""

    def __init__(self, model: nn.Module):
        config = getattr(model, "config", None)
        has_conv1d = any(type(module).__name__ == "Conv1D" for module in model.modules())
        self.location = type(model).__name__
        self.config: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}
        if has_conv1d:
            self.config["model_type"] = "gpt2"  # which is how a checkpoint says that its linears are Conv1D
        tied = (
            set(getattr(model, "_tied_weights_keys", None) or ()) if self.config.get("tie_word_embeddings") else set()
        )
        self.tensors = {name: x.clone() for name, x in model.state_dict().items() if name not in tied}

    def specs(self) -> Mapping[str, TensorSpec]:
        return {n: TensorSpec(name=n, shape=tuple(x.shape), dtype=x.dtype) for n, x in self.tensors.items()}

    def read(self, name: str, device: str = "cpu") -> Tensor:
        return self.tensors[name].clone().to(device)


def custom_cases(tests: Any) -> Iterator[tuple[str, nn.Module, Any, dict[str, Any], Mapping[str, Any]]]:
    inputs = tests.TestPeftCustomModel()
    inputs.torch_device = "cpu"
    for name, layer, config_class, options in tests.TEST_CASES:
        model = tests.MockTransformerWrapper.from_pretrained(layer).eval()
        yield name, model, config_class, options, inputs.prepare_inputs_for_testing()


def decoder_cases(tests: Any) -> Iterator[tuple[str, nn.Module, Any, dict[str, Any], Mapping[str, Any]]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    for family, sizes in FAMILIES.items():
        for config_class, options in tests.ALL_CONFIGS:
            torch.manual_seed(0)
            own = {k: v for k, v in SIZES.items() if not (family.startswith("gpt") and k != "vocab_size")}
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **own, **sizes, **TOKENS)).eval()
            yield family, model, config_class, options, {"input_ids": IDS}


def outcome(
    model: nn.Module, config_class: Any, options: Mapping[str, Any], inputs: Mapping[str, Any], init: Any
) -> str:
    """``merged``, ``refused: why``, ``peft: why not`` where peft does not make it, or what went wrong."""
    import peft

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    base, plain = InMemory(model), copy.deepcopy(model)
    try:
        adapted = peft.get_peft_model(model, config_class(**init(config_class, copy.deepcopy(dict(options))))).eval()
    except (TypeError, ValueError, NotImplementedError) as error:
        return f"peft: {error}"
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder, save_embedding_layers=False)
        try:
            adapter = load_adapter(Path(folder), base)
            dropped = {name: delta.dropped for name, delta in adapter.deltas.items() if delta.dropped}
            view = merge(WithoutSmallest(base, dropped) if dropped else base, [adapter])  # KaSA cuts its base
            found = {name: view.read(name) for name in view.specs()}
        except QconvError as error:
            return f"refused: {str(error).replace(folder, '')}"
    with torch.no_grad():
        expected = _output(adapted(**inputs))
        missing = plain.load_state_dict(found, strict=False)
        if missing.unexpected_keys and "lm_head.weight" in found:  # a head that was untied
            plain.config.tie_word_embeddings = False
        if "lm_head.weight" in found:
            plain.lm_head.weight = nn.Parameter(found["lm_head.weight"].float())
            plain.load_state_dict(found, strict=False)
        computed = _output(plain.eval()(**inputs))
    error = float((computed - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE:
        return f"WRONG: output differs by {error:.1e}"
    return "merged"


def _output(result: Any) -> Tensor:
    tensor: Tensor = result.logits if hasattr(result, "logits") else result
    return tensor


REASONS = (  # of a refusal: what its message says -> what the table says
    ("convolution", "convolutions"),
    ("on embeddings, LoRA", "embeddings"),
    ("expected tinylora_A", "embeddings"),  # which has no name that models give theirs
    ("nn.MultiheadAttention", "`nn.MultiheadAttention`"),
    ("save_indices was false", "saved without `save_indices=True`"),
    ("no bias in the base", "the base has no bias"),
    ("expected ia3_l", "Conv1D and linears in one model, which no checkpoint has"),
    ("holds no tensors", "peft adapts nothing"),
)


def reason_of(message: str) -> str:
    for words, reason in REASONS:
        if words in message:
            return reason
    key = re.search(r"adapter_(?:config.json|model.safetensors): (\w+) is set", message)
    if key:
        return f"`{key[1]}`"
    return "the kind" if "adapter_config.json: peft_type" in message else message


def table_of(results: Mapping[str, Counter[str]]) -> Iterator[str]:
    """Markdown, by ``peft_type``: how many are merged, and how many are refused for which reason."""
    yield "| `peft_type` | merged | refused | not made by peft |"
    yield "|---|---|---|---|"
    for kind, outcomes in sorted(results.items()):
        refused = Counter[str]()
        for outcome, count in outcomes.items():
            if outcome.startswith("refused: "):
                refused[reason_of(outcome)] += count
        not_made = sum(count for outcome, count in outcomes.items() if outcome.startswith("peft: "))
        reasons = ", ".join(f"{count} ({reason})" for reason, count in sorted(refused.items()))
        yield f"| `{kind}` | {outcomes['merged'] or ''} | {reasons} | {not_made or ''} |"


def main(checkout: str, shows_all: bool) -> int:
    sys.path.insert(0, checkout)
    sys.modules.setdefault("diffusers", MagicMock())  # imported there for tests that are not run here
    warnings.simplefilter("ignore")
    custom, decoder = (importlib.import_module(f"tests.test_{name}_models") for name in ("custom", "decoder"))
    init = importlib.import_module("tests.testing_utils").set_init_weights_false
    results: dict[str, Counter[str]] = {}
    for name, model, config_class, options, inputs in (*custom_cases(custom), *decoder_cases(decoder)):
        result = outcome(model, config_class, options, inputs, init)
        results.setdefault(_kind(config_class), Counter())[result] += 1
        if shows_all or result.startswith("WRONG"):
            print(name, config_class.__name__, options, result, sep="\t", file=sys.stderr)
    print(*table_of(results), sep="\n")
    return 1 if any(key.startswith("WRONG") for found in results.values() for key in found) else 0


def _kind(config_class: Any) -> str:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return next(kind.value for kind, known in PEFT_TYPE_TO_CONFIG_MAPPING.items() if known is config_class)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], "--all" in sys.argv))
