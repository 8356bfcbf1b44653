"""What a machine gets from the command line, and what a person gets who mistypes or does not know what comes next.

Streams are looked at in real processes where it matters that nothing else is in them.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pty
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from qconv import errors
from qconv.cli import cli
from qconv.cli_parsing import completion_script
from qconv.gate_rules import METRICS, TASK_PATTERN, parse_rule
from qconv.progress import Progress, as_json_lines, log_line, quiet_libraries
from qconv.suggest import did_you_mean, did_you_mean_path, nearest
from qconv.targets import TARGETS
from tests.cli_cases import EVAL_TOKENS, SEQ_LEN, report_of, small_texts

RTN = ["--requant", "w4a16", "--algorithm", "rtn"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    texts = small_texts(tmp_path_factory)
    return ["--eval-data", str(texts[1]), "--eval-tokens", str(EVAL_TOKENS), "--eval-seq-len", str(SEQ_LEN)]


def process(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qconv", *map(str, arguments)]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120)


def only_document(text: str) -> dict[str, Any]:
    """stdout as one JSON object in strict JSON: `json.loads` takes neither nothing nor a second one."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    document: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return document


# --json


def test_json_of_a_merge_is_its_report(tmp_path: Path, small: list[str], tiny_nf4: Path, tiny_adapter: Path) -> None:
    out = tmp_path / "out"
    done = process("merge", tiny_nf4, tiny_adapter, *RTN, *small, "--device", "cpu", "-o", out, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = only_document(done.stdout)
    assert document == report_of(out) | {"folder": str(out), "exit_code": 0}


def test_json_of_a_missed_gate(tmp_path: Path, small: list[str], tiny_nf4: Path, tiny_adapter: Path) -> None:
    out = tmp_path / "out"
    gate = ["--max-kl", "1e-7", "--attribution", "never"]
    done = process("merge", tiny_nf4, tiny_adapter, *RTN, *small, *gate, "--device", "cpu", "-o", out, "--json")
    assert (done.returncode, done.stderr) == (4, "error: a gate failed: see the report\n")
    document = only_document(done.stdout)
    rejected = out.with_name("out.rejected")
    assert document == report_of(rejected) | {"folder": str(rejected), "exit_code": 4}
    assert document["verdict"] == "fail"


def test_json_of_validate_convert_and_train(
    tmp_path: Path, small: list[str], tiny_nf4: Path, tiny_adapter: Path
) -> None:
    runner = CliRunner()
    models = ["--reference", str(tiny_nf4), "--adapter", str(tiny_adapter), "--candidate", str(tiny_nf4)]
    gates = ["--no-default-gates", "--attribution", "never", "--report", str(tmp_path / "report"), "--device", "cpu"]
    result = runner.invoke(cli, ["validate", *models, *small, *gates, "--json"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert only_document(result.stdout) == report_of(tmp_path / "report") | {"folder": None, "exit_code": 0}
    result = runner.invoke(
        cli, ["convert", str(tiny_nf4), "--to", "bf16", "-o", str(tmp_path / "plain"), "--device", "cpu", "--json"]
    )
    assert (result.exit_code, result.stderr) == (0, "")
    document = only_document(result.stdout)
    assert (document["command"], document["folder"]) == ("convert", str(tmp_path / "plain"))
    text = tmp_path / "text.txt"
    text.write_text("One day a small model learned to say what it was told. " * 40)
    pytest.importorskip("peft")
    out = tmp_path / "adapter"
    short = ["--steps", "2", "--batch-size", "1", "--seq-len", "16", "--rank", "2", "--device", "cpu"]
    result = runner.invoke(cli, ["train", str(tiny_nf4), str(text), *short, "-o", str(out), "--json"])
    assert result.exit_code == 0, result.output
    document = only_document(result.stdout)
    assert (document["folder"], document["steps"], document["trained_on"]) == (str(out), 2, "nf4-dq")
    assert document["tokens"] == 2 * 16
    assert (out / "adapter_config.json").exists()


REFUSALS: dict[str, tuple[list[str], str, int, str]] = {
    "no such folder": (["merge", "GONE", "GONE", "-o", "OUT"], "CheckpointError", 3, "no such folder"),
    "contradiction": (["validate", "--candidate", "GONE"], "UsageError", 2, "--reference is missing"),
    "missing option": (["quantize", "GONE", "-o", "OUT"], "UsageError", 2, "--to"),
    "unknown option": (["convert", "GONE", "--too", "bf16"], "UsageError", 2, "did you mean --to?"),
    "unknown command": (["mrge"], "UsageError", 2, "did you mean merge?"),
    "inspect": (["inspect", "GONE"], "CheckpointError", 3, "no such folder"),
    "train": (["train", "GONE", "-o", "OUT", "--rank", "0"], "UsageError", 2, "--rank must be positive"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_json_of_a_refusal(capsys: pytest.CaptureFixture[str], tmp_path: Path, case: str) -> None:
    from qconv.cli import main

    arguments, kind, code, words = REFUSALS[case]
    paths = {"GONE": str(tmp_path / "gone"), "OUT": str(tmp_path / "out")}
    with pytest.raises(SystemExit) as stop:
        main([*(paths.get(word, word) for word in arguments), "--json"])
    captured = capsys.readouterr()
    assert stop.value.code == code
    error = only_document(captured.out)["error"]
    assert error.keys() == {"kind", "message", "exit_code"}
    assert (error["kind"], error["exit_code"]) == (kind, code)
    assert words in error["message"]
    assert words in captured.err  # people who read the log are told too
    assert list(tmp_path.iterdir()) == []


def test_what_a_library_prints_stays_out_of_the_document(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_nf4: Path
) -> None:
    from qconv import pipeline

    run = pipeline.run

    def noisy(*arguments: Any) -> Any:
        print("hello from a library")
        return run(*arguments)

    monkeypatch.setattr(pipeline, "run", noisy)
    arguments = ["convert", str(tiny_nf4), "--to", "bf16", "--device", "cpu", "-o", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(cli, arguments)
    assert only_document(result.stdout)["command"] == "convert"
    assert "hello from a library" in result.stderr


def test_unforeseen_error_and_interrupt_in_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from qconv.cli import main

    for raised, kind, code in ((RuntimeError("broken"), "RuntimeError", 1), (KeyboardInterrupt(), "Interrupted", 130)):
        monkeypatch.setattr("qconv.pipeline.run", lambda *_, raised=raised: (_ for _ in ()).throw(raised))
        with pytest.raises(SystemExit) as stop:
            main(["convert", str(tmp_path), "--to", "bf16", "-o", str(tmp_path / "out"), "--json"])
        error = only_document(capsys.readouterr().out)["error"]
        assert (stop.value.code, error["kind"], error["exit_code"]) == (code, kind, code)


# --log-json


def lines_of(text: str) -> list[dict[str, Any]]:
    """Lines of JSON, each with a time in UTC and a level."""
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        assert datetime.datetime.fromisoformat(line["time"]).utcoffset() == datetime.timedelta(0)
        assert line["level"] in ("debug", "info", "error")
        assert ("message" in line) != ("event" in line)
    return lines


def test_log_json_of_a_merge(tmp_path: Path, small: list[str], tiny_nf4: Path, tiny_adapter: Path) -> None:
    gate = ["--max-kl", "1e-7", "--attribution", "never", "--device", "cpu", "-o", tmp_path / "out"]
    done = process("merge", tiny_nf4, tiny_adapter, *RTN, *small, *gate, "--log-json", "--json")
    assert done.returncode == 4
    assert only_document(done.stdout)["exit_code"] == 4  # --json silences the words of progress, not the lines
    lines = lines_of(done.stderr)
    said = [line["message"].split()[0] for line in lines if line["level"] == "info" and "message" in line]
    assert said[0] == "merging"
    assert {"merging", "writing", "validating"} <= set(said)
    begun = [line["label"] for line in lines if line.get("event") == "begin"]
    ended = [line["label"] for line in lines if line.get("event") == "end"]
    assert begun
    assert sorted(begun) == sorted(ended)
    last = lines[-1]
    assert (last["level"], last["kind"], last["exit_code"]) == ("error", "GateError", 4)
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)


def test_log_json_takes_in_everything_on_stderr(tmp_path: Path) -> None:
    """A usage error, a traceback, a table: what is written for people comes out in lines too."""
    done = process("convert", tmp_path / "gone", "--to", "bf16", "-o", tmp_path / "out", "--log-json", "--debug")
    assert (done.returncode, done.stdout) == (3, "")
    lines = lines_of(done.stderr)
    assert any("Traceback" in line["message"] for line in lines)
    assert lines[-1]["kind"] == "CheckpointError"
    done = process("convert", "--log-json")
    assert done.returncode == 2
    assert [line["kind"] for line in lines_of(done.stderr)] == ["UsageError"]


def test_progress_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(verbosity=2, as_json=True)
    assert list(progress.track(["a", "b"], "blocks")) == ["a", "b"]
    progress.say('half "done"')
    progress.detail("ein Gewicht ändert sich")
    lines = lines_of(capsys.readouterr().err)
    assert [{k: v for k, v in line.items() if k != "time"} for line in lines] == [
        {"level": "info", "event": "begin", "label": "blocks", "total": 2},
        {"level": "info", "event": "end", "label": "blocks", "count": 2},
        {"level": "info", "message": 'half "done"'},
        {"level": "debug", "message": "ein Gewicht ändert sich"},
    ]
    quiet = Progress(verbosity=0, as_json=True)
    assert list(quiet.track(iter("ab"), "blocks")) == ["a", "b"]
    quiet.say("nothing")
    Progress(verbosity=1, as_json=True).detail("nothing")
    assert capsys.readouterr().err == ""


def test_bars_of_libraries_are_not_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from tqdm import tqdm
    from tqdm.auto import tqdm as automatic
    from transformers.utils import logging

    def bars() -> str:
        for bar in (tqdm, automatic, logging.tqdm):
            list(bar(range(3), disable=False))
        return capsys.readouterr().err

    monkeypatch.setattr(sys, "stderr", Terminal(sys.stderr))
    with quiet_libraries():
        assert bars() == ""
        list(Progress(verbosity=1).track(range(3), "ours"))
        assert "ours" in capsys.readouterr().err
    assert bars() != ""


def test_foreign_lines_become_lines_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stderr
    with as_json_lines():
        print("begun, ", end="", file=sys.stderr)
        print("and ended\n\nbar  1%\rbar 99%", file=sys.stderr)
        sys.stderr.write(log_line("debug", message="ours"))
        assert not sys.stderr.isatty()
        print("never ended", end="", file=sys.stderr)
    assert sys.stderr is before
    lines = lines_of(capsys.readouterr().err)
    assert [line["message"] for line in lines] == ["begun, and ended", "bar 99%", "ours", "never ended"]
    assert [line["level"] for line in lines] == ["info", "info", "debug", "info"]


# What was meant


def test_mistyped_words_are_answered_with_the_nearest() -> None:
    cases = {
        "mrge ./a ./b": "did you mean merge?",
        "compeltion bash": "did you mean completion?",
        "merge a b --requnat awq": "did you mean --requant?",
        "train a --learning-rat 1": "did you mean --learning-rate?",
        "convert a --requant awq": "it is an option of merge, quantize, demo",
        "merge a b --requant aqw": "did you mean awq?",
        "merge a b --to onx": "did you mean onnx?",
        "quantize a --to W4A61": "did you mean w4a16 or w4a8?",
        "convert a --to bf61": "did you mean bf16?",
        "merge a b --trained-on nf4dq": "did you mean nf4-dq or nf4?",
        "completion bahs": "did you mean bash?",
    }
    for command, hint in cases.items():
        result = CliRunner().invoke(cli, shlex.split(command))
        assert result.exit_code == 2, command
        assert result.output.rstrip().endswith(hint), result.output


def test_words_that_resemble_nothing_get_no_hint() -> None:
    for command in ("merge a b --requant exl2", "convert a --to q", "merge a b --zzz"):
        assert "did you mean" not in CliRunner().invoke(cli, shlex.split(command)).output
    output = CliRunner().invoke(cli, ["xyzzy"]).output
    assert "did you mean" not in output
    assert all(name in output for name in cli.commands)


def test_mistyped_metric_is_answered_with_the_nearest() -> None:
    with pytest.raises(errors.UsageError, match=r"did you mean .*kl_mean.*\?$"):
        parse_rule("kl_maen<=0.1")


def test_hints_do_not_depend_on_the_order_of_the_names() -> None:
    names = ["kl_mean", "kl_max", "kl_min", "KL_MEAN2", "top1"]
    assert nearest("kl_maen", names) == nearest("kl_maen", names[::-1])
    assert nearest("kl_maen", names)[0] == "kl_mean"
    assert nearest("--Kl-mean", ["--kl-mean"]) == ["--kl-mean"]
    assert did_you_mean("quiet", ["--requant"]) == ""


def test_missing_paths_are_answered_with_what_lies_beside_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "base-nf4" / "deep").mkdir(parents=True)
    (tmp_path / "adapter").mkdir()
    (tmp_path / ".base-nf5").mkdir()
    assert did_you_mean_path(tmp_path / "base-nf") == f"; did you mean {tmp_path / 'base-nf4'}?"
    assert did_you_mean_path(tmp_path / "bse-nf4" / "deep") == f"; did you mean {tmp_path / 'base-nf4' / 'deep'}?"
    assert did_you_mean_path(tmp_path / "bse-nf4" / "shallow") == ""  # there is none in base-nf4 either
    assert did_you_mean_path(tmp_path / "gone") == ""
    assert did_you_mean_path(tmp_path / "adapter") == ""
    monkeypatch.chdir(tmp_path)
    assert did_you_mean_path(Path("adaptor")) == "; did you mean adapter?"  # as it was typed: relative


# Completion


@contextlib.contextmanager
def completing(shell: str, line: str) -> Iterator[list[str]]:
    """What the script of ``shell`` is told for the end of ``line``: by a process, as the shell asks."""
    words = shlex.split(line)
    if line.endswith(" "):
        words.append("")
    variables = {"_QCONV_COMPLETE": f"{shell}_complete", "COMP_WORDS": shlex.join(words[:-1]) + " " + words[-1]}
    variables["COMP_CWORD"] = words[-1] if shell == "fish" else str(len(words) - 1)
    done = process(**variables)
    assert (done.returncode, done.stderr) == (0, "")
    yield done.stdout.splitlines()


def test_completion_of_targets_metrics_and_folders() -> None:
    with completing("bash", "qconv merge a b --requant ") as lines:
        assert lines == [f"plain,{target}" for target in TARGETS]
    with completing("bash", "qconv co") as lines:
        assert lines == ["plain,completion", "plain,convert"]
    with completing("bash", "qconv merge ./ba") as lines:
        assert lines == ["dir,./ba"]
    with completing("bash", "qconv train base te") as lines:
        assert lines == ["file,te"]
    with completing("bash", "qconv validate --gate kl_m") as lines:
        expected = [name + metric.operator for name, metric in METRICS.items() if name.startswith("kl_m")]
        assert lines == [f"plain,{rule}" for rule in expected]
        assert expected
    with completing("fish", "qconv convert a --to b") as lines:
        assert lines == ["plain,bf16"]


def test_every_completed_gate_is_a_rule_once_it_has_its_limit() -> None:
    parameter = next(p for p in cli.commands["validate"].params if p.name == "gates")
    items = parameter.shell_complete(click.Context(cli.commands["validate"]), "")
    assert len(items) == len(METRICS) - (TASK_PATTERN in METRICS)
    for item in items:
        assert str(parse_rule(f"{item.value}1")).startswith(item.value[:-2])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    result = CliRunner().invoke(cli, ["completion", shell])
    assert result.exit_code == 0
    assert f"_QCONV_COMPLETE={shell}_complete" in result.stdout
    assert result.stdout.rstrip("\n") == completion_script(cli, shell).rstrip("\n")
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=result.stdout, text=True, check=True)  # parsed, not run


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_with_the_script(tmp_path: Path) -> None:
    """Sourced in a real bash, with `qconv` on its path, the function fills COMPREPLY."""
    command = tmp_path / "qconv"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qconv "$@"\n')
    command.chmod(0o755)
    script = (
        f'PATH="{tmp_path}:$PATH"; eval "$(qconv completion bash)"\n'
        "COMP_WORDS=(qconv quantize m --to w4a1); COMP_CWORD=4\n"
        '_qconv_completion qconv w4a1 --to; echo "${COMPREPLY[@]}"; complete -p qconv\n'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    reply, registered = done.stdout.splitlines()
    assert reply == "w4a16"
    assert registered.endswith("-F _qconv_completion qconv")


def test_completion_imports_no_torch() -> None:
    script = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules))))\n"
        "from qconv.cli import main\n"
        "main()\n"
    )
    variables = {"_QCONV_COMPLETE": "bash_complete", "COMP_WORDS": "qconv merge a b --requant ", "COMP_CWORD": "5"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | variables, check=True
    )
    assert done.stdout.splitlines() == [*(f"plain,{target}" for target in TARGETS), "[]"]


# What comes next


def at_a_terminal(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a process whose stderr is a terminal."""
    primary, secondary = pty.openpty()
    command = [sys.executable, "-m", "qconv", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=secondary, text=True) as started:
        os.close(secondary)
        said = b""
        with contextlib.suppress(OSError):  # Linux ends a terminal with EIO
            while piece := os.read(primary, 1 << 16):
                said += piece
        os.close(primary)
        assert started.stdout is not None
        return started.wait(timeout=120), started.stdout.read(), said.decode()


def test_hint_at_a_terminal_is_a_command_that_works(tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path) -> None:
    out = tmp_path / "out of it"
    arguments = ["merge", tiny_nf4, tiny_adapter, *RTN, "--no-validate", "--device", "cpu", "-o", out]
    code, stdout, stderr = at_a_terminal(*arguments)
    assert (code, stdout) == (0, f"output      {out}\n")
    hints = [line.removeprefix("next").strip() for line in stderr.splitlines() if line.startswith("next ")]
    assert hints == [
        shlex.join(
            ["qconv", "validate", "--reference", str(tiny_nf4), "--adapter", str(tiny_adapter), "--candidate", str(out)]
        ),
        shlex.join(["vllm", "serve", str(out)]),
    ]
    cli.commands["validate"].make_context("validate", shlex.split(hints[0])[2:])
    code, stdout, stderr = at_a_terminal(*arguments, "--overwrite", "--quiet")
    assert (code, stdout, stderr) == (0, f"output      {out}\n", "")


class Terminal:
    """A stream that says it is one."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return True


def test_hints_after_training_and_caching(tmp_path: Path) -> None:
    from qconv.cli_jobs import following_a_merge, following_a_training, following_a_validation
    from qconv.config import MergeJob, OutputConfig, ValidateJob
    from qconv.quantization_config import QuantizationConfig
    from qconv.training_config import TrainConfig

    (line,) = following_a_training(TrainConfig(base="./my base", out=tmp_path / "adapter"))
    context = cli.commands["merge"].make_context("merge", shlex.split(line)[2:])
    assert (context.params["base"], context.params["adapters"]) == ("./my base", (str(tmp_path / "adapter"),))
    cache = tmp_path / "ref.qcache"
    (line,) = following_a_validation(ValidateJob(reference="base", candidate=None, reference_cache=cache))
    context = cli.commands["validate"].make_context("validate", shlex.split(line)[2:])
    assert context.params["reference_cache"] == cache
    assert following_a_validation(ValidateJob(reference="base", candidate="c", reference_cache=cache)) == ()
    plain = OutputConfig(out=tmp_path / "o")
    assert following_a_merge(MergeJob(base="b", outputs=(plain,), validation=None), plain) == ()  # convert
    job = MergeJob(base="b", adapter="a", outputs=(plain,), trained_on="nf4", validation=None)
    assert "--trained-on nf4" in following_a_merge(job, plain)[0]
    asymmetric = OutputConfig(out=tmp_path / "p", quantization=QuantizationConfig(target="gptq", symmetric=False))
    job = MergeJob(base="b", adapter="a", outputs=(plain, asymmetric))
    assert following_a_merge(job, asymmetric) == ()  # not for vLLM
    assert following_a_merge(job, plain) == (f"vllm serve {tmp_path / 'o'}",)


def test_no_hint_after_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from qconv.cli_answers import Answer, answers

    def ending(failure: errors.QconvError | None) -> Callable[..., None]:
        return answers(lambda **_: Answer(text="done", document={}, failure=failure, following=("qconv next",)))

    monkeypatch.setattr(sys, "stderr", Terminal(sys.stderr))
    ending(None)(as_json=False, quiet=False)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("done\n", "next        qconv next\n")
    for silent in ({"as_json": True, "quiet": False}, {"as_json": False, "quiet": True}):
        ending(None)(**silent)
        assert capsys.readouterr().err == ""
    with pytest.raises(errors.GateError):
        ending(errors.GateError("a gate failed"))(as_json=False, quiet=False)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("done\n", "")


def test_mistyped_folder_is_answered_with_its_neighbour(tmp_path: Path, tiny_nf4: Path) -> None:
    shutil.copytree(tiny_nf4, tmp_path / "base-nf4")
    result = process("inspect", tmp_path / "bse-nf4")
    assert result.returncode == 3
    assert result.stderr.rstrip().endswith(f"; did you mean {tmp_path / 'base-nf4'}?")
    result = process("inspect", tmp_path / "zzz")
    assert "did you mean" not in result.stderr
