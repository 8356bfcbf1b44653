"""Every kind on an awkward base: other shapes, several shards, 16 bits and NF4 with double quantization.

What holds is written down as it is found, and docs/adapters.md has the same table.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qconv.checkpoint import open_checkpoint
from qconv.convert import dequantize
from qconv.errors import AdapterError
from qconv.inputs import load_reference
from qconv.merge import kinds as merged_kinds
from qconv.merge import load_adapter
from tests.conftest import save_bnb
from tests.kind_cases import KIND_CASES, LLAMA_LINEARS
from tests.merge_cases import IDS, edit_adapter, plain_model, trained
from tests.test_merge_oracle import close

peft = pytest.importorskip("peft")
DOCS = Path(__file__).parents[1] / "docs" / "adapters.md"
LORA_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"up_proj": 3}}),
    "lora-rs": ("LoraConfig", {"use_rslora": True, "r": 5}),
    "lora-dora": ("LoraConfig", {"use_dora": True, "r": 3}),
    "lora-saved": ("LoraConfig", {"modules_to_save": ["norm"]}),
}
WHOLE_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ln-tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}),
    "tokens": ("TrainableTokensConfig", {"target_modules": ["embed_tokens"], "token_indices": [1, 5, 7]}),
}
CASES = LORA_CASES | KIND_CASES | WHOLE_CASES
KINDS = ("16bit", "nf4-dq")
IN_FLOAT32 = ("osf", "frod")  # peft keeps parts of the base in its dtype; the oracle's is float32
CHECKS = ("unmerged logits", "untouched bytes", "all tensors")
FOUND: dict[tuple[str, str], dict[str, bool]] = {}
PEFT_TYPES: dict[str, str] = {}


def odd(folder: Path, dtype: torch.dtype) -> Path:
    """Three heads of 16, one of them for keys and values, 80 inner features, 67 tokens; biases on q, k and v."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 67}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 32}
    config = Qwen2Config(**sizes, **heads, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1)
    model = Qwen2ForCausalLM(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("bitsandbytes")
    root, folders = tmp_path_factory.mktemp("odd"), {}
    for suffix, dtype in (("", torch.bfloat16), ("-fp32", torch.float32)):
        folders["16bit" + suffix] = odd(root / f"16bit{suffix}", dtype)
        folders["nf4-dq" + suffix] = root / f"nf4-dq{suffix}"
        save_bnb(folders["16bit" + suffix], folders["nf4-dq" + suffix], max_shard_size="30KB")
    for folder in folders.values():
        assert len(list(folder.glob("*.safetensors"))) > 1, "several shards"
    return folders


@pytest.fixture(scope="module")
def decoded(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], nn.Module]:
    """The model that training had, in float32."""
    from transformers import AutoModelForCausalLM

    folders: dict[str, Path] = {}

    def model(base: str) -> nn.Module:
        if base not in folders:
            folders[base] = tmp_path_factory.mktemp("decoded") / base
            plain_model(dequantize(open_checkpoint(bases[base])), folders[base])
        found: nn.Module = AutoModelForCausalLM.from_pretrained(folders[base], dtype=torch.float32).eval()
        return found

    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_kind(
    name: str,
    kind: str,
    bases: dict[str, Path],
    decoded: Callable[[str], nn.Module],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: True)
    monkeypatch.setattr("peft.tuners.boft.layer.FastBlockDiag", BlockDiagonal)
    config_class, config = CASES[name]
    base = kind + ("-fp32" if name in IN_FLOAT32 else "")
    model = decoded(base)
    before = logits(model)
    adapted = trained(model, config_class=config_class, **{"target_modules": LLAMA_LINEARS, **config})
    adapted.save_pretrained(tmp_path / "adapter")
    PEFT_TYPES[name] = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"]
    source = open_checkpoint(bases[base])
    reference = load_reference(source, str(tmp_path / "adapter"), kind if kind == "16bit" else None)  # type: ignore[arg-type]
    found = FOUND[(name, kind)] = {}
    expected = logits(adapted)
    assert float((expected - before).abs().max()) > 1e-3
    close(logits(plain_model(reference.merged, tmp_path / "merged")), expected)
    found["unmerged logits"] = True
    _check_untouched(source, reference)
    found["untouched bytes"] = True
    _check_consumed(tmp_path, source)
    found["all tensors"] = True


class BlockDiagonal:
    @staticmethod
    def apply(blocks: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.block_diag(*factor) for factor in blocks])  # type: ignore[no-untyped-call]


def _check_untouched(source: Any, reference: Any) -> None:
    """What the adapter does not change comes out bit for bit, in its own dtype."""
    base, merged = dequantize(source), reference.merged
    untouched = [name for name in merged.specs() if name not in merged.changed]
    assert untouched
    for name in untouched:
        assert merged.specs()[name].dtype == base.specs()[name].dtype
        is_packed = f"{name}.absmax" in source.specs()
        own, other = merged.read(name), (base if is_packed else source).read(name)
        assert torch.equal(own.view(torch.uint8), other.view(torch.uint8)), name


def _check_consumed(tmp_path: Path, source: Any) -> None:
    """One tensor more than the layers have is an error that names it."""
    for number, spare in enumerate(
        ("model.layers.0.self_attn.q_proj.left_over", "model.layers.0.mlp.gate_proj.lora_C")
    ):
        name = f"base_model.model.{spare}.weight"
        folder = edit_adapter(
            tmp_path / "adapter",
            tmp_path / f"spare-{number}",
            lambda tensors, name=name: {**tensors, name: torch.ones(3)},
        )
        with pytest.raises(AdapterError, match=spare.rpartition(".")[2]):
            load_adapter(folder, dequantize(source))


def table() -> str:
    """By kind, how many configurations hold on each base."""
    rows: dict[str, dict[str, int]] = {}
    for (name, kind), found in FOUND.items():
        assert all(found.get(what) for what in CHECKS), f"{name} on {kind}: {found}"
        counts = rows.setdefault(PEFT_TYPES[name], dict.fromkeys(KINDS, 0))
        counts[kind] += 1
    lines = ["| kind | on a 16-bit base | on NF4 with double quantization |", "|---|---|---|"]
    for peft_type in sorted(rows):
        lines.append(f"| `{peft_type}` | {' | '.join(str(rows[peft_type][kind]) for kind in KINDS)} |")
    return "\n".join(lines)


def test_the_table_in_the_docs() -> None:
    if len(FOUND) < len(CASES) * len(KINDS):
        pytest.skip("the table is made of all cases, and only some were run")
    assert set(PEFT_TYPES.values()) == {*merged_kinds.KINDS, *merged_kinds.LOW_RANK, *merged_kinds.WHOLE}
    assert table() in DOCS.read_text(encoding="utf-8"), f"expected in docs/adapters.md:\n{table()}"
