"""Tiny mixtures of experts, and adapters on them, for several test files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from qconv.assemble import Filling, write_tensors
from qconv.layout import plan_layout
from qconv.progress import QUIET
from qconv.types import Checkpoint
from qconv.writer import CheckpointWriter
from tests.merge_cases import trained

PREFIX = "base_model.model."
SIZES: dict[str, Any] = {  # bitsandbytes' CPU kernels decode rows of less than 64 wrongly
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_oss": {  # a window that is shorter than the rows of tests, and positions that YaRN stretches
        "num_local_experts": 4,
        "intermediate_size": 96,
        "sliding_window": 5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 8,
        },
    },
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
}
_SHARED: dict[str, Any] = {  # a dense layer, then one with a shared expert
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
}
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
ALIKE: dict[str, dict[str, Any]] = {  # in what concerns experts
    "deepseek_v2": _SHARED | _LATENT | {"num_experts": 4},
    "deepseek_v3": _SHARED | _LATENT,
    "dots1": _SHARED,
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "flex_olmo": {"num_experts": 4},
    "glm4_moe": _SHARED,
    "qwen3_next": {
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 64,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
}
STORED = {"mixtral": "block_sparse_moe"}
ROLES = {"mixtral": ("w1", "w3", "w2")}
ROUTERS = {"gpt_oss": "router"}


def stored_module(family: str) -> str:
    return STORED.get(family, "mlp")


def roles(family: str) -> tuple[str, str, str]:
    """Gate, up and down as files call them."""
    return ROLES.get(family, ("gate_proj", "up_proj", "down_proj"))


def adapted(model: nn.Module, family: str, config: dict[str, Any]) -> nn.Module:
    """A trained peft model; in ``target_parameters`` the router is called ``gate``."""
    router = f"{ROUTERS.get(family, 'gate')}.weight"
    targets = [router if name == "gate.weight" else name for name in config["target_parameters"]]
    return trained(model, **(config | {"target_parameters": targets}))


def written_model(view: Checkpoint, folder: Path) -> nn.Module:
    """What transformers loads from the plain output of a view."""
    layout = plan_layout(view, "fp32", None, ())
    with CheckpointWriter(folder, layout.specs, 1 << 30) as writer:
        write_tensors([Filling(writer=writer, layout=layout)], view, (), QUIET)
        writer.write_json("config.json", layout.config)
        writer.commit()
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def moe(family: str, **changes: Any) -> nn.Module:
    torch.manual_seed(21)
    config = AutoConfig.for_model(family, **(SIZES | (FAMILIES | ALIKE)[family] | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # differences that bfloat16 does not have
                buffer.copy_(7 + torch.randn_like(buffer) * 0.01)
    return model.eval()


def save_fused(model: nn.Module, folder: Path) -> Path:
    """A folder under the names of transformers' parameters, without the conversion of its `save_pretrained`."""
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    tensors = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_linear_adapter(
    folder: Path, family: str, rank: int = 3, num_experts: int = 4, inner: int | None = None
) -> Path:
    """An adapter on the linears of all experts, the router and attention, as transformers 4 and peft made it."""
    generator = torch.Generator().manual_seed(5)
    hidden = SIZES["hidden_size"]
    inner = inner or FAMILIES[family].get("moe_intermediate_size", SIZES["intermediate_size"])
    gate, up, down = roles(family)
    sizes = {gate: (inner, hidden), up: (inner, hidden), down: (hidden, inner)}
    sparse = f"{PREFIX}model.layers.0.{stored_module(family)}"
    shapes = {f"{sparse}.experts.{e}.{role}": shape for e in range(num_experts) for role, shape in sizes.items()}
    shapes |= {f"{sparse}.gate": (num_experts, hidden), f"{PREFIX}model.layers.0.self_attn.q_proj": (hidden, hidden)}
    tensors: dict[str, Tensor] = {}
    for module, (n, k) in shapes.items():
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, k, generator=generator) * 0.3
        tensors[f"{module}.lora_B.weight"] = torch.randn(n, rank, generator=generator) * 0.3
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 5,
        "target_modules": sorted({gate, up, down, "gate", "q_proj"}),
        "layers_to_transform": [0],
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
