"""On a base in 4 bits, a merge is as near to what training ran as the best that libraries give.

Reference: transformers with bitsandbytes' 4-bit layers and peft's unmerged adapter, in bfloat16. The oracle's merge:
bitsandbytes decodes, peft merges in float32. Both merges are then stored and run in bfloat16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qconv.checkpoint import open_checkpoint
from qconv.inputs import load_reference
from tests.kind_cases import KIND_CASES
from tests.merge_cases import plain_model, trained

peft = pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"up_proj": 3}}),
    "lora-rs": ("LoraConfig", {"use_rslora": True, "r": 5}),
    "lora-dora": ("LoraConfig", {"use_dora": True, "r": 3}),
}
# The other kinds that peft puts on bitsandbytes' 4-bit layers; its IA3 hands float32 to layers that compute in bf16.
IN_4_BITS = ("ADALORA", "OFT", "VERA")
CASES = LORA | {name: case for name, case in KIND_CASES.items() if case[0].removesuffix("Config").upper() in IN_4_BITS}
MORE = {"vera": {"d_initial": 1.0}}  # trained for long
IDS = torch.randint(2048, (8, 64), generator=torch.Generator().manual_seed(0))


def load(folder: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model


def decoded_by_bitsandbytes(tiny_llama: Path, quantized: nn.Module) -> nn.Module:
    model = load(tiny_llama, torch.float32)
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                model.get_submodule(name).weight.copy_(weight)
    return model


def log_probabilities(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=IDS).logits.float(), -1)


def kl(reference: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.kl_div(other, reference, log_target=True, reduction="none").sum(-1).mean())


@pytest.mark.parametrize("name", CASES)
def test_no_further_than_bitsandbytes_and_peft(name: str, tiny_llama: Path, tiny_nf4: Path, tmp_path: Path) -> None:
    config_class, config = CASES[name]
    plain = decoded_by_bitsandbytes(tiny_llama, load(tiny_nf4, torch.bfloat16))
    before = log_probabilities(plain)
    adapted = trained(plain, config_class=config_class, **{"target_modules": LINEARS, **config, **MORE.get(name, {})})
    adapted.save_pretrained(tmp_path / "adapter")
    theirs = adapted.merge_and_unload().to(torch.bfloat16)

    unmerged = peft.PeftModel.from_pretrained(load(tiny_nf4, torch.bfloat16), tmp_path / "adapter").eval()
    assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in unmerged.modules())
    reference = log_probabilities(unmerged)
    merged = load_reference(open_checkpoint(str(tiny_nf4)), str(tmp_path / "adapter"), None).merged
    ours = plain_model(merged, tmp_path / "merged").to(torch.bfloat16)

    oracle, found = kl(reference, log_probabilities(theirs)), kl(reference, log_probabilities(ours))
    assert kl(reference, before) > 10 * oracle, "the adapter changes what the model says"
    assert found <= 1.2 * oracle, (found, oracle)
