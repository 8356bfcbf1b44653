"""The command line: exit codes, the message for every refusal, and that a refused run leaves nothing behind.

Most cases call the entry point in this process; those about the process itself (imports, signals, the streams of a
whole run) start a real one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import qconv
from qconv import corpus
from qconv.checkpoint import open_checkpoint
from qconv.cli import cli, main
from qconv.convert import dequantize
from qconv.records import write_train_record
from qconv.targets import TARGETS
from tests.cli_cases import (
    EVAL_TOKENS,
    LAYOUTS,
    NUM_LINEARS,
    SEQ_LEN,
    Variant,
    bitsandbytes_weights,
    calibrates,
    damaged,
    made,
    report_of,
    set_config,
    small_texts,
    stored_tensors,
)

Q_PROJ = "model.layers.2.self_attn.q_proj"
LORA = f"base_model.model.{Q_PROJ}.lora_"
RTN = ["--requant", "w4a16", "--algorithm", "rtn"]


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


class Run:
    """Runs commands in this process; those that write go to ``self.out``, on a few hundred tokens."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path, texts: tuple[Path, Path]):
        self._capsys = capsys
        self.out = folder / "out"
        evaluation = ["--eval-data", str(texts[1]), "--eval-tokens", str(EVAL_TOKENS), "--eval-seq-len", str(SEQ_LEN)]
        self.calibration = ["--calibration", str(texts[0]), "--samples", "8", "--seq-len", str(SEQ_LEN)]
        self.evaluation = evaluation

    def __call__(self, command: str, *arguments: str | Path) -> Result:
        extra = ["--device", "cpu"] if command != "inspect" else []
        if command in ("merge", "quantize", "validate") and "--no-validate" not in arguments:
            extra += self.evaluation
        if command in ("merge", "quantize") and calibrates(arguments):
            extra += self.calibration
        if command in ("merge", "quantize", "convert"):
            extra += ["-o", str(self.out)]
        return self.exactly(command, *extra, *map(str, arguments))

    def exactly(self, *arguments: str) -> Result:
        self._capsys.readouterr()
        code: Any = 0
        try:
            main(list(arguments))
        except SystemExit as stop:
            code = stop.code
        captured = self._capsys.readouterr()
        return Result(code, captured.out, captured.err)

    def refused(self, code: int, words: list[str], command: str, *arguments: str | Path) -> str:
        """Asserts exit code and message, one line that starts with ``error:``, and that nothing was left."""
        before = sorted(self.out.parent.rglob("*"))
        result = self(command, *arguments)
        assert result.code == code, result
        for word in words:
            assert word in result.err, result.err
        assert "Traceback" not in result.err
        assert "unexpected" not in result.err
        assert result.out == ""
        assert sorted(self.out.parent.rglob("*")) == before
        return result.err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path / "work"
    folder.mkdir()
    return Run(capsys, folder, small_texts(tmp_path_factory))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, tiny_nf4: Path, tiny_adapter: Path) -> Callable[..., Path]:
    return lambda variant: made(tmp_path_factory, tiny_nf4, tiny_adapter, variant)


# Exit codes 0, 4 and 5


def stages_of(stderr: str) -> list[str]:
    """The first word of each line: what a run says on stderr when nothing is wrong."""
    return [line.split()[0] for line in stderr.splitlines()]


def test_done(run: Run, tiny_nf4: Path, tiny_adapter: Path) -> None:
    result = run("merge", tiny_nf4, tiny_adapter, "--max-kl", "0.01")
    assert result.code == 0
    assert stages_of(result.err) == ["merging", "writing", "validating"]
    assert f"output      {run.out}\nverdict     PASS\n" in result.out
    assert "pass: kl_mean <= 0.01" in result.out
    assert [path.name for path in run.out.parent.iterdir()] == ["out"]
    report = report_of(run.out)
    assert report["verdict"] == "pass"
    assert f"{report['fidelity']['total']['kl']['mean']:.3g} nats" in result.out


@pytest.mark.parametrize(
    ("code", "verdict", "limit"), [(4, "fail", "1e-7"), (5, "inconclusive", None)], ids=["fail", "inconclusive"]
)
def test_missed_gates(
    run: Run, output: Any, tiny_nf4: Path, tiny_adapter: Path, code: int, verdict: str, limit: str | None
) -> None:
    # A limit equal to the measured value lies inside its interval.
    measured = report_of(output(Variant("w4a16", "rtn", 4)))["fidelity"]["total"]["kl"]["mean"]
    result = run("merge", tiny_nf4, tiny_adapter, *RTN, "--max-kl", limit or repr(measured))
    assert result.code == code
    assert f"rejected    {run.out}.rejected" in result.out
    assert result.err.splitlines()[-1].startswith("error: a gate ")
    assert [path.name for path in run.out.parent.iterdir()] == ["out.rejected"]
    assert report_of(run.out.with_name("out.rejected"))["verdict"] == verdict


# Exit code 3: bad adapters


def zero_all(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        if "lora_B" in name:
            tensors[name] = torch.zeros_like(tensors[name])


def drop_b(tensors: dict[str, Tensor]) -> None:
    del tensors[LORA + "B.weight"]


def add_spare(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.layers.1.input_layernorm.weight"] = torch.ones(256)


def add_unknown_layer(tensors: dict[str, Tensor]) -> None:
    for side in "AB":
        new = f"base_model.model.model.layers.9.self_attn.q_proj.lora_{side}.weight"
        tensors[new] = tensors[f"{LORA}{side}.weight"].clone()


def widen(tensors: dict[str, Tensor]) -> None:
    tensors[LORA + "A.weight"] = torch.ones(8, 300)


def put_nan(tensors: dict[str, Tensor]) -> None:
    tensors[LORA + "B.weight"][3, 2] = float("nan")


def keep(tensors: dict[str, Tensor]) -> None:
    pass


BAD_ADAPTERS: dict[str, tuple[Callable[[dict[str, Tensor]], None], dict[str, Any], list[str]]] = {
    "no tensors": (lambda tensors: tensors.clear(), {}, ["adapter_model.safetensors", "holds no tensors"]),
    "never trained": (zero_all, {}, ["is zero in all 28 modules", "never trained"]),
    "partial": (drop_b, {}, [LORA + "A.weight", "lora_B"]),
    "spare tensor": (add_spare, {}, ["spare tensor", "layers.1.input_layernorm.weight", "modules_to_save"]),
    "another model": (add_unknown_layer, {}, ["model.layers.9.self_attn.q_proj"]),
    "wrong shape": (widen, {}, [Q_PROJ, "[8, 300]", "256"]),
    "NaN": (put_nan, {}, [LORA + "B.weight", "NaN or infinity in 1 of"]),
    "unknown kind": (keep, {"peft_type": "NONESUCH"}, ["NONESUCH", "adapter_config.json"]),
    "prompt": (keep, {"peft_type": "PROMPT_TUNING"}, ["PROMPT_TUNING", "nothing to merge"]),
    "unknown key": (keep, {"lora_magic": True}, ["lora_magic", "newer peft"]),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_bad_adapter_is_refused(run: Run, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path, case: str) -> None:
    edit, config, words = BAD_ADAPTERS[case]
    adapter = damaged(tiny_adapter, tmp_path / "adapter", edit, **config)
    run.refused(3, [str(adapter), *words], "merge", tiny_nf4, adapter, *RTN)


def test_pickled_adapter_is_refused(run: Run, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(tiny_adapter, adapter)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, adapter / "adapter_model.bin")
    run.refused(3, [str(adapter), "pickled weights (adapter_model.bin)"], "merge", tiny_nf4, adapter)


# Exit code 3: bad bases


def test_pickled_base_is_refused(run: Run, tmp_path: Path, tiny_llama: Path, tiny_adapter: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    run.refused(3, [str(base), "pickled weights (pytorch_model.bin)"], "merge", base, tiny_adapter)


def test_index_that_leaves_the_folder_is_refused(
    run: Run, tmp_path: Path, tiny_llama: Path, tiny_adapter: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    weight_map = dict.fromkeys(load_file(base / "model.safetensors"), "../base/model.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    run.refused(3, ["model.safetensors.index.json", "leaves the folder"], "merge", base, tiny_adapter)


@pytest.mark.parametrize("way", ["plain", "rtn", "gptq", "fp8"])
@pytest.mark.parametrize(
    "place", [f"{Q_PROJ}.weight", "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"]
)
def test_nan_in_base_is_refused(
    run: Run, tmp_path: Path, tiny_llama: Path, tiny_adapter: Path, way: str, place: str
) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[place][5] = float("nan")

    base = damaged(tiny_llama, tmp_path / "base", edit)
    options = {
        "plain": [],
        "rtn": RTN,
        "gptq": ["--requant", "gptq"],
        "fp8": ["--requant", "fp8"],
    }[way]
    # A norm's NaN shows in what it feeds when activations are gathered, and otherwise in itself.
    named = "model.layers.1.self_attn.q_proj" if way == "gptq" and "layernorm" in place else place
    run.refused(3, [named, "NaN or infinity"], "merge", base, tiny_adapter, "--trained-on", "16bit", *options)


def test_missing_tokenizer_is_refused(run: Run, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path) -> None:
    base = damaged(tiny_nf4, tmp_path / "base", keep)
    (base / "tokenizer.json").unlink()
    words = ["has no tokenizer", "copy the tokenizer files of the base model"]
    run.refused(3, [str(base), *words], "merge", base, tiny_adapter, "--requant", "gptq")
    run.refused(3, words, "merge", base, tiny_adapter)


def test_missing_folders_are_refused(run: Run, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path) -> None:
    gone = tmp_path / "gone"
    run.refused(3, [str(gone), "no such folder"], "merge", gone, tiny_adapter)
    run.refused(3, [str(gone), "no such folder"], "merge", tiny_nf4, gone)
    run.refused(3, [str(gone), "no such folder"], "inspect", gone)
    run.refused(3, ["adapter_config.json", "not found"], "merge", tiny_nf4, tiny_nf4)
    run.refused(3, ["config.json", "not found"], "merge", tiny_adapter, tiny_adapter)


def test_family_without_linears_is_refused(run: Run, random_model: Callable[..., Path]) -> None:
    run.refused(3, ["no linear layer in its decoder blocks"], "quantize", random_model("gpt2"), "--to", "gptq")


# Exit code 3: output and disk


def test_full_disk_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch, tiny_nf4: Path, tiny_adapter: Path) -> None:
    usage = shutil.disk_usage(tiny_nf4)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    run.refused(3, ["the output needs 0.07 GB", "the disk has 0.00 GB free"], "merge", tiny_nf4, tiny_adapter, *RTN)


def test_an_input_is_never_replaced(run: Run, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_nf4, base)
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    result = run("merge", base, tiny_adapter, "--overwrite", "-o", base)
    assert result.code == 2
    assert "an input of this run" in result.err
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before


def test_existing_output_is_refused_and_can_be_replaced(run: Run, tiny_nf4: Path) -> None:
    assert run("convert", tiny_nf4, "--to", "bf16").code == 0
    stamp = (run.out / "model.safetensors").stat()
    run.refused(3, [str(run.out), "exists already", "--overwrite"], "convert", tiny_nf4, "--to", "fp16")
    assert (run.out / "model.safetensors").stat() == stamp
    assert run("convert", tiny_nf4, "--to", "fp16", "--overwrite").code == 0
    assert stored_tensors(run.out)["model.norm.weight"].dtype == torch.float16
    assert [path.name for path in run.out.parent.iterdir()] == ["out"]
    (run.out / "config.json").unlink()
    run.refused(
        3,
        ["no config.json", "replaces model folders and packs only"],
        "convert",
        tiny_nf4,
        "--to",
        "bf16",
        "--overwrite",
    )


def test_weights_beyond_float16_are_refused(run: Run, tmp_path: Path, tiny_llama: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q_PROJ}.weight"][0, 0] = 1e5

    base = damaged(tiny_llama, tmp_path / "base", edit)
    run.refused(3, [f"{Q_PROJ}.weight", "torch.float16", "--dtype bf16 or fp32"], "convert", base, "--to", "fp16")


# Exit code 3: schemes and text


def test_group_size_that_does_not_divide_is_refused(
    run: Run, tiny_nf4: Path, tiny_adapter: Path, random_model: Callable[..., Path]
) -> None:
    words = ["group size 96 does not divide the 256 input features", "sizes that would: 128, 64, 32, -1"]
    run.refused(3, words, "merge", tiny_nf4, tiny_adapter, *RTN, "--group-size", "96")
    odd = random_model("llama", intermediate_size=200)
    words = ["no group size of 128, 64, 32 divides the 200 input features", "sizes that would: -1"]
    run.refused(3, words, "quantize", odd, "--to", "w4a16")
    run.refused(3, ["at least 8"], "quantize", odd, "--to", "w4a16", "--group-size", "4")


@pytest.mark.parametrize(("width", "expected"), [(256, 128), (192, 64), (96, 32)])
def test_automatic_group_size_is_the_largest_that_divides(
    run: Run, random_model: Callable[..., Path], width: int, expected: int
) -> None:
    model = random_model("llama", intermediate_size=width)
    result = run("quantize", model, "--to", "w4a16", "--algorithm", "rtn", "--no-validate")
    assert result.code == 0, result.err
    config = json.loads((run.out / "config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == expected


def test_overlapping_text_is_refused(
    run: Run, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    calibration, evaluation = small_texts(tmp_path_factory)
    mixed = tmp_path / "mixed.txt"
    mixed.write_text(calibration.read_text() + "\n\n" + evaluation.read_text()[500:900])
    arguments = ["merge", tiny_nf4, tiny_adapter, "--requant", "gptq", "--calibration", mixed]
    run.refused(3, ["calibration and evaluation share text"], *arguments)
    assert run(*arguments, "--no-validate").code == 0  # nothing is evaluated


def test_text_that_is_missing_or_too_short_is_refused(
    run: Run, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    inputs = ["merge", tiny_nf4, tiny_adapter, "--requant", "gptq"]
    run.refused(3, ["nowhere.txt", "no such file"], *inputs, "--calibration", "nowhere.txt")
    run.refused(3, ["unknown text source"], *inputs, "--calibration", "wikitext")
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    run.refused(3, ["4 rows of 64 tokens need 256 tokens"], *inputs, "--calibration", short)
    run.refused(3, ["8 rows of 64 tokens need 512 tokens"], "merge", tiny_nf4, tiny_adapter, "--eval-data", short)


# Exit code 2


def test_16_bit_base_needs_the_training_quantization(run: Run, tiny_llama: Path, tiny_adapter: Path) -> None:
    choices = ["--trained-on nf4-dq", "--trained-on nf4 ", "--trained-on fp4-dq | fp4", "--trained-on 16bit"]
    cost = ["does not record how training saw it", "KL 0.164 instead of 0.0016"]
    run.refused(2, [str(tiny_llama), str(tiny_adapter), *choices, *cost], "merge", tiny_llama, tiny_adapter)


def test_contradictions_about_training_are_refused(
    run: Run, tmp_path: Path, tiny_nf4: Path, tiny_llama: Path, tiny_adapter: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(tiny_adapter, adapter)
    write_train_record(adapter, "nf4", str(tiny_llama))
    words = [str(adapter), "--trained-on nf4-dq, but the adapter's own record says nf4"]
    run.refused(2, words, "merge", tiny_llama, adapter, "--trained-on", "nf4-dq")
    run.refused(3, ["trained on a base quantized as nf4", "stored as nf4-dq"], "merge", tiny_nf4, adapter)
    words = ["trained on a base quantized as fp4", "stored as nf4-dq"]
    run.refused(3, words, "merge", tiny_nf4, tiny_adapter, "--trained-on", "fp4")


USAGE: dict[str, tuple[list[str], list[str]]] = {
    "desc_act with awq": (["--requant", "awq", "--desc-act"], ["--desc-act belongs to --requant gptq"]),
    "desc_act with rtn": (["--requant", "gptq", "--algorithm", "rtn", "--desc-act"], ["gptq algorithm"]),
    "desc_act alone": (["--desc-act"], ["--desc-act: without --requant"]),
    "ignore alone": (
        ["--ignore", "*.o_proj", "--budget", "4.5bpw"],
        ["--ignore '*.o_proj', --budget 4.5bpw: without --requant the output is not quantized"],
    ),
    "override": (["--requant", "w4a16", "--override", "*.o_proj:bit=8"], ["'bit=8' is no setting"]),
    "head": (["--requant", "awq", "--lm-head"], ["readers of awq expect the output head in 16 bits"]),
    "bits alone": (["--bits", "4"], ["--bits 4: without --requant"]),
    "dtype": (["--dtype", "bf8"], ["bf8", "bf16", "fp16", "fp32"]),
    "target": (["--requant", "exl2"], ["exl2", "gptq", "awq", "w4a16", "fp8"]),
    "algorithm": (["--requant", "fp8", "--algorithm", "gptq"], ["fp8 takes --algorithm fp8, got gptq"]),
    "activations of int8": (["--requant", "int8", "--activations", "dynamic"], ["belongs to --requant fp8, got int8"]),
    "activations alone": (
        ["--activations", "static"],
        ["--activations static: without --requant"],
    ),
    "bits": (["--requant", "awq", "--bits", "8"], ["awq has --bits 4, got 8"]),
    "bits of another target": (["--requant", "w4a16", "--bits", "8"], ["--bits 4, got 8; w8a16 holds 8 bits"]),
    "group size of fp8": (["--requant", "fp8", "--group-size", "64"], ["fp8 has one scheme: no --group-size"]),
    "shard size": (["--max-shard-size", "big"], ["--max-shard-size: expected a size such as 5GB", "big"]),
    "memory": (["--requant", "awq", "--gpu-memory", "5XB"], ["--gpu-memory: expected a size such as 5GB"]),
    "tiny shards": (["--max-shard-size", "10k"], ["at least 1MB"]),
    "tokens": (["--eval-tokens", "8"], ["--eval-tokens >= --eval-seq-len"]),
    "limit": (["--max-kl", "-1"], ["kl_mean is never below 0"]),
    "effect": (["--min-effect", "1.5"], ["at most 1"]),
    "gate without validation": (
        ["--no-validate", "--max-kl", "0.1", "--eval-tokens", "512", "--tasks", "t"],
        ["--max-kl, --tasks, --eval-tokens: --no-validate leaves nothing to compare; drop them"],
    ),
    "calibration of plain weights": (["--samples", "8"], ["--samples: nothing is calibrated here (plain weights)"]),
    "calibration by default values": (
        ["--requant", "fp8", "--samples", "128", "--seq-len", "512"],
        ["--samples, --seq-len: nothing is calibrated here (fp8 by fp8); drop them"],
    ),
    "calibration of several": (
        ["--requant", "w4a16", "--requant", "nf4", "--algorithm", "rtn", "--calibration", "default"],
        ["--calibration: nothing is calibrated here (w4a16 by rtn, nf4 by "],
    ),
    "memory without calibration": (
        ["--requant", "fp8", "--gpu-memory", "5GB"],
        ["--gpu-memory: it is for calibrating"],
    ),
    "memory of no GPU": (["--requant", "awq", "--gpu-memory", "5GB"], ["--gpu-memory: it limits", "--device is cpu"]),
    "length of no answers": (["--new-tokens", "8"], ["--new-tokens is of answers to --prompts"]),
    "limit of no tasks": (["--task-limit", "8"], ["--task-limit is of the samples of --tasks"]),
    "damping": (["--requant", "gptq", "--damping", "2"], ["between 0 and 1"]),
    "damping alone": (["--damping", "0.03"], ["--damping 0.03: without --requant"]),
    "damping of awq": (["--requant", "awq", "--damping", "0.03"], ["take --algorithm awq+gptq or gptq"]),
    "damping of fp8": (["--requant", "fp8", "--damping", "0.05"], ["fp8 by fp8 does not use it; drop it"]),
    "damping of rtn": (
        ["--requant", "w4a16", "--algorithm", "rtn", "--damping", "0.05"],
        ["w4a16 by rtn does not use it"],
    ),
    "device": (["--device", "tpu"], ["tpu", "cpu", "cuda", "auto"]),
    "option": (["--no-such-option"], ["--no-such-option"]),
}


@pytest.mark.parametrize("case", USAGE)
def test_impossible_requests_are_refused(run: Run, tiny_nf4: Path, tiny_adapter: Path, case: str) -> None:
    options, words = USAGE[case]
    run.refused(2, words, "merge", tiny_nf4, tiny_adapter, *options)


def test_memory_of_a_gpu_is_named_where_auto_finds_none(run: Run, tiny_nf4: Path) -> None:
    arguments = ["quantize", str(tiny_nf4), "--to", "gptq", "--no-validate", "--gpu-memory", "5GB", *run.calibration]
    result = run.exactly(*arguments, "-o", str(run.out))
    assert result.code == 0
    assert "note: --gpu-memory limits what is taken of a GPU, and this runs on the CPU" in result.err


def test_cuda_without_a_gpu_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["no CUDA device", "--device cpu"]
    run.refused(2, words, "merge", tiny_nf4, tiny_adapter, "--device", "cuda")


def test_effect_gate_without_an_adapter_is_refused_before_work(
    run: Run, monkeypatch: pytest.MonkeyPatch, tiny_nf4: Path
) -> None:
    monkeypatch.setattr("qconv.pipeline.write_tensors", lambda *_: pytest.fail("work began"))
    words = ["adapter_effect_retained needs an adapter"]
    run.refused(2, words, "quantize", tiny_nf4, "--to", "fp8", "--min-effect", "0.9")


def test_unwritable_report_is_refused_before_work(
    run: Run, monkeypatch: pytest.MonkeyPatch, tiny_nf4: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("qconv.judging.measure_fidelity", lambda *_: pytest.fail("work began"))
    (tmp_path / "file").write_text("")
    arguments = ["--reference", tiny_nf4, "--candidate", tiny_nf4, "--report", tmp_path / "file"]
    run.refused(3, [str(tmp_path / "file")], "validate", *arguments)


# Exit codes 1 and 130, --debug, -q, --help


def test_what_nobody_foresaw(run: Run, monkeypatch: pytest.MonkeyPatch, tiny_nf4: Path, tiny_adapter: Path) -> None:
    """A library that fails in the middle of the work: exit 1, one message, nothing left behind."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail] not enough memory")

    monkeypatch.setattr("qconv.merge.merged.MergedCheckpoint.read", fail)
    result = run("merge", tiny_nf4, tiny_adapter)
    assert (result.code, result.out) == (1, "")
    assert "\nunexpected RuntimeError: [enforce fail] not enough memory\n" in result.err
    assert "Traceback" not in result.err
    assert list(run.out.parent.iterdir()) == []
    assert "Traceback" in run("merge", tiny_nf4, tiny_adapter, "--debug").err


def test_debug_shows_where(run: Run, tmp_path: Path, tiny_nf4: Path) -> None:
    result = run("merge", tiny_nf4, tmp_path / "gone", "--debug")
    assert result.code == 3
    assert "Traceback (most recent call last)" in result.err
    assert "in resolve_folder" in result.err
    assert result.err.rstrip().splitlines()[-1].startswith("error: ")


@contextlib.contextmanager
def started(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "qconv", *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("imported", ["qconv.own_process", "click", "qconv.config", "qconv.doctor"])
def test_interrupt_while_something_is_imported(imported: str) -> None:
    script = """
import os, signal, sys
wanted, sys.argv[1:] = sys.argv[1], ["doctor"]
class Finder:
    def find_spec(self, name, *_):
        if name == wanted:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from qconv.__main__ import run
run()
"""
    done = subprocess.run([sys.executable, "-c", script, imported], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted: nothing was left behind\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_nothing(tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path, number: signal.Signals) -> None:
    out = tmp_path / "work" / "out"
    out.parent.mkdir()
    with started("merge", tiny_nf4, tiny_adapter, "--requant", "gptq", "--device", "cpu", "-o", out) as process:
        deadline = time.monotonic() + 300  # on a busy machine imports alone take a minute
        while not out.with_name("out.partial").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert stderr.splitlines()[-1] == "interrupted: nothing was left behind"
    assert "Traceback" not in stderr
    assert list(out.parent.iterdir()) == []


def test_quiet_run_prints_its_summary_and_nothing_else(
    run: Run, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    out = tmp_path / "work" / "out"
    options = [*run.evaluation, *run.calibration, "--requant", "awq", "--device", "cpu", "-o", out, "-q"]
    with started("merge", tiny_nf4, tiny_adapter, *options) as process:
        stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stderr) == (0, "")
    assert stdout.startswith(f"output      {out}\nverdict     PASS")
    assert open_checkpoint(out).config["quantization_config"]["quant_method"] == "awq"


def test_refusal_of_a_real_process(tmp_path: Path, tiny_nf4: Path) -> None:
    with started("merge", tiny_nf4, tmp_path / "gone", "-o", tmp_path / "out") as process:
        stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (3, "")
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_imports_no_heavy_library() -> None:
    script = (
        "import sys, contextlib, io\n"
        "from qconv.cli import main, cli\n"
        "for command in ('', *cli.commands):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        main([*command.split(), '--help'])\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'safetensors', 'peft', 'bitsandbytes'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_version_and_help(run: Run) -> None:
    result = run.exactly("--version")
    assert (result.code, result.err) == (0, "")
    assert qconv.__version__ in result.out
    result = run.exactly("--help")
    assert result.code == 0
    for line in ("0 done", "2 usage", "3 bad input", "4 gate failed", "5 gate inconclusive", "130 interrupted"):
        assert line in result.out
    assert all(command in result.out for command in SURFACE)


# inspect, convert, validate


@pytest.mark.parametrize("variant", LAYOUTS, ids=str)
def test_cards_name_vllm_where_it_loads_the_folder(output: Callable[..., Path], variant: Variant) -> None:
    """It refuses asymmetric GPTQ, other widths than 4 and 8, and a stored index (measured, docs/targets.md)."""
    is_gptq = variant.target.startswith("gptq")
    is_refused = is_gptq and (not variant.symmetric or variant.bits not in (4, 8) or variant.desc_act)
    card = (output(variant) / "README.md").read_text()
    assert ("vllm serve ./this-folder" in card) != is_refused
    assert "AutoModelForCausalLM.from_pretrained" in card


@pytest.mark.parametrize("variant", LAYOUTS, ids=str)
def test_inspect_tells_what_an_output_is(run: Run, output: Any, variant: Variant) -> None:
    folder = output(variant)
    facts = json.loads(run("inspect", folder, "--json").out)
    formats = {target.name: target.format for target in TARGETS.values()}
    assert (facts["kind"], facts["storage"]) == ("model", formats[variant.target])
    kind = "float8, group size -1" if variant.target == "fp8" else f"int{variant.bits}, group size 128"
    assert facts["scheme"].startswith(kind)
    if variant.target in ("gptq", "gptq_v2", "w4a16", "w8a16"):
        assert facts["scheme"].endswith(", symmetric" if variant.symmetric else ", asymmetric")
    tensors = stored_tensors(folder)
    assert facts["quantized linears"] == NUM_LINEARS
    assert (facts["tensors"], facts["shards"]) == (len(tensors), 1)
    assert facts["bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
    text = run("inspect", folder).out
    assert [line.split("  ")[0] for line in text.splitlines()] == list(facts)
    assert formats[variant.target] in text


def test_inspect_of_inputs(run: Run, tmp_path: Path, tiny_nf4: Path, tiny_llama: Path, tiny_adapter: Path) -> None:
    facts = json.loads(run("inspect", tiny_nf4, "--json").out)
    assert (facts["kind"], facts["storage"], facts["quantized linears"]) == ("model", "bnb-nf4-dq", NUM_LINEARS)
    assert facts["architecture"] == "LlamaForCausalLM"
    plain = json.loads(run("inspect", tiny_llama, "--json").out)
    assert (plain["storage"], plain["quantized linears"], plain["dtypes"]) == ("plain", 0, "bfloat16 x 38")
    num_parameters = sum(t.numel() for t in load_file(tiny_llama / "model.safetensors").values())
    assert facts["parameters"] == plain["parameters"] == num_parameters
    assert f"{num_parameters}" in run("inspect", tiny_nf4).out
    facts = json.loads(run("inspect", tiny_adapter, "--json").out)
    assert (facts["kind"], facts["peft_type"], facts["r"], facts["lora_alpha"]) == ("adapter", "LORA", 8, 16)
    assert (facts["tensors"], facts["base"]) == (2 * NUM_LINEARS, str(tiny_nf4))
    assert facts["trained on"].startswith("not recorded")
    adapter = tmp_path / "adapter"
    shutil.copytree(tiny_adapter, adapter)
    write_train_record(adapter, "nf4", "x")
    assert json.loads(run("inspect", adapter, "--json").out)["trained on"] == "nf4"
    assert "LORA" in run("inspect", adapter).out
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert json.loads(run("inspect", adapter, "--json").out)["merge"] == "as an update of each weight"
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"alora_invocation_tokens": [5]}))
    assert json.loads(run("inspect", adapter, "--json").out)["merge"].startswith("refused: ")


def test_convert_of_a_4_bit_base_equals_bitsandbytes(run: Run, tiny_nf4: Path) -> None:
    result = run("convert", tiny_nf4, "--to", "bf16")
    assert (result.code, result.out) == (0, f"output      {run.out}\n")
    assert stages_of(result.err) == ["writing"]
    expected = bitsandbytes_weights(tiny_nf4)
    found = stored_tensors(run.out)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name
    assert "quantization_config" not in json.loads((run.out / "config.json").read_text())
    assert (run.out / "tokenizer.json").read_bytes() == (tiny_nf4 / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("variant", LAYOUTS, ids=str)
def test_convert_rounds_the_dequantized_weights_once(run: Run, output: Any, variant: Variant) -> None:
    folder = output(variant)
    assert run("convert", folder, "--to", "bf16").code == 0
    view = dequantize(open_checkpoint(folder))
    found = stored_tensors(run.out)
    assert found.keys() == view.specs().keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, view.read(name).to(torch.bfloat16)), name
    facts = json.loads(run("inspect", run.out, "--json").out)
    assert (facts["storage"], facts["quantized linears"]) == ("plain", 0)
    assert not (run.out / "quantize_config.json").exists()


def test_validate_repeats_what_the_merge_reported(
    run: Run, output: Any, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    folder = output(Variant("w4a16", "rtn", 4, True))
    merged = report_of(folder)
    models = ["--reference", tiny_nf4, "--adapter", tiny_adapter, "--candidate", folder]
    models += ["--no-default-gates", "--control-tokens", str(EVAL_TOKENS)]
    result = run("validate", *models, "--report", tmp_path / "deep" / "report")
    assert (result.code, result.err) == (0, "")
    report = report_of(tmp_path / "deep" / "report")
    assert report["fidelity"] == merged["fidelity"]
    assert (report["verdict"], report["subject"]["candidate"]) == ("not gated", str(folder))
    markdown = (tmp_path / "deep" / "report" / "qconv-report.md").read_text()
    assert f"{report['fidelity']['total']['kl']['mean']:.3g}" in markdown
    result = run("validate", *models, "--max-kl", "1e-6")
    assert result.code == 4
    assert "kl_mean <= 1e-06" in result.out
    assert result.err == "error: a gate failed: see the summary; --report DIR writes all that was measured\n"
    result = run("validate", *models, "--max-kl", repr(merged["fidelity"]["total"]["kl"]["mean"]))
    assert result.code == 5
    assert "how many tokens" in result.err


def test_validate_refuses_another_model(run: Run, tiny_nf4: Path, random_model: Callable[..., Path]) -> None:
    other = random_model("llama")
    words = [str(other), "num_hidden_layers 2", "has 4"]
    run.refused(3, words, "validate", "--reference", tiny_nf4, "--candidate", other)


def test_validate_refuses_another_vocabulary(
    run: Run, tmp_path: Path, tiny_nf4: Path, random_model: Callable[..., Path]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(random_model("llama", num_hidden_layers=4, vocab_size=3000), other)
    words = [str(other), "3000", "2048"]
    run.refused(3, words, "validate", "--reference", tiny_nf4, "--candidate", other)


def test_base_from_another_architecture_is_refused(
    run: Run, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_nf4, base)
    set_config(base, model_type="nonesuch")
    run.refused(3, [str(base), "nonesuch"], "merge", base, tiny_adapter, *RTN)


# The surface


OUTPUT = {"-o", "--out", "--overwrite", "--max-shard-size", "--revision"}
RUN = {"-q", "--quiet", "-v", "--verbose", "--debug", "--device", "--profile", "--log-json"}
QUANTIZE = {
    "--algorithm",
    "--bits",
    "--group-size",
    "--sym",
    "--asym",
    "--desc-act",
    "--activations",
    "--ignore",
    "--override",
    "--budget",
    "--budget-bits",
    "--imatrix",
    "--kv-cache",
    "--lm-head",
    "--damping",
    "--calibration",
    "--samples",
    "--seq-len",
    "--gpu-memory",
    "--seed",
}
VALIDATE = {"--eval-data", "--eval-tokens", "--eval-seq-len", "--max-kl", "--min-effect", "--gate", "--policy"}
VALIDATE |= {"--no-default-gates", "--control-tokens", "--attribution", "--prompts", "--new-tokens", "--report"}
VALIDATE |= {"--tasks", "--task-folder", "--task-limit"}
PUSH = {"--push-to-hub", "--public", "--push-rejected"}
TRAIN = {
    "--alpha",
    "--batch-size",
    "--dropout",
    "--gradient-accumulation",
    "--learning-rate",
    "--quantize",
    "--rank",
    "--schedule",
    "--seed",
    "--seq-len",
    "--steps",
}
READING = {"--rank", "--rank-scaling", "--qa-lora", "--ir-qlora"}
ADAPTER = READING | {"--dampen-intruders", "--kasa"}
SURFACE: dict[str, tuple[list[str], set[str]]] = {
    "merge": (
        ["base", "adapters"],
        {"--tp", "--combine", "--weights", "--combine-rank", "--combine-factors", "--density", "--majority-sign"}
        | {"--requant", "--to", "--trained-on", "--no-validate", "--dtype", "--task-data"}
        | ADAPTER
        | OUTPUT
        | QUANTIZE
        | VALIDATE
        | PUSH
        | RUN
        | {"--json", "--dry-run"},
    ),
    "quantize": (
        ["model"],
        {"--tp", "--to", "--requant", "--no-validate", "--dtype"}
        | OUTPUT
        | QUANTIZE
        | VALIDATE
        | RUN
        | PUSH
        | {"--json", "--dry-run"},
    ),
    "convert": (["source"], {"--to", "--base", "--dtype", "--json", "--dry-run"} | READING | OUTPUT | PUSH | RUN),
    "extract": (
        ["base", "tuned"],
        {"--rank", "--energy", "--others", "--json"} | (OUTPUT - {"--max-shard-size"}) | RUN,
    ),
    "validate": (
        [],
        {"--reference", "--adapter", "--candidate", "--candidate-adapter", "--reference-cache", "--engine"}
        | {"--trained-on", "--seed", "--json", "--dry-run"}
        | ADAPTER
        | VALIDATE
        | RUN,
    ),
    "report": (["reports"], {"--format", "-o", "--out", "--debug"}),
    "train": (["base", "data"], TRAIN | (OUTPUT - {"--max-shard-size"}) | RUN | {"--json", "--dry-run"}),
    "pack": (
        ["model"],
        {"--for", "-o", "--out", "--adapter", "--tp", "--context", "--concurrency", "--kv-dtype", "--gpu-memory"}
        | {"--name", "--port", "--model-path", "--answers", "--no-answers", "--prompts", "--overwrite", "--json"}
        | RUN,
    ),
    "inspect": (["path"], {"--json", "--debug", "--spectral", "--plot", "--base", "--trained-on", "--device"}),
    "demo": ([], {"-o", "--out", "--requant", "--steps"} | RUN),
    "run": (["recipe"], {"--set", "--check", "--json", "--dry-run"} | RUN),
    "schema": ([], set()),
    "doctor": ([], {"--json", "--debug"}),
    "completion": (["shell"], set()),
}


def test_surface_of_the_command_line() -> None:
    """A name that changes here breaks somebody's script: change it on purpose, and say so in the changelog."""
    found = {}
    for name, command in cli.commands.items():
        arguments = [p.name for p in command.params if isinstance(p, click.Argument)]
        options = [p for p in command.params if isinstance(p, click.Option)]
        found[name] = (arguments, {o for p in options for o in (*p.opts, *p.secondary_opts)})
    assert found == SURFACE


def test_every_option_is_explained_and_every_command_has_an_example() -> None:
    """The examples are command lines that click takes."""
    for name, command in {"": cli, **cli.commands}.items():
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, (name, parameter.name)
                assert not parameter.help.startswith("["), (name, parameter.name)  # more than its default
        examples = re.findall(r"^\s*(?:eval \"\$\()?(qconv .*)", command.help or "", re.MULTILINE)
        assert examples, name
        for example in examples:
            words = shlex.split(re.split(r"\)\"|[>#]\s| {3,}", example)[0])
            found, other, arguments = cli.resolve_command(click.Context(cli), words[1:])
            assert other is not None, example
            assert name in ("", found), example
            other.make_context(found, arguments, parent=click.Context(cli))  # raises where it does not parse


def test_embedded_texts_are_disjoint() -> None:
    """What a user gets without naming any text must pass qconv's own check."""
    corpus.check_disjoint(corpus.load_documents("default"), corpus.load_documents("default-eval"))
