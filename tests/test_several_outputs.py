"""One job with several outputs: the bytes of each, what they share, and what is left when one of them fails."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qconv import judging, pipeline
from qconv.checkpoint import SafetensorsCheckpoint, open_checkpoint
from qconv.config import MergeJob, OutputConfig
from qconv.errors import CapacityError, CheckpointError, UsageError
from qconv.overrides import OverrideConfig
from qconv.quantization_config import QuantizationConfig
from qconv.quantize.blocks import QuantizeRequest, quantize_blocks
from qconv.quantize.fold_block import Statistics
from qconv.quantize.memory import ModelShape, plan_memory
from qconv.skeleton import linear_weights
from qconv.streaming import StreamedModel
from qconv.types import QuantizedLinear, Scheme
from tests.cli_cases import SEQ_LEN, Variant, job, made, report_of, stored_tensors
from tests.test_cli import Run, run, stages_of
from tests.test_recipe import flags_to_job

__all__ = ["run"]  # a fixture

GPTQ, AWQ = Variant("w4a16", "gptq", 4), Variant("awq", "awq", 4)
RTN, FP8, NF4 = Variant("gptq", "rtn", 4, True), Variant("fp8", "fp8", 8), Variant("nf4", "bnb", 4)

Making = Callable[..., dict[str, Path]]
Alone = Callable[[Variant | None], Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, tiny_nf4: Path, tiny_adapter: Path) -> Making:
    """``make(FP8, None)``: the outputs of one job by name, unvalidated; None is a plain one."""

    def make(*variants: Variant | None) -> dict[str, Path]:
        folder = tmp_path_factory.mktemp("several")
        outputs = outputs_of(folder, variants)
        outcomes = pipeline.run(job(tmp_path_factory, folder, tiny_nf4, tiny_adapter, outputs=outputs, validation=None))
        assert [outcome.folder for outcome in outcomes] == [output.out for output in outputs]
        return {output.out.name: output.out for output in outputs}

    return make


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_nf4: Path, tiny_adapter: Path) -> Alone:
    return lambda variant: made(tmp_path_factory, tiny_nf4, tiny_adapter, variant)


def outputs_of(folder: Path, variants: Sequence[Variant | None]) -> tuple[OutputConfig, ...]:
    return tuple(
        OutputConfig(out=folder / str(variant or "plain"), quantization=None if variant is None else variant.config)
        for variant in variants
    )


def assert_same_model(found: Path, expected: Path) -> None:
    """All files but those that tell about the run are the same, byte for byte."""
    about_the_run = {"README.md", "qconv-report.json", "qconv-report.md", "qconv-report.html"}
    assert {path.name for path in found.iterdir()} == {path.name for path in expected.iterdir()}
    for path in found.iterdir():
        if path.name not in about_the_run:
            assert path.read_bytes() == (expected / path.name).read_bytes(), path.name


# Bytes


def test_outputs_without_calibration_are_those_made_alone(make: Making, alone: Alone) -> None:
    folders = make(RTN, FP8, NF4, None)
    assert len(folders) == 4
    for variant in (RTN, FP8, NF4, None):
        assert_same_model(folders[str(variant or "plain")], alone(variant))


@pytest.mark.parametrize("calibrated", [GPTQ, AWQ], ids=str)
def test_one_calibrated_output_is_the_one_made_alone_wherever_it_stands(
    make: Making, alone: Alone, calibrated: Variant
) -> None:
    for variants in ((calibrated, FP8), (RTN, calibrated)):
        folders = make(*variants)
        for variant in variants:
            assert_same_model(folders[str(variant)], alone(variant))


def test_calibrated_outputs_of_one_pass(make: Making, alone: Alone) -> None:
    """The first block sees the same tokens as alone; later ones what the merged blocks before them make of these."""
    folders = make(AWQ, GPTQ, FP8)
    assert_same_model(folders[str(FP8)], alone(FP8))
    for variant in (AWQ, GPTQ):
        found, expected = stored_tensors(folders[str(variant)]), stored_tensors(alone(variant))
        assert found.keys() == expected.keys()
        differing = {name.split(".")[2] for name in found if not torch.equal(found[name], expected[name])}
        assert differing == {"1", "2", "3"}
        report = report_of(folders[str(variant)])
        assert report["stages"]["calibration"] == report_of(alone(variant))["stages"]["calibration"]
    assert "calibration" not in report_of(folders[str(FP8)])["stages"]
    backwards = make(FP8, GPTQ, AWQ)
    for variant in (AWQ, GPTQ):
        assert_same_model(backwards[str(variant)], folders[str(variant)])


def test_statistics_of_a_shared_pass_are_those_of_the_unquantized_model(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against Gram matrices of the inputs that the whole model of transformers gives its linears."""
    ids_BS = torch.randint(2048, (3, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    seen: list[dict[str, Tensor]] = []

    def capture(weights: dict[str, Tensor], statistics: dict[str, Statistics], *_: object) -> dict[str, Any]:
        seen.append({name: statistics[name].gram_KK for name in weights})
        n, k = 8, 8
        return {
            name: QuantizedLinear(
                codes_NK=torch.zeros(n, k, dtype=torch.uint8),
                scales_NG=torch.ones(n, 1),
                zeros_NG=None,
                group_index_K=None,
                scheme=Scheme(group_size=-1),
            )
            for name in weights
        }

    monkeypatch.setattr("qconv.quantize.blocks.solve", capture)
    view = open_checkpoint(tiny_llama)
    requests = [
        QuantizeRequest(
            config=QuantizationConfig(target=target),
            scheme=Scheme(group_size=64),
            weights=linear_weights(view),
            storage=torch.float32,
            model_type="llama",
        )
        for target in ("w4a16", "gptq")
    ]
    blocks = list(quantize_blocks(StreamedModel(view, "cpu", torch.float32), requests, [ids_BS]))
    assert [(block.index, block.request) for block in blocks] == [(i, r) for i in range(4) for r in range(2)]

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    expected: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.startswith("model.layers.3.") and isinstance(module, torch.nn.Linear):

            def hear(_: Any, args: tuple[Tensor], name: str = name) -> None:
                x_TK = args[0].reshape(-1, args[0].shape[-1])
                expected[name.removeprefix("model.layers.3.") + ".weight"] = x_TK.T @ x_TK / len(x_TK)

            module.register_forward_pre_hook(hear)
    with torch.no_grad():
        model(ids_BS)
    for grams in seen[-2:]:
        assert grams.keys() == expected.keys()
        for name, gram_KK in grams.items():
            torch.testing.assert_close(gram_KK, expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].max()))


def test_outputs_of_different_dtypes(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, tiny_nf4: Path) -> None:
    """What is not quantized is stored by each in its own dtype."""
    quantization = QuantizationConfig(target="gptq", algorithm="rtn")
    outputs = tuple(OutputConfig(out=tmp_path / d, dtype=d, quantization=quantization) for d in ("bf16", "fp16"))
    pipeline.run(job(tmp_path_factory, tmp_path, tiny_nf4, outputs=outputs, validation=None))
    half, brain = (stored_tensors(tmp_path / name) for name in ("fp16", "bf16"))
    for name in ("model.embed_tokens.weight", "model.layers.1.input_layernorm.weight", "model.norm.weight"):
        assert (half[name].dtype, brain[name].dtype) == (torch.float16, torch.bfloat16)
        torch.testing.assert_close(half[name].float(), brain[name].float(), rtol=2**-8, atol=1e-6)


# What is shared


def test_each_tensor_of_a_block_is_read_once(make: Making, monkeypatch: pytest.MonkeyPatch, tiny_nf4: Path) -> None:
    read: dict[str, Counter[str]] = defaultdict(Counter)
    inner = SafetensorsCheckpoint._read_host

    def counting(self: SafetensorsCheckpoint, name: str, **options: Any) -> Tensor:
        read[self.location][name] += 1
        return inner(self, name, **options)

    monkeypatch.setattr(SafetensorsCheckpoint, "_read_host", counting)
    make(AWQ, GPTQ, FP8)
    base = read[str(tiny_nf4)]
    stored = set(stored_tensors(tiny_nf4))
    assert set(base) == stored
    assert {name for name, count in base.items() if count > 1} <= {"model.embed_tokens.weight", "model.norm.weight"}
    assert max(base.values()) <= 2  # once to embed the calibration tokens, once to be written


def test_memory_of_a_shared_pass_is_planned() -> None:
    shape = ModelShape(
        location="a model",
        hidden_size=4096,
        itemsize=2,
        parameters=218_000_000,
        source_bytes=873_000_000,
        stacks=((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
        grams=(4096, 4096, 4096, 14336),
        widest=14336,
        outer_bytes=1_050_000_000,
    )
    gptq, awq, folded = (QuantizationConfig(target="w4a16", algorithm=name) for name in ("gptq", "awq", "awq+gptq"))
    fp8, static = (QuantizationConfig(target="fp8", activations=how) for how in ("dynamic", "static"))

    def steps(*outputs: QuantizationConfig, shape: ModelShape = shape) -> Mapping[str, int]:
        return plan_memory(shape, 128, 2048, outputs, "cuda").steps

    # What was read is float32 and stays as it is for the second output; the first stacks what it solves together.
    together = steps(gptq, awq)
    assert together["solve"] == steps(gptq)["solve"] + 4 * 28672 * 4096
    assert together["solve"] >= steps(awq)["solve"]
    assert together["gather"] == steps(gptq)["gather"]
    assert "advance" not in together  # the pass that gathers makes the next block's input
    # Two that scale weights and statistics: the first leaves them for the second.
    grams, weights = sum(4 * k * k for k in shape.grams), 4 * sum(n * k for n, k in shape.stacks)
    assert steps(awq, folded)["solve"] == steps(awq)["solve"] + weights + grams
    # Weights that are not float32 as they are read become it beside them.
    half = replace(shape, source_bytes=436_000_000)
    assert steps(gptq, awq, shape=half)["solve"] > steps(gptq, shape=half)["solve"] + half.source_bytes
    # An output without calibration changes neither what is gathered nor how blocks are passed through.
    assert steps(gptq, fp8) == steps(gptq)
    assert steps(static)["gather"] < steps(gptq)["gather"] - grams + 200_000_000
    with pytest.raises(CapacityError, match=r"quantizing it with gptq \+ awq needs about"):
        plan_memory(shape, 128, 2048, [gptq, awq], "cuda", limit=3_000_000_000)


# Failures


@pytest.mark.parametrize("place", ["in a block", "in the last validation"])
def test_a_failure_leaves_nothing_of_any_output(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_nf4: Path,
    tiny_adapter: Path,
    place: str,
) -> None:
    folder = tmp_path / "deep" / "out"
    seen: list[int] = []
    if place == "in a block":
        inner = StreamedModel.build_block

        def fail_late(self: StreamedModel, index: int, tensors: Any) -> Any:
            seen.append(index)
            if index == 2:
                raise KeyboardInterrupt
            return inner(self, index, tensors)

        monkeypatch.setattr(StreamedModel, "build_block", fail_late)
    else:
        measure = judging.measure_fidelity

        def fail_second(*arguments: Any) -> Any:
            assert sorted(path.name for path in folder.iterdir()) == [f"{FP8}.partial", f"{GPTQ}.partial"]
            seen.append(len(seen))
            if len(seen) == 2:
                raise KeyboardInterrupt
            return measure(*arguments)

        monkeypatch.setattr(judging, "measure_fidelity", fail_second)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(job(tmp_path_factory, folder, tiny_nf4, tiny_adapter, outputs=outputs_of(folder, [GPTQ, FP8])))
    assert set(seen) >= {0, 1}  # it was not the first
    assert list(tmp_path.iterdir()) == []


def test_outputs_together_need_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, tiny_nf4: Path
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    outputs = outputs_of(tmp_path / "out", [RTN, FP8])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100 << 20))
    with pytest.raises(CheckpointError, match=r"the 2 outputs need 0\.14 GB and the disk has 0\.10 GB free"):
        pipeline.run(job(tmp_path_factory, tmp_path, tiny_nf4, outputs=outputs, validation=None))
    pipeline.run(job(tmp_path_factory, tmp_path, tiny_nf4, outputs=outputs[:1], validation=None))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [str(RTN)]


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        ((), "at least one output"),
        (("a", "b", "a"), "is the folder of two outputs"),
        (("a", "./b/../a"), "is the folder of two outputs"),
        (("a/b", "a"), r"a/b: lies in .*/a, the folder of another output"),
        (("x/a", "y/a"), r"--report r: two outputs are called a"),
    ],
)
def test_folders_that_are_refused(folders: tuple[str, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        MergeJob(base="b", outputs=tuple(OutputConfig(out=Path(folder)) for folder in folders), report_dir=Path("r"))


def test_folders_of_reports() -> None:
    outputs = (OutputConfig(out=Path("x/a")), OutputConfig(out=Path("y/b")))
    both = MergeJob(base="b", outputs=outputs, report_dir=Path("r"))
    assert [both.report_folder(output) for output in outputs] == [Path("r/a"), Path("r/b")]
    assert dataclasses.replace(both, outputs=outputs[:1]).report_folder(outputs[0]) == Path("r")
    assert dataclasses.replace(both, report_dir=None).report_folder(outputs[0]) is None


# On the command line

BOTH = ["--requant", "w4a16", "--requant", "fp8", "--algorithm", "rtn"]


def test_a_missed_gate_stops_only_its_own_output(run: Run, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path) -> None:
    result = run("merge", tiny_nf4, tiny_adapter, *BOTH, "--max-kl", "0.004", "--report", tmp_path / "reports")
    assert result.code == 4
    assert stages_of(result.err)[:2] == ["note:", "merging"]
    assert "--algorithm rtn is for w4a16 alone (fp8 takes --algorithm fp8, got rtn)" in result.err
    assert result.err.splitlines()[-1].startswith("error: a gate failed")
    assert f"rejected    {run.out}/w4a16.rejected (kept" in result.out
    assert f"output      {run.out}/fp8\nverdict     PASS" in result.out
    assert sorted(path.name for path in run.out.iterdir()) == ["fp8", "w4a16.rejected"]
    for name, folder, verdict in (("w4a16", "w4a16.rejected", "fail"), ("fp8", "fp8", "pass")):
        report = report_of(run.out / folder)
        assert (report["verdict"], report["subject"]["target"]) == (verdict, name)
        assert report["subject"]["candidate"] == str(run.out / name)
        assert report_of(tmp_path / "reports" / name) == report
        weights = {file.name for file in (run.out / folder).glob("*.safetensors")}
        assert weights <= report["provenance"]["candidate"].keys()
    candidates = [report_of(run.out / name)["provenance"]["candidate"] for name in ("fp8", "w4a16.rejected")]
    assert candidates[0]["model.safetensors"] != candidates[1]["model.safetensors"]


def test_json_of_several(run: Run, tiny_nf4: Path, tiny_adapter: Path) -> None:
    result = run("merge", tiny_nf4, tiny_adapter, *BOTH, "--max-kl", "0.004", "--json")
    document = json.loads(result.out)
    assert (result.code, document["exit_code"]) == (4, 4)
    assert [(part["folder"], part["exit_code"]) for part in document["outputs"]] == [
        (f"{run.out}/w4a16.rejected", 4),
        (f"{run.out}/fp8", 0),
    ]
    assert document["outputs"][1].keys() == report_of(run.out / "fp8").keys() | {"folder", "exit_code"}


@pytest.mark.parametrize("silent", ["--json", "--quiet"])
def test_options_that_an_output_does_not_take_are_in_its_report(run: Run, tiny_llama: Path, silent: str) -> None:
    options = ["--algorithm", "rtn", "--override", "*.o_proj:bits=8", "--no-validate"]
    result = run("quantize", tiny_llama, "--to", "gptq", "--to", "fp8", *options, silent)
    assert (result.code, result.err) == (0, "")
    found = {name: report_of(run.out / name)["stages"]["quantization"] for name in ("gptq", "fp8")}
    assert "options not taken" not in found["gptq"]
    algorithm, override = found["fp8"]["options not taken"]
    assert algorithm == "--algorithm rtn: fp8 takes --algorithm fp8, got rtn"
    assert override.startswith("--override '*.o_proj:bits=8': --override: fp8 has one scheme for all linears")
    if silent == "--json":
        documents = json.loads(result.out)["outputs"]
        assert [document["stages"]["quantization"] for document in documents] == [found["gptq"], found["fp8"]]
    shutil.rmtree(run.out)
    document = json.loads(
        run("quantize", tiny_llama, "--to", "gptq", "--to", "fp8", *options, "--dry-run", "--json").out
    )
    assert document["notes"] == [f"{run.out / 'fp8'}: {text} (not taken)" for text in (algorithm, override)]


def test_the_worst_exit_code_counts() -> None:
    from qconv.cli_answers import Answer, together
    from qconv.errors import GateError, GateInconclusiveError

    done = Answer(text="a", document={"n": 1}, following=("x",))
    unclear = Answer(text="b", document={"n": 2}, failure=GateInconclusiveError("?"), following=("y",))
    failed = Answer(text="c", document={"n": 3}, failure=GateError("!"))
    assert together([done]) is done
    assert together([done, done]).failure is None
    assert together([done, done]).following == ("x", "x")
    assert together([done, unclear]).failure is unclear.failure
    assert together([unclear, failed, done]).failure is failed.failure
    assert together([done, unclear]).document == {"outputs": [{"n": 1, "exit_code": 0}, {"n": 2, "exit_code": 5}]}


def test_quantizing_to_several(run: Run, tiny_llama: Path) -> None:
    options = ["--algorithm", "rtn", "--bits", "8", "--no-validate"]
    result = run("quantize", tiny_llama, "--to", "awq", "--to", "gptq", "--to", "int8", *options)
    assert result.code == 0, result.err
    notes = [line for line in result.err.splitlines() if line.startswith("note: --")]
    assert notes == [
        "note: --algorithm rtn is for awq, gptq alone (int8 takes --algorithm smoothquant+gptq or smoothquant or gptq "
        "or int8, got rtn)",
        "note: --bits 8 is for gptq, int8 alone (awq has --bits 4, got 8)",
    ]
    bits = {name: report_of(run.out / name)["stages"]["quantization"]["bits"] for name in ("awq", "gptq", "int8")}
    assert bits == {"awq": 4, "gptq": 8, "int8": 8}


def test_each_target_gets_the_options_that_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    targets = [word for target in ("awq", "gptq", "w4a16", "fp8") for word in ("--requant", target)]
    mixture = [
        "--damping",
        "0.05",
        "--override",
        "*.down_proj:bits=2",
        "--override",
        "*.o_proj:bits=8,asym",
        "--lm-head",
    ]
    both = flags_to_job("base", "adapter", *targets, *mixture, "--ignore", "a", "--ignore", "b", "-o", "out")
    two, eight = (
        OverrideConfig(pattern="*.down_proj", bits=2),
        OverrideConfig(pattern="*.o_proj", bits=8, symmetric=False),
    )
    assert [output.quantization for output in both.outputs] == [
        QuantizationConfig(target="awq", ignore=("a", "b")),
        QuantizationConfig(target="gptq", damping=0.05, ignore=("a", "b"), lm_head=True, overrides=(two, eight)),
        QuantizationConfig(target="w4a16", damping=0.05, ignore=("a", "b"), lm_head=True, overrides=(eight,)),
        QuantizationConfig(target="fp8", ignore=("a", "b")),
    ]
    notes = [line.partition(" (")[0] for line in capsys.readouterr().err.splitlines()]
    assert notes == [
        "note: --damping 0.05 is for gptq, w4a16 alone",
        "note: --lm-head is for gptq, w4a16 alone",
        "note: --override '*.down_proj:bits=2' is for gptq alone",
        "note: --override '*.o_proj:bits=8,asym' is for gptq, w4a16 alone",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--requant", "fp8", "--requant", "awq", "--requant", "fp8"], "fp8 is asked for twice"),
        (["--requant", "fp8", "--requant", "int8", "--asym"], "fp8 has one scheme"),
        (["--requant", "fp8", "--requant", "awq", "--desc-act"], "--desc-act"),
        (["--requant", "fp8", "--requant", "awq", "--bits", "3"], "--bits 8, got 3"),
        (["--requant", "fp8", "--requant", "awq", "--lm-head"], "--lm-head: readers of fp8"),
        (["--requant", "awq", "--requant", "int8", "--override", "a:bits=8"], "--override: awq has one scheme"),
        (
            ["--requant", "w4a16", "--requant", "w8a16", "--override", "a:bits=2"],
            "w4a16 has bits 3 or 4 or 5 or 6 or 8, got 2",
        ),
        (["--requant", "w4a16", "--requant", "awq", "--override", "a:bit=8"], "'bit=8' is no setting"),
        (["--requant", "fp8", "--requant", "awq", "--ignore", "re:("], "not a regular expression"),
    ],
)
def test_options_for_none_are_refused(
    run: Run, tiny_nf4: Path, tiny_adapter: Path, arguments: list[str], words: str
) -> None:
    run.refused(2, [words], "merge", tiny_nf4, tiny_adapter, *arguments)
