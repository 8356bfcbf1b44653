"""Random models in the shape of real ones: right for speed and memory, meaningless for quality.

    python benchmarks/shapes.py 8b --out /tmp/shapes

Writes ``base-nf4`` (bitsandbytes NF4 with double quantization, weights drawn and encoded one by one, so that no 16-bit
model exists) and ``adapter`` (r=16 on all linears, B not zero).
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qconv.convert.bnb_kernels import encode

TOKENIZER = Path(__file__).parent.parent / "tests/data/tiny-llama"
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False},
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "tie_word_embeddings": False,
    },
}
COMMON: dict[str, Any] = {
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
RANK = 16


def linears(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(out, in) of each linear of a block."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def nf4(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The tensors that transformers saves for one bitsandbytes linear."""
    parts = encode(weight, "nf4-dq")
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": list(weight.shape),
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": float(parts["nested_offset"]),
    }
    packed = {
        "": parts["codes"],
        ".absmax": parts["absmax"],
        ".quant_map": parts["quant_map"],
        ".nested_absmax": parts["nested_absmax"],
        ".nested_quant_map": parts["nested_quant_map"],
        ".quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    return {f"{name}.weight{ending}": tensor.cpu().contiguous() for ending, tensor in packed.items()}


def shards(config: dict[str, Any], device: str) -> Iterator[dict[str, Tensor]]:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02

    outer = {"model.embed_tokens.weight": draw(vocabulary, hidden).cpu(), "model.norm.weight": torch.ones(hidden)}
    if not config["tie_word_embeddings"]:
        outer["lm_head.weight"] = draw(vocabulary, hidden).cpu()
    yield {name: tensor.bfloat16() for name, tensor in outer.items()}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        block = {
            f"{prefix}{norm}.weight": torch.ones(hidden, dtype=torch.bfloat16)
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
        for name, shape in linears(config).items():
            block |= nf4(prefix + name, draw(*shape))
        yield block


def build(shape: str, folder: Path, device: str, layers: int | None = None) -> tuple[Path, Path]:
    """Base and adapter folder; made anew unless both are there."""
    base, adapter = folder / "base-nf4", folder / "adapter"
    if (adapter / "adapter_config.json").exists():
        return base, adapter
    torch.manual_seed(0)
    config = COMMON | SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    base.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, tensors in enumerate(shards(config, device)):
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, base / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    model = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "rms_norm_eps": 1e-5}
    (base / "config.json").write_text(json.dumps(model | config | {"quantization_config": quantization}))
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, base / file.name)
    adapter.mkdir(exist_ok=True)
    save_file(dict(lora_tensors(config)), adapter / "adapter_model.safetensors")
    lora = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none"}
    lora |= {"target_modules": [name.split(".")[-1] for name in linears(config)], "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(lora | {"inference_mode": True}))
    return base, adapter


def lora_tensors(config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for layer in range(config["num_hidden_layers"]):
        for name, (rows, columns) in linears(config).items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            yield f"{prefix}.lora_A.weight", torch.randn(RANK, columns) / columns**0.5
            yield f"{prefix}.lora_B.weight", torch.randn(rows, RANK) * 0.005


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(*build(arguments.shape, arguments.out, device, arguments.layers))


if __name__ == "__main__":
    main()
