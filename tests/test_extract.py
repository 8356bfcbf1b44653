"""Extraction: numpy's singular values bound the error, a known LoRA comes back, and peft loads the result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconv.adapter_configs import ExtractConfig
from qconv.checkpoint import open_checkpoint
from qconv.cli import main
from qconv.errors import CheckpointError, UsageError
from qconv.extract import Extracted, extract
from qconv.merge import load_adapter, merge
from qconv.merge.low_rank import EXACT_SIDE, low_rank
from qconv.records import read_train_record
from tests.merge_cases import TINY_LLAMA, llama, logits, qwen2, save_model, trained

NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


def spectrum(d_NK: Tensor) -> np.ndarray:
    return np.linalg.svd(d_NK.double().numpy(), compute_uv=False)


def error_of(d_NK: Tensor, found: object) -> float:
    factors = found.factors  # type: ignore[attr-defined]
    return float((d_NK.double() - factors.b_NR.double() @ factors.a_RK.double()).norm())


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
@pytest.mark.parametrize("rank", [1, 7, 40])
def test_error_is_eckart_and_youngs(shape: tuple[int, int], rank: int) -> None:
    torch.manual_seed(0)
    d_NK = torch.randn(shape)
    found, values = low_rank(d_NK, rank=rank), spectrum(d_NK)
    assert error_of(d_NK, found) == pytest.approx(np.sqrt((values[rank:] ** 2).sum()), rel=1e-4, abs=1e-4)
    assert found.energy == pytest.approx((values[:rank] ** 2).sum() / (values**2).sum(), rel=1e-5)
    assert found.norm == pytest.approx(np.linalg.norm(values), rel=1e-6)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
def test_energy_takes_the_fewest_that_reach_it(energy: float) -> None:
    torch.manual_seed(1)
    d_NK = torch.randn(96, 80) @ torch.diag(torch.linspace(1, 0.01, 80))
    found, values = low_rank(d_NK, energy=energy), spectrum(d_NK)
    kept = (values**2).cumsum() / (values**2).sum()
    assert found.factors.rank == int(np.searchsorted(kept, energy)) + 1
    assert found.energy >= energy


def test_randomised_decomposition_is_near_the_best_and_measures_what_it_captures() -> None:
    torch.manual_seed(2)
    side = EXACT_SIDE + 76
    decay = torch.arange(1, side + 1).float().pow(-0.7)
    d_NK = torch.randn(side, side) * decay
    found, values = low_rank(d_NK, rank=12), spectrum(d_NK)
    best = np.sqrt((values[12:] ** 2).sum())
    assert best <= error_of(d_NK, found) * (1 + 1e-6)
    assert error_of(d_NK, found) <= 1.0005 * best
    assert 1 - (error_of(d_NK, found) / found.norm) ** 2 == pytest.approx(found.energy, abs=1e-5)


def test_randomised_decomposition_changes_no_random_numbers_of_the_caller() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    low_rank(torch.ones(EXACT_SIDE + 1, EXACT_SIDE + 1), rank=2)
    assert torch.equal(torch.rand(3), expected)


def test_an_update_of_low_rank_takes_no_more_than_its_rank() -> None:
    torch.manual_seed(4)
    d_NK = torch.randn(50, 3) @ torch.randn(3, 60)
    found = low_rank(d_NK, energy=1.0)
    assert found.factors.rank == 3
    assert error_of(d_NK, found) <= 1e-5 * found.norm


def tuned(tmp_path: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """The tiny model in float32, as edited."""
    folder = tmp_path / "tuned"
    shutil.copytree(TINY_LLAMA, folder)
    state = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run(tuned_folder: Path, out: Path, **config: object) -> Extracted:
    options = {"rank": 4} if "energy" not in config and "rank" not in config else {}
    return extract(
        ExtractConfig(base=str(TINY_LLAMA), tuned=str(tuned_folder), out=out, device="cpu", **(options | config))  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]])
@pytest.mark.parametrize("how", [{"rank": 4}, {"energy": 0.999999}])
def test_a_known_lora_is_recovered(targets: list[str], how: dict[str, float], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import PeftModel

    adapted = trained(llama(), target_modules=targets)
    expected, before = logits(adapted), logits(llama())
    merged = adapted.merge_and_unload().state_dict()

    def take(state: dict[str, Tensor]) -> None:
        state.update({name: merged[name].clone() for name in state})

    result = run(tuned(tmp_path, take), tmp_path / "out", **how)

    assert {linear.module.rpartition(".")[2] for linear in result.linears} == set(targets)
    assert result.energy > 1 - 1e-6
    assert result.rank == (4 if "rank" in how else 8)
    found = logits(PeftModel.from_pretrained(llama(), str(tmp_path / "out")).eval())
    assert float((expected - before).abs().max()) > 1e-2
    assert float((found - expected).abs().max()) <= 2e-5 * float(expected.abs().max())
    record = read_train_record(tmp_path / "out")
    assert record is not None
    assert record.trained_on == "16bit"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (TINY_LLAMA / "tokenizer.json").read_bytes()


def noisy(state: dict[str, Tensor]) -> None:
    torch.manual_seed(5)
    for name in state:
        if "proj" in name:
            state[name] += torch.randn_like(state[name]) * 0.01


def test_what_is_captured_of_a_full_change_is_numpys(tmp_path: Path) -> None:
    folder = tuned(tmp_path, noisy)
    result = run(folder, tmp_path / "out", rank=6)
    base, after = load_file(TINY_LLAMA / "model.safetensors"), load_file(folder / "model.safetensors")
    kept = whole = 0.0
    for linear in result.linears:
        name = linear.module + ".weight"
        values = spectrum(after[name] - base[name].float()) ** 2
        assert linear.energy == pytest.approx(values[:6].sum() / values.sum(), rel=1e-4)
        kept, whole = kept + values[:6].sum(), whole + values.sum()
    assert len(result.linears) == 28
    assert result.energy == pytest.approx(kept / whole, rel=1e-4)


def changed_others(state: dict[str, Tensor]) -> None:
    state["model.layers.1.mlp.up_proj.weight"] += 0.01
    state[NORM] += 0.1
    state[EMBEDDING] *= 1.05


def test_others_are_refused_with_names_and_cost(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"2 tensors(.|\n)*embed_tokens.weight  2.097 MB, changed by 5.00%(.|\n)*--others"
    ):
        run(tuned(tmp_path, changed_others), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_others_saved_compute_what_the_tuned_model_computes(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = tuned(tmp_path, changed_others)
    result = run(folder, tmp_path / "out", others="save")
    assert {other.name for other in result.others} == {NORM, EMBEDDING}
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    found = logits(PeftModel.from_pretrained(llama(), str(tmp_path / "out")).eval())
    assert float((found - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


def test_biases_saved_compute_what_the_tuned_model_computes(tmp_path: Path) -> None:
    """Of a linear in the LoRA, of one that is not, and of one whose weight did not change; through peft and merged."""
    peft = pytest.importorskip("peft")
    base = save_model(qwen2(), tmp_path / "base")
    state = load_file(base / "model.safetensors")
    torch.manual_seed(9)
    for name in (
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.self_attn.k_proj.bias",
        "model.norm.weight",
    ):
        state[name] = state[name] + 0.1 * torch.randn_like(state[name])
    folder = tmp_path / "tuned"
    shutil.copytree(base, folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    extract(ExtractConfig(base=str(base), tuned=str(folder), out=out, device="cpu", rank=32, others="save"))
    expected = logits(type(qwen2()).from_pretrained(folder).eval())
    loaded = peft.PeftModel.from_pretrained(type(qwen2()).from_pretrained(base), out).eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    view = open_checkpoint(base)
    merged = merge(view, [load_adapter(out, view)])
    for name, tensor in state.items():
        torch.testing.assert_close(merged.read(name), tensor, rtol=1e-4, atol=1e-5)


def test_others_dropped_are_the_bases(tmp_path: Path) -> None:
    result = run(tuned(tmp_path, changed_others), tmp_path / "out", others="drop")
    names = set(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    prefix = "base_model.model.model.layers.1.mlp.up_proj.lora_"
    assert names == {prefix + "A.weight", prefix + "B.weight"}
    assert result.others_were == "dropped"


def other_shape(state: dict[str, Tensor]) -> None:
    state[EMBEDDING] = state[EMBEDDING][:-8].clone()


def one_missing(state: dict[str, Tensor]) -> None:
    del state[NORM]


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (other_shape, "changes no shapes"),
        (one_missing, "has no tensor 'model.norm.weight'"),
        (lambda state: None, "no linear differs"),
    ],
)
def test_refused(edit: Callable[[dict[str, Tensor]], None], reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=reason):
        run(tuned(tmp_path, edit), tmp_path / "out")


@pytest.mark.parametrize("options", [{}, {"rank": 4, "energy": 0.9}, {"rank": 0}, {"energy": 1.5}])
def test_rank_or_energy(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        ExtractConfig(base="a", tuned="b", out=Path("c"), **options)  # type: ignore[arg-type]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tuned(tmp_path, changed_others)
    arguments = ["extract", str(TINY_LLAMA), str(folder), "--rank", "2", "--others", "drop", "--device", "cpu"]
    main([*arguments, "-o", str(tmp_path / "one")])
    assert "model.layers.1  lowest 100.00% (mlp.up_proj), rank 1, changed by up to" in capsys.readouterr().out
    main([*arguments, "--json", "-o", str(tmp_path / "two")])
    document = json.loads(capsys.readouterr().out)
    assert document["linears"][0]["module"] == "model.layers.1.mlp.up_proj"
    assert document["rank"] == 2
