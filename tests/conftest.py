"""Models that tests share. All are built here from what the repository and the installed packages hold.

Folders are made once in a test run and shared: copy one before changing it.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a test that needs the network must fail
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve tests that run beside

import json
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

# Runs in the background ignore ctrl-C, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TINY_LLAMA = Path(__file__).parent / "data" / "tiny-llama"
ALL_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Two layers, every width divisible by 128, grouped queries where the family has them. Weights are
# drawn wide enough (0.1) for the next-token distribution to depend visibly on every linear.
_SIZES = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": 64},
    "qwen2": {},
    "qwen3": {},
    "gemma": {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {"tie_word_embeddings": True, "sliding_window": 64, "query_pre_attn_scalar": 32},
    "phi3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    # The first layer is dense.
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    # Dense here. The second layer has no positions; its queries are scaled by how long the sequence is.
    "llama4_text": {"moe_layers": [], "intermediate_size_mlp": 256, "no_rope_layers": [1, 0], "floor_scale": 8},
    "gpt2": {"n_embd": 128, "n_inner": 256, "n_layer": 2, "n_head": 4, "n_positions": 512},
}


def pytest_configure(config: pytest.Config) -> None:
    """GPU tests are run by `pytest -m gpu`; all others compute on the CPU, also where there is a GPU.

    transformers would otherwise put every 4-bit model on the GPU by itself.
    """
    expression = config.getoption("markexpr", "")
    if "gpu" not in expression or "not gpu" in expression:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device and pytest -m gpu; torch sees none"))


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """A trained four-layer Llama in bfloat16: hidden 256, GQA 4/2, tied embeddings, vocabulary 2048."""
    return TINY_LLAMA


@pytest.fixture(scope="session")
def tiny_nf4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as transformers and bitsandbytes save it: NF4 with double quantization."""
    folder = tmp_path_factory.mktemp("models") / "tiny-nf4"
    save_bnb(TINY_LLAMA, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_nf4: Path) -> Path:
    """A LoRA adapter as peft saves it, r=8, alpha=16, B not zero, on the seven linears of all blocks."""
    folder = tmp_path_factory.mktemp("adapters") / "tiny-adapter"
    save_random_adapter(TINY_LLAMA, folder, base_name=str(tiny_nf4))
    return folder


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``random_model("qwen2", num_hidden_layers=3)``: a small random model of a family in `FAMILIES`, bfloat16."""
    made: dict[str, Path] = {}

    def make(family: str, **changes: Any) -> Path:
        key = family + json.dumps(changes, sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("models") / family
            save_random_model(family, made[key], changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in NF4 with double quantization; tests that use it carry the mark ``slow``."""
    from qconv.demo_model import build_smollm2

    folder = tmp_path_factory.mktemp("models") / "smollm2-nf4"
    build_smollm2(folder, quantized=True)
    return folder


def save_bnb(
    source: Path, folder: Path, quant_type: str = "nf4", double: bool = True, max_shard_size: str = "5GB"
) -> None:
    """Quantizes with bitsandbytes on load, and saves as transformers does."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype="auto")
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    copy_tokenizer(folder)


def save_random_adapter(base: Path, folder: Path, base_name: str, **lora: Any) -> None:
    """A peft LoRA adapter with small random B, so that merging it changes the model and does not break it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    options = {"r": 8, "lora_alpha": 16, "target_modules": ALL_LINEARS, "task_type": "CAUSAL_LM"} | lora
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), LoraConfig(**options))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(folder, save_embedding_layers=False)


def save_random_model(family: str, folder: Path, changes: Mapping[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {k: v for k, v in _SIZES.items() if family != "gpt2" or "token_id" in k or k in _GPT2_SIZES}
    config = AutoConfig.for_model(family, **(sizes | FAMILIES[family] | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    copy_tokenizer(folder)


_GPT2_SIZES = ("vocab_size", "initializer_range")  # the rest of its sizes have names of their own


def copy_tokenizer(folder: Path) -> None:
    for file in TINY_LLAMA.glob("tokenizer*.json"):
        shutil.copyfile(file, folder / file.name)
