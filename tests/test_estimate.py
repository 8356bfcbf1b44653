"""``--dry-run``: what a plan says against what the same job does, what it refuses, and that it writes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qconv import estimate, estimate_jobs
from qconv.checkpoint import open_checkpoint
from qconv.cli import main
from qconv.errors import CapacityError
from qconv.estimate import Estimate, Stage
from qconv.estimate_memory import Contest, comparing, peak, quantizing
from qconv.estimate_time import CPU, H100, machine_for, seconds
from qconv.plan import make_plan
from qconv.progress import QUIET
from qconv.quantization_config import QuantizationConfig
from qconv.quantize.memory import ModelShape, plan_memory
from tests.cli_cases import calibrates
from tests.cli_cases import job as make_job
from tests.merge_cases import TINY_LLAMA

CALIBRATION = ["--samples", "4", "--seq-len", "64"]
VALIDATION = ["--eval-tokens", "256", "--eval-seq-len", "64", "--no-default-gates", "--attribution", "never"]
Plan = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Plan:
    """Runs ``qconv ... --dry-run --json``: exit code and the one document on stdout."""

    def run(*words: object) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = ended(*words, "--dry-run", "--json")
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        return code, document

    return run


def ended(*words: object) -> int:
    try:
        main([*map(str, words)])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def everything(folder: Path) -> dict[str, int]:
    """All files below a folder, with their times."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


REPORTS = ("qconv-report", "README.md")


def written(folder: Path) -> int:
    """Bytes of an output but for its reports."""
    return sum(file.stat().st_size for file in folder.iterdir() if not file.name.startswith(REPORTS))


@pytest.mark.parametrize(
    "target",
    [
        [],
        ["--max-shard-size", "1MB"],
        ["--requant", "fp8"],
        ["--requant", "gptq"],
        ["--requant", "awq"],
        ["--requant", "nf4"],
        ["--requant", "w4a16", "--requant", "int8", "--requant", "nf4"],
    ],
    ids=" ".join,
)
def test_bytes_are_those_of_the_real_job(
    plan: Plan, tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path, target: list[str]
) -> None:
    calibration = CALIBRATION if calibrates(target) else []
    words = ["merge", tiny_nf4, tiny_adapter, *target, *calibration, "-o", tmp_path / "out", "--no-validate"]
    before = everything(tmp_path)
    code, document = plan(*words)
    assert (code, document["fits"], document["dry_run"]) == (0, True, True)
    assert everything(tmp_path) == before
    assert ended(*words, "--quiet") == 0
    folders = [path for path in [tmp_path / "out", *(tmp_path / "out").iterdir()] if (path / "config.json").exists()]
    assert document["writes_bytes"] == sum(map(written, folders))
    inputs = (tiny_nf4 / "model.safetensors", tiny_adapter / "adapter_model.safetensors")
    size = sum(file.stat().st_size for file in inputs)
    readings = len([stage for stage in document["stages"] if stage["writes_bytes"]])
    assert readings == 1 + (target.count("--requant") > 1)  # nf4 reads for itself
    assert document["reads_bytes"] == readings * size


def test_a_budget_is_measured_first_and_written_nearly_full(
    plan: Plan, tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    """Which linears get more bits is not known before; how many bytes there are is."""
    words = ["merge", tiny_nf4, tiny_adapter, "--requant", "w4a16", *CALIBRATION, "-o", tmp_path / "out"]
    code, document = plan(*words, "--no-validate", "--budget", "6bpw")
    assert (code, [stage["stage"] for stage in document["stages"]]) == (0, ["prepare", "measure", "quantize"])
    measure, quantize = document["stages"][1:]
    assert (measure["writes_bytes"], measure["reads_bytes"]) == (0, quantize["reads_bytes"])
    assert measure["host_bytes"] > quantize["host_bytes"]
    _, four = plan(*words, "--no-validate")
    budget, own = (stage["writes_bytes"] for stage in (quantize, four["stages"][1]))
    num_weights = 4 * (3 * 256 * 768 + 2 * 256 * 256 + 2 * 128 * 256)
    assert 0.95 * (6 - 4.125) / 8 * num_weights < budget - own < (6 - 4.125) / 8 * num_weights + 5000  # config.json


def test_an_importance_matrix_is_a_stage_of_its_own(
    plan: Plan, tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    words = ["merge", tiny_nf4, tiny_adapter, "--requant", "gguf-f16", "--imatrix", *CALIBRATION, "--no-validate"]
    code, document = plan(*words, "-o", tmp_path / "out")
    assert (code, [stage["stage"] for stage in document["stages"]]) == (0, ["prepare", "importance", "write"])
    assert document["stages"][1]["seconds"] is not None


def test_text_names_stages_terms_disk_and_time(
    tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", tiny_nf4, tiny_adapter, "--requant", "w4a16", *CALIBRATION, *VALIDATION]
    assert ended(*words, "-o", tmp_path / "out", "--dry-run") == 0
    text = capsys.readouterr().out
    for part in (
        "prepare",
        "quantize: reads",
        "validate: reads",
        "interpreter and libraries",
        "disk ",
        "time ",
        "fits",
    ):
        assert part in text
    assert CPU.origin in text


def test_a_job_that_is_wrong_ends_as_the_real_one_does(
    tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = ["-o", tmp_path / "out"], tmp_path / "file"
    file.write_text("")
    wrong: list[list[object]] = [
        ["merge", tmp_path / "none", tiny_adapter, *out],
        ["merge", tiny_nf4, tiny_adapter, "--requant", "w4a16", "--group-size", "96", *out],
        ["merge", tiny_nf4, tiny_adapter, "--requant", "w4a16", "--budget", "4.01bpw", *out],
        ["merge", tiny_nf4, tiny_adapter, "--trained-on", "fp4", *out],
        ["merge", tiny_nf4, tiny_adapter, "-o", tiny_nf4],
        ["merge", tiny_nf4, tiny_adapter, "--requant", "gptq", "--samples", "9999999", *out],
        ["merge", tiny_nf4, tiny_adapter, "--report", file / "report", *out],
        ["quantize", tiny_nf4, "--to", "fp8", "--gate", "merge.kl_mean<=1", *out],
        ["convert", tiny_nf4, "--to", "bf16", "-o", file],
        ["validate", "--reference", tiny_nf4, "--adapter", tiny_adapter, "--candidate", tmp_path],
        ["validate", "--reference", tiny_nf4, "--candidate", tiny_nf4, "--reference-cache", tmp_path / "no" / "cache"],
        ["validate", "--reference", tiny_nf4, "--candidate", tiny_nf4, "--eval-data", tmp_path / "none.txt"],
        ["train", tiny_nf4, tmp_path / "none.txt", *out],
    ]
    for words in wrong:
        before = everything(tmp_path)
        real, real_words = ended(*words), capsys.readouterr().err
        dry, dry_words = ended(*words, "--dry-run"), capsys.readouterr().err
        assert real in (2, 3)
        assert dry == real, words
        last = [line for line in real_words.splitlines() if line][-1]
        assert last.split(" (")[0] in dry_words, words
        assert everything(tmp_path) == before


def test_a_full_disk_is_exit_code_3_and_one_document(
    plan: Plan, tiny_nf4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    code, document = plan("convert", tiny_nf4, "--to", "bf16", "-o", tmp_path / "out")
    assert (code, document["exit_code"], document["fits"]) == (3, 3, False)
    assert document["disks"][0]["verdict"] == "does not fit"
    assert "make room" in document["problems"][0]


def test_too_little_host_memory_fails_a_plan_and_warns_a_job(
    plan: Plan, tiny_nf4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["convert", tiny_nf4, "--to", "bf16", "-o", tmp_path / "out"]
    _, document = plan(*words)
    need = document["host"]["peak_bytes"]
    expected = {need: "fits", round(need * 0.9): "tight", round(need * 0.8): "does not fit"}
    for usable, verdict in expected.items():
        monkeypatch.setattr(estimate, "usable_bytes", lambda usable=usable: usable)
        code, document = plan(*words)
        assert document["host"]["verdict"] == verdict
        assert code == (3 if verdict == "does not fit" else 0)
    assert "interpreter and libraries" in document["problems"][0]
    assert not list(tmp_path.iterdir())
    assert ended(*words) == 0  # what is only estimated does not stop a run
    assert (tmp_path / "out").is_dir()


def test_a_gpu_that_is_too_small() -> None:
    steps = {"gather": {"forward pass": 9_000_000_000}}
    small = Estimate(
        command="merge",
        device="cuda",
        stages=[Stage(name="quantize", gpu=steps)],
        process={},
        machine=None,
        cores=1,
        gpu_usable=6_000_000_000,
    )
    (complaint,) = small.check()  # an estimate: a run warns
    assert "quantize: needs about 9.00 GB of GPU memory and 6.00 GB can be had" in complaint
    with pytest.raises(CapacityError, match="however it is run") as e:
        replace(small, problems=["needs more, however it is run"]).check()
    assert e.value.exit_code == 3
    assert replace(small, gpu_usable=8_000_000_000).complaints() == []  # tight: within what plans are off by
    assert small.as_dict()["time"]["seconds"] is None


def test_a_plan_in_which_calibration_does_not_fit_says_what_the_job_says(
    tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any
) -> None:
    quantization = QuantizationConfig(target="gptq")
    asked = make_job(
        tmp_path_factory, tmp_path / "out", tiny_nf4, tiny_adapter, validation=None, quantization=quantization
    )
    made = make_plan(asked, QUIET)

    def refuse(*_: object) -> None:
        raise CapacityError("a model: gptq needs about 20.0 GB")

    monkeypatch.setattr(estimate_jobs, "plan_memory", refuse)
    for module in ("free_memory", "usable_on_gpu"):
        monkeypatch.setattr(estimate_jobs, module, lambda *_: 1 << 30)
    monkeypatch.setattr(estimate_jobs, "machine_of", lambda _: None)
    monkeypatch.setattr(estimate_jobs, "notes_of", lambda _: [])
    found = estimate_jobs.estimate_merge(asked, made, "cuda", "merge")
    assert found.complaints() == ["a model: gptq needs about 20.0 GB"]


def test_what_is_overwritten_counts_as_kept(plan: Plan, tiny_nf4: Path, tmp_path: Path) -> None:
    words = ["convert", tiny_nf4, "--to", "bf16", "-o", tmp_path / "out", "--overwrite"]
    assert ended(*words, "--quiet") == 0
    size = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    _, document = plan(*words)
    assert document["replaced"] == [{"folder": str(tmp_path / "out"), "bytes": size}]


def test_validation_reads_all_of_its_inputs(plan: Plan, tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    words = ["validate", "--reference", tiny_nf4, "--adapter", tiny_adapter, "--candidate", tiny_nf4, *VALIDATION]
    code, document = plan(*words)
    assert (code, document["writes_bytes"]) == (0, 0)
    base = (tiny_nf4 / "model.safetensors").stat().st_size
    assert document["reads_bytes"] == 2 * base + (tiny_adapter / "adapter_model.safetensors").stat().st_size
    cache = tmp_path / "cache"
    _, document = plan(*words, "--reference-cache", cache)
    assert document["writes_bytes"] > 0
    assert not cache.exists()
    assert ended(*words, "--reference-cache", cache, "--quiet") == 0
    assert document["writes_bytes"] == pytest.approx(cache.stat().st_size, rel=0.5)
    code, document = plan("validate", "--reference-cache", cache, "--candidate", tiny_nf4, *VALIDATION)
    assert (code, document["writes_bytes"]) == (0, 0)


def test_recipe_with_training(plan: Plan, tiny_nf4: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "release.yaml"
    recipe.write_text(
        f"""
recipe: 1
base: {tiny_nf4}
device: cpu
train: {{out: {tmp_path}/adapter, steps: 2, batch-size: 1, seq-len: 64, rank: 4}}
calibration: {{samples: 4, seq-len: 64}}
outputs:
  - {{out: {tmp_path}/awq, target: awq}}
  - {{out: {tmp_path}/bf16}}
validation: {{tokens: 256, seq-len: 64, attribution: never}}
default-gates: false
"""
    )
    before = everything(tmp_path)
    code, document = plan("run", recipe)
    assert code == 0
    names = [stage["stage"] for stage in document["stages"]]
    assert names[:3] == ["train", "prepare", "quantize"]
    assert everything(tmp_path) == before
    assert ended("run", recipe, "--quiet") == 0
    adapter = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert document["stages"][0]["writes_bytes"] >= adapter * 0.9
    for stage, folder in (("quantize", "awq"), (f"write {tmp_path}/bf16", "bf16")):
        planned = next(s["writes_bytes"] for s in document["stages"] if s["stage"] == stage)
        tokenizer = 20_000_000  # the adapter's own side files join the output
        assert written(tmp_path / folder) - tokenizer < planned <= written(tmp_path / folder)


SHAPE = ModelShape(
    location="a model",
    hidden_size=2048,
    itemsize=2,
    parameters=72_000_000,
    source_bytes=288_000_000,
    stacks=((10_240, 2048), (16_384, 2048), (2048, 8192)),
    grams=(2048, 2048, 2048, 2048, 8192),
    widest=8192,
    outer_bytes=525_000_000,
)


def total(steps: Any) -> int:
    return sum(peak(steps).values())


GPTQ, AWQ = QuantizationConfig(target="w4a16"), QuantizationConfig(target="awq")
FP8, STATIC = QuantizationConfig(target="fp8"), QuantizationConfig(target="fp8", activations="static")
SMOOTH = QuantizationConfig(target="int8", algorithm="smoothquant")


@pytest.mark.parametrize("outputs", [[STATIC], [SMOOTH], [SMOOTH, FP8]])
def test_no_gram_matrix_is_planned_where_none_is_gathered(outputs: list[QuantizationConfig]) -> None:
    steps = quantizing(SHAPE, 16, 512, outputs)
    for terms in steps.values():
        assert not terms.get("Gram matrices", 0) + terms.get("inputs of a linear in float32", 0)
    assert steps["gather"]["sampled inputs"] >= 4 * 512 * sum(SHAPE.grams)
    with_gram = quantizing(SHAPE, 16, 512, [*outputs, GPTQ])
    assert with_gram["gather"]["Gram matrices"] == 4 * sum(k * k for k in SHAPE.grams)


def test_an_output_without_calibration_is_planned_beside_one_that_has_it() -> None:
    """Blocks of a single calibrated output are passed on as they are stored, whatever else is made."""
    alone, beside = quantizing(SHAPE, 16, 512, [GPTQ]), quantizing(SHAPE, 16, 512, [FP8, GPTQ])
    assert beside.keys() == alone.keys()
    assert {name: terms for name, terms in beside.items() if name != "solve"} == {
        name: terms for name, terms in alone.items() if name != "solve"
    }
    assert total(beside) <= total(alone) * 1.02
    assert "advance" not in quantizing(SHAPE, 16, 512, [GPTQ, AWQ])


def test_a_quantized_head_is_planned(plan: Plan, random_model: Callable[..., Path], tmp_path: Path) -> None:
    model = random_model("llama", num_hidden_layers=1, tie_word_embeddings=False, vocab_size=200_000)
    words = ["quantize", model, "--to", "w4a16", "--algorithm", "rtn", "--group-size", "32", "--no-validate"]
    planned = {}
    for name, more in (("without", []), ("with", ["--lm-head"])):
        code, document = plan(*words, *more, "-o", tmp_path / "out")
        assert code == 0
        planned[name] = next(stage for stage in document["stages"] if stage["stage"] == "quantize")["host_terms"]
    elements = 200_000 * json.loads((model / "config.json").read_text())["hidden_size"]
    assert "output head and its codes" not in planned["without"]
    assert planned["with"]["output head and its codes"] > 7 * elements  # float32, codes, and as it is read
    # Calibrated, and on a GPU.
    shape = replace(SHAPE, head=(elements, 2 * elements))
    assert quantizing(shape, 16, 512, [GPTQ])["head"]["output head and its codes"] > 7 * elements
    assert plan_memory(shape, 16, 512, [GPTQ], "cuda").steps["head"] > 7 * elements


@pytest.mark.parametrize("outputs", [[GPTQ], [AWQ], [GPTQ, AWQ, FP8]])
def test_calibration_memory_grows_with_samples_and_length(outputs: list[QuantizationConfig]) -> None:
    sizes = [(rows, seq_len) for seq_len in (128, 512, 2048) for rows in (1, 8, 128, 1024)]
    found = {size: total(quantizing(SHAPE, *size, outputs)) for size in sizes}
    for rows, seq_len in sizes:
        for more, longer in sizes:
            if more >= rows and longer >= seq_len:
                assert found[more, longer] >= found[rows, seq_len]
    assert found[1024, 2048] > found[1, 128] + 1024 * 2048 * 2048 * 2 * 0.99


@pytest.mark.parametrize("on_gpu", [False, True])
def test_comparison_memory_grows_with_rows_and_length(on_gpu: bool) -> None:
    def needed(rows: int, seq_len: int) -> int:
        contest = Contest(
            block=SHAPE,
            entrants={"reference": rows, "candidate": rows, "floor": 2},
            seq_len=seq_len,
            rows_per_batch=max(1, 4096 // seq_len),
            head_bytes=[525_000_000] * 2,
            vocabulary=128_256,
            models_bytes=5_000_000_000,
            keep=False,
            whole=False,
            merges=True,
            ahead_bytes=70_000_000,
        )
        return total(comparing(contest, on_gpu, 1))

    assert needed(8, 512) <= needed(32, 512) < needed(256, 512)
    assert needed(32, 512) <= needed(32, 1024) < needed(32, 4096)


def test_seconds_come_from_a_measured_machine_or_not_at_all() -> None:
    assert machine_for("NVIDIA H100 80GB HBM3") is H100
    assert machine_for("NVIDIA L4") is None
    assert seconds({"train": 1.0}, H100, 1) is None  # nobody has measured it there
    one, two = (seconds({"forward": 1e12}, CPU, cores) for cores in (1, 2))
    assert one is not None
    assert two is not None
    assert two.high == pytest.approx(one.high / 2)
    low, high = one.low, one.high
    assert high / low == pytest.approx(CPU.spread**2)


def test_an_8b_model_on_an_h100_takes_what_was_measured_there() -> None:
    """Figures of docs/performance.md: GPTQ 33.3 s, plain 19.1 s, FP8 14.6 s; arithmetic of Llama-3-8B's shape."""
    stacks = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
    weights, tokens = 32 * sum(n * k for n, k in stacks), 128 * 2048
    squares = 3 * 4096**2 + 14336**2
    gptq = {
        "start running": 1.0,
        "merge": 8.0e9,
        "write": 5.8e9,
        "forward": tokens * (4.0 * weights + 32 * squares),
        "gptq": 32.0 * sum(n * k * k for n, k in stacks),
    }
    for units, measured in (
        (gptq, 33.3),
        ({"start": 1.0, "merge": 8.0e9, "write": 16.1e9}, 19.1),
        ({"start": 1.0, "merge": 8.0e9, "write": 9.1e9, "fp8": float(weights)}, 14.6),
    ):
        found = seconds(units, H100, 16)
        assert found is not None
        assert found.low < measured < found.high


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_validation_on_a_gpu_stays_within_its_plan(
    plan: Plan, tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    words = ["validate", "--reference", tiny_nf4, "--adapter", tiny_adapter, "--candidate", tiny_nf4, *VALIDATION]
    _, document = plan(*words, "--device", "cuda")
    torch.cuda.reset_peak_memory_stats()
    assert ended(*words, "--device", "cuda", "--quiet") == 0
    assert torch.cuda.max_memory_allocated() <= document["gpu"]["peak_bytes"]


def test_decompositions_are_planned(plan: Plan, tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    """Two for each changed weight, before and after, and once for all outputs and the comparison."""
    job = ["merge", tiny_nf4, tiny_adapter, "-o", tmp_path / "out", "--device", "cpu"]
    (code, before), (again, after) = plan(*job, "--no-validate"), plan(*job, "--no-validate", "--dampen-intruders", 0.5)
    assert code == again == 0
    work = 0
    for name, spec in open_checkpoint(TINY_LLAMA).specs().items():
        if "_proj" in name:
            work += 2 * spec.shape[0] * spec.shape[1] * min(spec.shape)
    low = after["time"]["seconds"][0] - before["time"]["seconds"][0]
    expected = work / CPU.per_second["svd"] / torch.get_num_threads() / CPU.spread
    assert low == pytest.approx(expected, rel=0.2)
