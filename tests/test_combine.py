"""Several adapters: peft's own combination where its definitions are of whole updates, numpy otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qconv.adapter_configs import CombinationConfig
from qconv.checkpoint import open_checkpoint
from qconv.convert import dequantize
from qconv.errors import AdapterError, UsageError
from qconv.inputs import load_reference
from qconv.merge import delta_weight, load_adapter
from qconv.merge.combine import combined_parts
from qconv.merge.elementwise import combined_update
from qconv.merge.interference import measure_interference
from qconv.records import write_train_record
from qconv.runners import Reference
from tests.merge_cases import TINY_LLAMA, llama, logits, plain_model, trained

pytest.importorskip("peft")
TARGETS = ["q_proj", "down_proj"]
Q_PROJ, UP_PROJ = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters of other ranks and scalings; the second also changes up_proj."""
    root = tmp_path_factory.mktemp("adapters")
    trained(llama(), seed=1, target_modules=TARGETS).save_pretrained(str(root / "one"))
    second = {"target_modules": [*TARGETS, "up_proj"], "r": 6, "lora_alpha": 9, "use_rslora": True}
    trained(llama(), seed=2, **second).save_pretrained(str(root / "two"))
    return root / "one", root / "two"


def reference(folders: tuple[Path, ...], method: str, **options: Any) -> Reference:
    config = CombinationConfig(adapters=tuple(map(str, folders)), method=method, **options)  # type: ignore[arg-type]
    return load_reference(open_checkpoint(TINY_LLAMA), None, "16bit", config)


def updates(folders: tuple[Path, ...], weight: str) -> list[Tensor]:
    base = open_checkpoint(TINY_LLAMA)
    adapters = [load_adapter(folder, base) for folder in folders]
    return [delta_weight(adapter, adapter.deltas[weight]) for adapter in adapters if weight in adapter.deltas]


def change(found: Reference, weight: str) -> Tensor:
    return found.merged.read(weight) - open_checkpoint(TINY_LLAMA).read(weight).float()


def close(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    assert float((found - expected).abs().max()) <= relative * float(expected.abs().max())


def pefts_change(folders: tuple[Path, Path], weight: str, **options: Any) -> Tensor:
    """Of peft's ``add_weighted_adapter``."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(llama(), str(folders[0]), adapter_name="one")
    model.load_adapter(str(folders[1]), adapter_name="two")
    model.add_weighted_adapter(["one", "two"], adapter_name="both", **options)
    module = model.get_submodule("base_model.model." + weight.removesuffix(".weight"))
    return module.get_delta_weight("both").detach()


@pytest.mark.parametrize("method", ["linear", "cat"])
@pytest.mark.parametrize("weight", [Q_PROJ, UP_PROJ])
def test_linear_and_cat_are_pefts_cat(method: str, weight: str, folders: tuple[Path, Path]) -> None:
    found = reference(folders, method, weights=(0.7, -0.3))
    if weight == Q_PROJ:
        close(change(found, weight), pefts_change(folders, weight, weights=[0.7, -0.3], combination_type="cat"), 1e-5)
    else:
        close(change(found, weight), -0.3 * updates(folders, weight)[0], 1e-5)


EVERY_TYPE: dict[str, tuple[str, dict[str, Any]]] = {
    "cat": ("cat", {}),
    "linear": ("linear", {"factors": True}),
    "svd": ("svd", {}),
    "ties": ("ties", {"density": 0.4, "factors": True}),
    "ties_svd": ("ties", {"density": 0.4, "rank": 5}),
    "dare_linear": ("dare", {"density": 0.6, "factors": True}),
    "dare_linear_svd": ("dare", {"density": 0.6, "rank": 5}),
    "dare_ties": ("dare-ties", {"density": 0.6, "factors": True}),
    "dare_ties_svd": ("dare-ties", {"density": 0.6, "rank": 5}),
    "magnitude_prune": ("magnitude-prune", {"density": 0.3, "factors": True}),
    "magnitude_prune_svd": ("magnitude-prune", {"density": 0.3, "rank": 5}),
}


@pytest.fixture(scope="module")
def equal_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("equal")
    for seed, name in ((1, "one"), (2, "two")):
        trained(llama(), seed=seed, target_modules=TARGETS, lora_alpha=5 + seed).save_pretrained(str(root / name))
    return root / "one", root / "two"


def alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """What dare drops, drawn alike on both sides: in turns for the two adapters."""
    from qconv.merge import elementwise

    counts = {"peft": 0, "qconv": 0}

    def drop(who: str, tensor: Tensor, density: float) -> Tensor:
        made = torch.Generator().manual_seed(counts[who] % 2)
        counts[who] += 1
        return tensor * (torch.rand(tensor.shape, generator=made) < density) / density

    monkeypatch.setattr("peft.utils.merge_utils.random_pruning", lambda t, density, rescale: drop("peft", t, density))
    monkeypatch.setattr(elementwise, "_drop", lambda t, density, generator: drop("qconv", t, density))


def test_every_type_of_peft_is_there() -> None:
    import inspect
    from typing import get_args

    from peft.tuners.lora.model import LoraModel

    parameter = inspect.signature(LoraModel.add_weighted_adapter, eval_str=True).parameters["combination_type"]
    assert set(EVERY_TYPE) == set(get_args(parameter.annotation))


@pytest.mark.parametrize("kind", ["16bit", "nf4-dq"])
@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.7, -0.3)])
@pytest.mark.parametrize("theirs", EVERY_TYPE)
def test_every_type_of_peft(
    theirs: str,
    weights: tuple[float, float],
    kind: str,
    equal_ranks: tuple[Path, Path],
    tiny_nf4: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alike(monkeypatch)
    method, options = EVERY_TYPE[theirs]
    config = CombinationConfig(adapters=tuple(map(str, equal_ranks)), method=method, weights=weights, **options)  # type: ignore[arg-type]
    source = open_checkpoint(TINY_LLAMA if kind == "16bit" else tiny_nf4)
    found = load_reference(source, None, kind if kind == "16bit" else None, config)  # type: ignore[arg-type]
    assert found.kind == kind
    assert found.adapter is not None, "each can be left unmerged"
    asked = {"density": options["density"]} if "density" in options else {}
    asked |= {"svd_rank": options["rank"]} if "rank" in options else {}
    expected = pefts_change(equal_ranks, Q_PROJ, weights=list(weights), combination_type=theirs, **asked)
    base = dequantize(source)
    close(found.merged.read(Q_PROJ) - base.read(Q_PROJ).float(), expected, 5e-4)
    norm = "model.norm.weight"
    assert found.merged.read(norm).equal(base.read(norm))


def test_factors_of_other_ranks_are_no_sum(folders: tuple[Path, Path]) -> None:
    with pytest.raises(AdapterError, match="has ranks 4"):
        reference(folders, "linear", factors=True)


@pytest.mark.parametrize("rank", [3, None])
def test_svd_is_pefts(rank: int | None, folders: tuple[Path, Path]) -> None:
    found = reference(folders, "svd", weights=(0.7, 0.3), rank=rank)
    assert found.merged_adapter is not None
    assert found.merged_adapter.deltas[Q_PROJ].rank == (rank or 6)
    theirs = pefts_change(folders, Q_PROJ, weights=[0.7, 0.3], combination_type="svd", svd_rank=rank)
    close(change(found, Q_PROJ), theirs, 1e-4)


@pytest.mark.parametrize(
    ("method", "theirs", "options"),
    [
        ("ties", "ties_svd", {"density": 0.4}),
        ("ties", "ties_svd", {"density": 0.4, "majority_sign": "frequency"}),
        ("magnitude-prune", "magnitude_prune_svd", {"density": 0.3}),
    ],
)
def test_sparse_methods_are_pefts_before_its_truncation(
    method: str, theirs: str, options: dict[str, Any], folders: tuple[Path, Path]
) -> None:
    found = reference(folders, method, weights=(0.7, 0.3), **options)
    assert found.adapter is None
    sign = {"majority_sign_method": options["majority_sign"]} if "majority_sign" in options else {}
    whole = 256  # nothing is truncated
    expected = pefts_change(
        folders,
        Q_PROJ,
        weights=[0.7, 0.3],
        combination_type=theirs,
        density=options["density"],
        svd_rank=whole,
        **sign,
    )
    close(change(found, Q_PROJ), expected, 2e-4)
    assert found.merged.read("model.norm.weight").equal(open_checkpoint(TINY_LLAMA).read("model.norm.weight"))


def numpy_ties(parts: list[np.ndarray], weights: tuple[float, ...]) -> np.ndarray:
    """Element by element, from the paper's description."""
    result = np.zeros(parts[0].shape)
    for place in np.ndindex(*result.shape):
        values = [part[place] for part in parts]
        positive = sum(values) >= 0
        agreeing = [w * v for w, v in zip(weights, values, strict=True) if v != 0 and (v > 0) == positive]
        result[place] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result


def config_of(method: str, **options: Any) -> CombinationConfig:
    return CombinationConfig(adapters=("a", "b", "c"), method=method, **options)  # type: ignore[arg-type]


def test_dare_drops_and_rescales() -> None:
    torch.manual_seed(0)
    parts, weights = [torch.randn(60, 50) for _ in range(3)], (0.5, 1.0, 2.0)
    found = combined_update(parts, weights, config_of("dare", density=0.25), "w")
    # Each element is a sum of some of the rescaled values.
    subsets = torch.tensor([[i >> bit & 1 for bit in range(3)] for i in range(8)]).float()
    rescaled = torch.stack([part * weight / 0.25 for part, weight in zip(parts, weights, strict=True)])
    sums = torch.einsum("sp,pnk->snk", subsets, rescaled)
    assert float((sums - found).abs().min(dim=0).values.max()) < 1e-5
    alone = combined_update(parts[:1], weights[:1], config_of("dare", density=0.25), "w")
    assert abs(float((alone != 0).float().mean()) - 0.25) < 0.03
    again = combined_update(parts, weights, config_of("dare", density=0.25), "w")
    assert torch.equal(found, again)
    for other in (("dare", "w", 1), ("dare", "v", 0)):
        changed = config_of(other[0], density=0.25, seed=other[2])
        assert not torch.equal(found, combined_update(parts, weights, changed, other[1]))


def test_dare_ties_is_ties_of_what_dare_keeps() -> None:
    torch.manual_seed(0)
    parts, weights = [torch.randn(12, 10) for _ in range(3)], (0.5, 1.0, 2.0)
    config = config_of("dare-ties", density=0.6)
    # What is kept of each: DARE with the weight of that part alone.
    kept = [
        combined_update(parts, [float(i == j) for j in range(3)], config_of("dare", density=0.6), "w") for i in range(3)
    ]
    expected = numpy_ties([part.double().numpy() for part in kept], weights)
    found = combined_update(parts, weights, config, "w").double().numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_what_svd_loses_is_seen_by_a_validation(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """The unmerged branches are those of the whole sum, whatever the merge keeps of it."""
    from qconv.validate.reference import unmerged

    found, whole = reference(folders, "svd", rank=1), reference(folders, "linear")
    assert found.adapter is not None
    model = llama()
    unmerged(found.adapter)("", model)
    close(logits(model), logits(plain_model(whole.merged, tmp_path / "whole")))
    merged = logits(plain_model(found.merged, tmp_path / "merged"))
    assert float((merged - logits(model)).abs().max()) > 1e-3


@pytest.mark.parametrize("method", ["linear", "sequential"])
def test_unmerged_branches_compute_what_the_merge_computes(
    method: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    from qconv.validate.reference import unmerged

    found = reference(folders, method)
    assert found.adapter is not None
    merged = logits(plain_model(found.merged, tmp_path / "plain"))
    model = llama()
    unmerged(found.adapter)("", model)
    close(logits(model), merged)
    assert float((merged - logits(llama())).abs().max()) > 1e-2


def test_interference_is_numpys(folders: tuple[Path, Path]) -> None:
    config = CombinationConfig(adapters=tuple(map(str, folders)), method="linear", weights=(0.5, -2.0))
    base = open_checkpoint(TINY_LLAMA)
    adapters = [load_adapter(folder, base) for folder in folders]
    totals, details = measure_interference(adapters, combined_parts(adapters, config), "cpu")
    one, two = (part.double().numpy() for part in updates(folders, Q_PROJ))
    one, two = one * 0.5, two * -2.0
    found = next(item for item in details if item.weight == Q_PROJ)
    assert found.cosine == pytest.approx((one * two).sum() / np.linalg.norm(one) / np.linalg.norm(two), rel=1e-4)
    assert found.sign_conflicts == pytest.approx((one * two < 0).mean(), abs=1e-4)
    assert found.norm_ratio == pytest.approx(np.linalg.norm(one) / np.linalg.norm(two), rel=1e-5)
    assert [(item.first, item.second) for item in totals] == [(1, 2)]
    assert len(details) == 8, "up_proj is the second adapter's alone"


def test_an_adapter_with_itself_and_its_opposite(folders: tuple[Path, Path]) -> None:
    base, twice = open_checkpoint(TINY_LLAMA), (folders[0], folders[0])
    for weights, cosine, conflicts in (((1.0, 2.0), 1, 0), ((1.0, -2.0), -1, 1)):
        adapters = [load_adapter(folder, base) for folder in twice]
        config = CombinationConfig(adapters=tuple(map(str, twice)), method="linear", weights=weights)
        (total,), _ = measure_interference(adapters, combined_parts(adapters, config), "cpu")
        assert total.cosine == pytest.approx(cosine, abs=1e-6)
        assert total.sign_conflicts == conflicts
        assert total.norm_ratio == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [({"use_dora": True}, "DoRA"), ({"modules_to_save": ["model.norm"]}, "to which its weight 0.5")],
)
def test_refused(config: dict[str, Any], reason: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    trained(llama(), target_modules=TARGETS, **config).save_pretrained(str(tmp_path / "odd"))
    with pytest.raises(AdapterError, match=reason):
        reference((folders[0], tmp_path / "odd"), "linear", weights=(1.0, 0.5))


def test_whole_tensors_come_from_the_one_that_has_them_or_the_last(folders: tuple[Path, Path], tmp_path: Path) -> None:
    saved = []
    for seed in (1, 2):
        saved.append(tmp_path / str(seed))
        trained(llama(), seed=seed, target_modules=TARGETS, modules_to_save=["model.norm"]).save_pretrained(
            str(saved[-1])
        )
    norms = [load_adapter(folder, open_checkpoint(TINY_LLAMA)) for folder in saved]
    last = norms[1].tensors.read(norms[1].replacements["model.norm.weight"])
    for method, options in (("linear", {}), ("ties", {"density": 0.5})):
        found = reference((folders[0], saved[1]), method, **options)
        assert torch.equal(found.merged.read("model.norm.weight"), last)
        with pytest.raises(AdapterError, match="both bring a whole"):
            reference((saved[0], saved[1]), method, **options)
    assert torch.equal(reference((saved[0], saved[1]), "sequential").merged.read("model.norm.weight"), last)


def test_adapters_of_other_bases_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    copies = []
    for number, kind in enumerate(("nf4", "nf4-dq")):
        copies.append(Path(shutil.copytree(folders[number], tmp_path / kind)))
        write_train_record(copies[-1], kind, "base")  # type: ignore[arg-type]
    config = CombinationConfig(adapters=tuple(map(str, copies)), method="linear")
    with pytest.raises(AdapterError, match=r"quantized as nf4, and .* on nf4-dq"):
        load_reference(open_checkpoint(TINY_LLAMA), None, None, config)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "ties"},
        {"method": "linear", "density": 0.5},
        {"method": "dare", "density": 0.0},
        {"method": "linear", "weights": (1.0,)},
        {"method": "linear", "weights": (0.0, 0.0)},
        {"method": "linear", "weights": (1.0, float("nan"))},
        {"method": "sequential", "weights": (1.0, 1.0)},
        {"method": "cat", "rank": 4},
        {"method": "cat", "factors": True},
        {"method": "ties", "density": 0.5, "factors": True, "rank": 4},
        {"method": "dare", "density": 0.5, "majority_sign": "total"},
        {"method": "linear", "adapters": ("one",)},
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        CombinationConfig(**({"adapters": ("a", "b")} | options))


def run_merge(folders: tuple[Path, Path], out: Path, *options: str) -> dict[str, Any]:
    from qconv.cli import main

    adapters = list(map(str, folders))
    arguments = ["merge", str(TINY_LLAMA), *adapters, "--trained-on", "16bit", "--device", "cpu", "-o", str(out)]
    main([*arguments, "--eval-tokens", "256", "--eval-seq-len", "64", "--attribution", "never", *options])
    document: dict[str, Any] = json.loads((out / "qconv-report.json").read_text())
    return document


def test_a_run_measures_the_merge_against_unmerged_branches(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = run_merge(folders, tmp_path / "out", "--combine", "linear", "--weights", "0.7,0.3", "--dtype", "fp32")
    assert document["verdict"] == "pass"
    assert document["fidelity"]["merge"]["kl"]["mean"] < 0.01
    assert document["subject"]["adapter"] == " + ".join(map(str, folders))
    assert {"adapter_1", "adapter_2"} <= document["provenance"].keys()
    facts = document["stages"]["combination"]
    assert facts["method"].startswith("linear: 0.7 x ")
    assert -1 <= facts["interference"]["adapters 1 and 2"]["cosine"] <= 1
    assert len(facts["interference by weight"]) == 8
    assert "interference of adapters 1 and 2: cosine" in capsys.readouterr().err


def test_a_run_of_full_rank_says_that_the_merge_is_not_measured(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = run_merge(
        folders,
        tmp_path / "out",
        "--combine",
        "ties",
        "--density",
        "0.5",
        "--requant",
        "w4a16",
        "--algorithm",
        "rtn",
        "--no-default-gates",
    )
    assert document["fidelity"]["merge"] is None
    assert document["fidelity"]["total"]["kl"]["mean"] > 0
    assert any("the merge is not measured" in note for note in document["fidelity"]["notes"])
    assert "merge budget" in document["stages"]["combination"]
    assert "the reference is the merged 16-bit model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "say how with --combine linear|cat"),
        (["--combine", "linear", "--weights", "0.7;0.3"], "--weights takes numbers"),
        (["--combine", "ties"], "needs --density"),
    ],
)
def test_command_line_refuses(
    options: list[str], words: str, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        run_merge(folders, tmp_path / "out", *options)
    assert raised.value.code == 2
    assert words in capsys.readouterr().err


def test_one_adapter_takes_no_options_of_several(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_merge(folders[:1], tmp_path / "out", "--combine", "linear")  # type: ignore[arg-type]
    assert "for two adapters or more" in capsys.readouterr().err


def test_recipe(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from qconv.recipe import load_recipe
    from qconv.recipe_show import as_document

    combine = {"adapters": list(map(str, folders)), "method": "ties", "weights": [0.7, 0.3], "density": 0.5}
    text = {"recipe": 1, "base": str(TINY_LLAMA), "trained-on": "16bit", "combine": combine}
    text["outputs"] = [{"out": str(tmp_path / "out")}]
    (tmp_path / "recipe.yaml").write_text(json.dumps(text))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.job.combination == CombinationConfig(
        adapters=tuple(map(str, folders)), method="ties", weights=(0.7, 0.3), density=0.5
    )
    (tmp_path / "again.yaml").write_text(json.dumps(as_document(recipe)))
    assert load_recipe(tmp_path / "again.yaml").job == recipe.job
