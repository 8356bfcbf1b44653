"""QLoRA's descendants: KaSA and QA-LoRA against peft's own layers, the others against their papers' formulas in numpy.

The repositories of QA-LoRA, IR-QLoRA and DyLoRA cannot be installed beside this package, so what they compute is
written down here once more, from the papers, in numpy and without the code under test.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qconv.adapter_configs import AdapterOptions
from qconv.checkpoint import open_checkpoint
from qconv.cli import main
from qconv.cli_jobs import following_a_merge
from qconv.config import MergeJob, OutputConfig, ValidateJob, ValidationConfig
from qconv.convert import dequantize
from qconv.errors import AdapterError, UsageError
from qconv.inputs import load_reference
from qconv.merge import load_adapter, merge
from qconv.recipe import load_recipe
from qconv.runners import Reference
from qconv.validate.reference import unmerged
from tests.merge_cases import (
    PREFIX,
    TINY_LLAMA,
    TensorsInMemory,
    edit_adapter,
    llama,
    logits,
    plain_model,
    qwen2,
    save_model,
    trained,
    write_adapter,
)

N, K, R, GROUP = 12, 16, 4, 4
NAME = "model.layers.0.self_attn.q_proj"
ALPHA = 6


def adapter_of(folder: Path, a: Tensor, b: Tensor, more: dict[str, Tensor] | None = None, **config: Any) -> Path:
    tensors = {f"{PREFIX}{NAME}.lora_A.weight": a, f"{PREFIX}{NAME}.lora_B.weight": b}
    tensors |= {f"{PREFIX}{NAME}.{part}": tensor for part, tensor in (more or {}).items()}
    return write_adapter(folder, tensors, **({"r": len(a), "lora_alpha": ALPHA} | config))


def base_of(w: Tensor) -> TensorsInMemory:
    return TensorsInMemory({f"{NAME}.weight": w}, {"model_type": "llama"})


def both_ways(folder: Path, w: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, and what the merged weight and the unmerged branch make of them."""
    base = base_of(w)
    adapter = load_adapter(folder, base, options=AdapterOptions(**options))
    merged = merge(base, [adapter]).read(f"{NAME}.weight")
    linear = nn.Linear(w.shape[1], w.shape[0], bias=False)
    linear.weight.data = w.clone()
    holder = nn.Module()
    holder.add_module("q_proj", linear)
    unmerged(adapter)(NAME.removesuffix("q_proj"), holder)
    x = torch.randn(5, w.shape[1])
    with torch.no_grad():
        return x, x @ merged.T, linear(x)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) * 31 + len(shape)))


# QA-LoRA


def pooled(x: np.ndarray, convention: str) -> np.ndarray:
    """Inputs ``[B, K]`` in groups ``[B, K / g]``, group by group."""
    groups = [x[:, start : start + GROUP] for start in range(0, x.shape[1], GROUP)]
    if convention == "sum":
        return np.stack([group.sum(1) for group in groups], 1)
    means = np.stack([group.mean(1) for group in groups], 1)
    return means if convention == "mean" else means * len(groups)


@pytest.mark.parametrize("convention", ["sum", "mean", "peft"])
def test_qa_lora_pools_inputs(convention: str, tmp_path: Path) -> None:
    w, a, b = random(N, K), random(R, K // GROUP), random(N, R)
    x, merged, branch = both_ways(adapter_of(tmp_path, a, b), w, qa_lora=convention)
    expected = x.numpy() @ w.numpy().T + pooled(x.numpy(), convention) @ a.numpy().T @ b.numpy().T * (ALPHA / R)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(branch.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_qa_lora_of_peft(tmp_path: Path) -> None:
    """peft has these layers for GPTQ alone; the formula is its own method, called with what it reads of a layer."""
    variants = pytest.importorskip("peft.tuners.lora.variants")
    w, a, b = random(N, K), random(R, K // GROUP), random(N, R)
    x, merged, branch = both_ways(
        adapter_of(tmp_path, a, b, use_qalora=True, qalora_group_size=GROUP, init_lora_weights=True), w
    )
    layer = SimpleNamespace(
        lora_A={"default": SimpleNamespace(weight=a)},
        lora_B={"default": SimpleNamespace(weight=b)},
        lora_dropout={"default": nn.Identity()},
        scaling={"default": ALPHA / R},
        qalora_group_size={"default": GROUP},
        in_features=K,
        training=False,
    )
    expected = variants.QALoraLinearVariant.forward(layer, "default", x, x @ w.T)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(branch, expected, rtol=1e-4, atol=1e-4)


def test_qa_lora_is_what_its_repository_puts_into_zero_points(tmp_path: Path) -> None:
    """Its merge takes ``(B A)^T s / g / scales`` from the zero points of an asymmetric base; the mean convention."""
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 16, (N, K))
    scales, zeros = generator.uniform(0.1, 1, (N, K // GROUP)), generator.uniform(4, 12, (N, K // GROUP))
    a, b = random(R, K // GROUP), random(N, R)

    def weight(zeros_NG: np.ndarray) -> np.ndarray:
        return (codes - zeros_NG.repeat(GROUP, 1)) * scales.repeat(GROUP, 1)

    moved = zeros - (b.numpy() @ a.numpy()) * (ALPHA / R) / GROUP / scales
    base = base_of(torch.tensor(weight(zeros), dtype=torch.float32))
    adapter = load_adapter(adapter_of(tmp_path, a, b), base, options=AdapterOptions(qa_lora="mean"))
    found = merge(base, [adapter]).read(f"{NAME}.weight")
    np.testing.assert_allclose(found.numpy(), weight(moved), rtol=1e-4, atol=1e-4)


def test_a_run_on_a_base_of_grouped_zero_points(tmp_path: Path) -> None:
    """The base as QA-LoRA trains on it, and the merge in 16 bits judged against the unmerged adapter."""
    main(
        [
            "quantize",
            str(TINY_LLAMA),
            "--to",
            "gptq",
            "--algorithm",
            "rtn",
            "--asym",
            "--group-size",
            "64",
            "-o",
            str(tmp_path / "base"),
            "--device",
            "cpu",
            "--no-validate",
        ]
    )
    tensors = {}
    for layer in range(4):
        for module, n, k in (("self_attn.q_proj", 256, 256), ("mlp.down_proj", 256, None)):
            k = k or open_checkpoint(TINY_LLAMA).specs()[f"model.layers.{layer}.{module}.weight"].shape[1]
            name = f"{PREFIX}model.layers.{layer}.{module}.lora_"
            tensors[name + "A.weight"], tensors[name + "B.weight"] = random(R, k // 64) * 0.1, random(n, R) * 0.05
    write_adapter(tmp_path / "adapter", tensors, r=R, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"])
    main(
        [
            "merge",
            str(tmp_path / "base"),
            str(tmp_path / "adapter"),
            "--qa-lora",
            "sum",
            "-o",
            str(tmp_path / "out"),
            "--device",
            "cpu",
            "--eval-tokens",
            "512",
            "--eval-seq-len",
            "64",
            "--attribution",
            "never",
        ]
    )
    document = json.loads((tmp_path / "out" / "qconv-report.json").read_text())
    assert document["verdict"] == "pass"
    assert document["fidelity"]["base_without_adapter"]["kl"]["mean"] > 20 * document["fidelity"]["total"]["kl"]["mean"]
    assert document["stages"]["merge"]["read as"] == "QA-LoRA, sum of pooled inputs"
    stored, base = open_checkpoint(tmp_path / "out"), dequantize(open_checkpoint(tmp_path / "base"))
    name = "model.layers.1.mlp.down_proj.weight"
    update = stored.read(name).float() - base.read(name).float()
    groups = update.unflatten(1, (-1, 64))
    assert float((groups - groups.mean(-1, keepdim=True)).abs().max()) < 0.02 * float(update.abs().max()) + 1e-3


@pytest.mark.parametrize(
    ("columns", "config", "options", "words"),
    [
        (K // GROUP, {}, {}, "--qa-lora"),
        (K, {}, {"qa_lora": "sum"}, "without --qa-lora"),
        (5, {}, {"qa_lora": "sum"}, "5 columns for 16 inputs"),
        (K // GROUP, {"use_qalora": True, "qalora_group_size": 8}, {}, "groups of 8"),
        (K // GROUP, {"use_qalora": True, "qalora_group_size": GROUP}, {"qa_lora": "sum"}, "peft's convention"),
        (K // GROUP, {"use_qalora": True, "qalora_group_size": None}, {}, "qalora_group_size"),
        (K // GROUP, {"use_qalora": True, "qalora_group_size": 4, "use_dora": True}, {}, "at most one variant"),
        (K // GROUP, {"use_dora": True}, {"qa_lora": "sum"}, "has no lora_magnitude_vector"),
    ],
)
def test_qa_lora_refused(
    columns: int, config: dict[str, Any], options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = adapter_of(tmp_path, random(R, columns), random(N, R), **config)
    with pytest.raises(AdapterError, match=words):
        load_adapter(folder, base_of(random(N, K)), options=AdapterOptions(**options))


# IR-QLoRA


def elastic(a: Tensor, b: Tensor, beta_a: float, beta_b: float, x: np.ndarray) -> np.ndarray:
    """Of one input at a time: R means of K / R inputs beside A, each of the R results for N / R outputs beside B."""
    rows = []
    for x_K in x:
        h = a.numpy() @ x_K
        for i in range(R):
            h[i] += beta_a * x_K[i * (K // R) : (i + 1) * (K // R)].mean()
        y = b.numpy() @ h
        for n in range(N):
            y[n] += beta_b * h[n // (N // R)]
        rows.append(y)
    return np.stack(rows)


SCALES = {"lora_default_A_scale": torch.tensor([0.7]), "lora_default_B_scale": torch.tensor([-0.3])}


def test_ir_qlora_has_connections_beside_its_factors(tmp_path: Path) -> None:
    w, a, b = random(N, K), random(R, K), random(N, R)
    x, merged, branch = both_ways(adapter_of(tmp_path, a, b, SCALES), w, ir_qlora="plain")
    expected = x.numpy() @ w.numpy().T + elastic(a, b, 0.7, -0.3, x.numpy()) * (ALPHA / R)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(branch.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "shape", "options", "words"),
    [
        (SCALES, (N, K), {}, "--ir-qlora calibrated"),
        ({}, (N, K), {"ir_qlora": "plain"}, "has no lora_default_A_scale"),
        ({"lora_default_A_scale": torch.ones(1)}, (N, K), {"ir_qlora": "plain"}, "has no lora_default_B_scale"),
        (SCALES, (N + 1, K), {"ir_qlora": "plain"}, "rank 4 does not divide"),
        ({**SCALES, "lora_default_A_scale": torch.ones(2)}, (N, K), {"ir_qlora": "plain"}, r"expected shape \[1\]"),
    ],
)
def test_ir_qlora_refused(
    more: dict[str, Tensor], shape: tuple[int, int], options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = adapter_of(tmp_path, random(R, shape[1]), random(shape[0], R), more)
    with pytest.raises(AdapterError, match=words):
        load_adapter(folder, base_of(random(*shape)), options=AdapterOptions(**options))


def test_a_calibrated_base_is_not_made_up(tmp_path: Path, tiny_nf4: Path) -> None:
    pytest.importorskip("peft")
    trained(llama(), target_modules=["q_proj"]).save_pretrained(tmp_path / "peft")

    def with_scales(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        modules = {name.partition(".lora_")[0] for name in tensors}
        return tensors | {f"{module}.{part}": tensor.clone() for module in modules for part, tensor in SCALES.items()}

    folder = edit_adapter(tmp_path / "peft", tmp_path / "ir", with_scales)
    with pytest.raises(AdapterError, match="codes of W - tau"):
        load_reference(open_checkpoint(tiny_nf4), str(folder), None, options=AdapterOptions(ir_qlora="calibrated"))
    plain = load_reference(open_checkpoint(tiny_nf4), str(folder), None, options=AdapterOptions(ir_qlora="plain"))
    assert plain.adapter is not None
    assert all(delta.elastic_a for delta in plain.adapter.deltas.values())


# KaSA


def kasa(folder: Path, **config: Any) -> tuple[Tensor, Reference]:
    """What peft's unmerged model gives, and the adapter on its base."""
    import peft

    base = save_model(qwen2(), folder / "base")
    adapted = trained(qwen2(), target_modules=["q_proj", "k_proj", "up_proj"], kasa_config=peft.KasaConfig(), **config)
    adapted.save_pretrained(folder / "adapter")
    return logits(adapted), load_reference(open_checkpoint(base), str(folder / "adapter"), "16bit")


@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "rank_pattern": {"k_proj": 2}}])
def test_kasa_is_pefts(config: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    expected, reference = kasa(tmp_path, **config)
    merged = logits(plain_model(reference.merged, tmp_path / "merged"))
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)
    assert reference.adapter is not None
    model = plain_model(reference.base, tmp_path / "without")
    assert float((logits(model) - logits(qwen2())).abs().max()) > 1e-3, "the base lost components"
    unmerged(reference.adapter)("", model)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def test_kasa_on_4_bits_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    kasa(tmp_path)
    with pytest.raises(AdapterError, match="no KaSA on 4-bit layers"):
        load_reference(open_checkpoint(tmp_path / "base"), str(tmp_path / "adapter"), "nf4")


def test_kasa_of_another_tool_is_asked_for(tmp_path: Path) -> None:
    folder = adapter_of(tmp_path / "own", random(R, K), random(N, R), {"lora_diag": torch.ones(R)})
    with pytest.raises(AdapterError, match="--kasa repository"):
        load_adapter(folder, base_of(random(N, K)))
    pefts = adapter_of(
        tmp_path / "peft", random(R, K), random(N, R), {"lora_diag": torch.ones(R)}, kasa_config={"beta": 1e-4}
    )
    with pytest.raises(AdapterError, match="drop the option"):
        load_adapter(pefts, base_of(random(N, K)), options=AdapterOptions(kasa="repository"))
    plain = adapter_of(tmp_path / "plain", random(R, K), random(N, R))
    with pytest.raises(AdapterError, match="has no lora_E or lora_diag"):
        load_adapter(plain, base_of(random(N, K)), options=AdapterOptions(kasa="repository"))


@pytest.mark.parametrize(("n", "left"), [(12, 12), (13, 12), (16, 12), (24, 12), (8, 8)])
def test_kasa_of_its_repository_keeps_components_by_inputs(n: int, left: int, tmp_path: Path) -> None:
    """``update_layer`` of its fork of peft, in numpy: U[:, :K - R] and so on, of min(N, K) components that exist."""
    w, a, b, diag = random(n, K), random(R, K), random(n, R), random(R)
    name = f"{NAME}.weight"
    save_file({name: w}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float32"}))
    folder = adapter_of(tmp_path / "adapter", a, b, {"lora_diag": diag})
    options = AdapterOptions(kasa="repository")
    reference = load_reference(open_checkpoint(tmp_path), str(folder), "16bit", options=options)
    u, s, v = np.linalg.svd(w.double().numpy(), full_matrices=False)
    kept = (u[:, : K - R] * s[: K - R]) @ v[: K - R]
    assert np.linalg.matrix_rank(kept) == left
    np.testing.assert_allclose(reference.base.read(name).numpy(), kept, atol=1e-4)
    expected = kept + ALPHA / R * b.double().numpy() @ np.diag(diag.double().numpy()) @ a.double().numpy()
    np.testing.assert_allclose(reference.merged.read(name).numpy(), expected, atol=1e-4)


def test_kasa_that_leaves_nothing_of_the_base(tmp_path: Path) -> None:
    folder = adapter_of(tmp_path, random(N, K), random(N, N), {"lora_diag": torch.ones(N)}, kasa_config={"beta": 1e-4})
    with pytest.raises(AdapterError, match="12 smallest components"):
        load_adapter(folder, base_of(random(N, K)))


# DyLoRA, QDyLoRA


@pytest.mark.parametrize(("scaling", "over"), [("truncated", 3), ("trained", R)])
def test_the_first_components(scaling: Any, over: int, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    trained(llama(), target_modules=["q_proj", "down_proj"]).save_pretrained(tmp_path / "adapter")
    reference = load_reference(
        open_checkpoint(TINY_LLAMA),
        str(tmp_path / "adapter"),
        "16bit",
        options=AdapterOptions(rank=3, rank_scaling=scaling),
    )
    assert reference.adapter is not None
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base = open_checkpoint(TINY_LLAMA)
    for name in reference.adapter.deltas:
        a, b = (factors[f"{PREFIX}{name.removesuffix('weight')}lora_{side}.weight"].double().numpy() for side in "AB")
        expected = base.read(name).double().numpy() + 6 / over * b[:, :3] @ a[:3]
        np.testing.assert_allclose(reference.merged.read(name).numpy(), expected, rtol=1e-4, atol=1e-5)
    model = llama()
    unmerged(reference.adapter)("", model)
    merged = logits(plain_model(reference.merged, tmp_path / "merged"))
    torch.testing.assert_close(logits(model), merged, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ({}, {"rank": 5, "rank_scaling": "trained"}, "--rank 5, and .* has rank 4"),
        ({"use_rslora": True}, {"rank": 2, "rank_scaling": "truncated"}, "rsLoRA"),
        ({"use_dora": True}, {"rank": 2, "rank_scaling": "trained"}, "plain LoRA"),
    ],
)
def test_ranks_refused(config: dict[str, Any], options: dict[str, Any], words: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    trained(llama(), target_modules=["q_proj"], **config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=words):
        load_reference(open_checkpoint(TINY_LLAMA), str(tmp_path), "16bit", options=AdapterOptions(**options))


@pytest.fixture
def nested(tmp_path: Path) -> tuple[Path, Path]:
    """An adapter of rank 4 whose last two components only do harm; and text."""
    pytest.importorskip("peft")
    trained(llama(), target_modules=["q_proj", "down_proj"]).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor[:, :2] *= 0.01
            tensor[:, 2:] *= 20
    save_file(tensors, file)
    task = tmp_path / "task.txt"
    task.write_text("\n\n".join(f"The {i}th answer follows from the one before it." for i in range(80)))
    return tmp_path / "adapter", task


def test_a_sweep_takes_the_rank_with_the_lowest_loss(
    nested: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, task = nested
    arguments = ["merge", str(TINY_LLAMA), str(adapter), "--trained-on", "16bit", "--device", "cpu", "--dtype", "fp32"]
    arguments += ["--rank", "auto", "--rank-scaling", "truncated", "--task-data", str(task), "--eval-tokens", "256"]
    arguments += ["--eval-seq-len", "64", "--attribution", "never", "-o", str(tmp_path / "out")]
    main(arguments)
    document = json.loads((tmp_path / "out" / "qconv-report.json").read_text())
    facts = document["stages"]["rank"]
    losses = {rank: facts[f"task text {task}: rank {rank}"]["loss"] for rank in (4, 2, 1)}
    assert losses[4] > max(losses[1], losses[2]) + 0.1, "what does harm is in the last components"
    chosen = min(losses, key=lambda rank: losses[rank])
    assert facts["merged"] == chosen
    assert f"first {chosen} components, scaled as truncated" in document["stages"]["merge"]["read as"]
    assert document["fidelity"]["merge"]["kl"]["mean"] < 0.01, "the reference has that rank, too"
    said = capsys.readouterr().err
    assert f"merging rank {chosen}" in said
    assert said.count("nats a token, rank") == 3
    expected = load_reference(
        open_checkpoint(TINY_LLAMA),
        str(adapter),
        "16bit",
        options=AdapterOptions(rank=chosen, rank_scaling="truncated"),
    ).merged
    name = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(open_checkpoint(tmp_path / "out").read(name), expected.read(name))


def test_a_sweep_comes_after_all_that_can_be_refused(
    nested: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, task = nested
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit):
        main(
            [
                "merge",
                str(TINY_LLAMA),
                str(adapter),
                "--trained-on",
                "16bit",
                "--device",
                "cpu",
                "--rank",
                "auto",
                "--rank-scaling",
                "trained",
                "--task-data",
                str(task),
                "-o",
                str(tmp_path / "out"),
            ]
        )
    said = capsys.readouterr().err
    assert "exists already" in said
    assert "nats a token" not in said


# Options


def job(**more: Any) -> MergeJob:
    values: dict[str, Any] = {"base": "b", "adapter": "a", "outputs": (OutputConfig(out=Path("o")),)}
    return MergeJob(**(values | more))


AUTO = AdapterOptions(rank="auto", rank_scaling="trained")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AdapterOptions(rank=2), "go together"),
        (lambda: AdapterOptions(rank_scaling="trained"), "go together"),
        (lambda: AdapterOptions(rank=0, rank_scaling="trained"), "at least 1"),
        (lambda: job(options=AUTO), "give --task-data"),
        (lambda: job(options=AUTO, validation=None), "give --task-data"),
        (lambda: job(adapter=None, options=AdapterOptions(qa_lora="sum")), "--qa-lora: .* no adapter"),
        (lambda: ValidateJob(reference="b", adapter="a", candidate="c", options=AUTO), "give its number"),
        (
            lambda: ValidateJob(
                reference="b",
                adapter="a",
                candidate="c",
                reference_cache=Path("x"),
                options=AdapterOptions(qa_lora="sum"),
            ),
            "a cache does not know",
        ),
    ],
)
def test_options_refused(make: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()


def test_what_follows_a_merge_reads_the_adapter_alike() -> None:
    options = AdapterOptions(rank=2, rank_scaling="trained", qa_lora="sum", dampen_intruders=0.25)
    made = job(options=options, validation=None)
    words = following_a_merge(made, made.outputs[0])[0]
    assert "--dampen-intruders 0.25 --rank 2 --rank-scaling trained --qa-lora sum" in words


def test_a_rank_that_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["merge", "b", "a", "-o", "o", "--rank", "best", "--rank-scaling", "trained"])
    assert "--rank takes a number or auto, got 'best'" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [8, "auto"])
def test_in_a_recipe(rank: Any, nested: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, task = nested
    text: dict[str, Any] = {"recipe": 1, "base": str(TINY_LLAMA), "adapter": str(adapter), "trained-on": "16bit"}
    text |= {"outputs": [{"out": "out"}], "rank": rank, "rank-scaling": "truncated"}
    text |= {"validation": {"task-data": str(task)}}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(text))
    found = load_recipe(path).job
    assert found.options == AdapterOptions(rank=rank, rank_scaling="truncated")
    assert isinstance(found.validation, ValidationConfig)
