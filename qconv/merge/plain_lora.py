"""Plain LoRA of one rank and scaling 1 in peft's layout: what every engine that serves adapters loads.

Engines read less of ``adapter_config.json`` than peft does: vLLM takes one r and one lora_alpha for all modules and no
patterns, and all of them allocate one rank. So every module gets the same rank, the missing rows of A and columns of B
are zero (which adds nothing to B @ A), and the scaling is in B: ``lora_alpha = r``.

Rounding: factors are multiplied in float32 and rounded once to the dtype of the file.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qconv.merge.spellings import PREFIX

SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` of vLLM takes (vllm/config/lora.py), less the 1 that older versions refuse."""


@dataclass(frozen=True, kw_only=True)
class Factors:
    """``B @ A`` is the whole update of a linear: A ``[R, K]``, B ``[N, R]``, float32."""

    a_RK: Tensor
    b_NR: Tensor

    @property
    def rank(self) -> int:
        return len(self.a_RK)


def served_rank(rank: int) -> int | None:
    """The smallest rank that engines allocate and this one fits in; None above the largest."""
    return next((served for served in SERVED_RANKS if served >= rank), None)


def write_plain_lora(
    folder: Path,
    modules: Mapping[str, Factors],
    rank: int,
    dtype: torch.dtype,
    about: Mapping[str, Any],
    saved: Mapping[str, Tensor] | None = None,
    biases: Mapping[str, Tensor] | None = None,
    short_names: bool = True,
) -> None:
    """Writes ``adapter_model.safetensors`` and ``adapter_config.json`` into a folder.

    Args:
        modules: by module name; none of a rank above ``rank``.
        about: keys of the config that say what the adapter is for (base, task, fan_in_fan_out).
        saved: modules_to_save: base tensor name -> its trained value, written as it is.
        biases: trained biases of other modules: base tensor name -> its value, written as it is.
        short_names: target_modules names the last part of each module (peft then targets every module of that name);
            False = every module by its full name.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    for module, factors in modules.items():
        a_RK = torch.zeros(rank, factors.a_RK.shape[1], dtype=dtype)
        b_NR = torch.zeros(len(factors.b_NR), rank, dtype=dtype)
        a_RK[: factors.rank] = factors.a_RK
        b_NR[:, : factors.rank] = factors.b_NR
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a_RK
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b_NR
    for name, tensor in (saved or {}).items():
        tensors[PREFIX + name] = tensor.contiguous()
    for name, tensor in (biases or {}).items():
        module = name.removesuffix(".bias")
        tensors[f"{PREFIX}{module}{'.base_layer' if module in modules else ''}.bias"] = tensor.contiguous()
    # Not save_file: what goes wrong with the disk has to be an OSError.
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    about = {**about, **({"bias": "all"} if biases else {})}
    config = plain_config(_targets(modules, short_names), rank, about, _saved_modules(saved or {}))
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def plain_config(targets: Iterable[str], rank: int, about: Mapping[str, Any], saved: Iterable[str]) -> dict[str, Any]:
    """An adapter_config.json that says no more than that this is LoRA of one rank with scaling 1."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "revision": None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": list(targets),
        "modules_to_save": list(saved) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        **about,
    }


def _targets(modules: Collection[str], short_names: bool) -> list[str]:
    return sorted({module.rpartition(".")[2] for module in modules} if short_names else modules)


def _saved_modules(saved: Mapping[str, Tensor]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in saved))
