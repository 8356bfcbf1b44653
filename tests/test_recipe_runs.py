"""Recipes that run: every example on the tiny Llama, in a copy that settings point at it and keep small."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qconv.checkpoint import open_checkpoint
from qconv.cli import cli, main
from qconv.cli_plans import estimate_before_training
from qconv.convert import dequantize
from qconv.estimate_jobs import estimate_merge
from qconv.estimate_train import adapter_to_come
from qconv.plan import plan_before_training
from qconv.recipe import load_recipe
from tests.cli_cases import EVAL_TOKENS, NUM_LINEARS, SEQ_LEN, report_of, small_texts, stored_tensors
from tests.test_cli_machines import only_document

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples" / "recipes"
TINY_LINEARS = [(256, 256), (128, 256), (128, 256), (256, 256), (768, 256), (768, 256), (256, 768)]
SHORT = ("train.steps=2", "train.batch-size=1", "train.seq-len=16", "train.rank=2")


class Runs:
    """Runs a recipe in this process, ``--json``; what it says."""

    def __init__(self, folder: Path, texts: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
        self.folder = folder
        self._capsys = capsys
        self._small = [
            *(f"calibration.sources=[{texts[0]}]", "calibration.samples=8", f"calibration.seq-len={SEQ_LEN}"),
            *(f"validation.data={texts[1]}", f"validation.tokens={EVAL_TOKENS}", f"validation.seq-len={SEQ_LEN}"),
            *(f"validation.control-tokens={EVAL_TOKENS}", "device=cpu"),
        ]

    def example(self, name: str, *values: str) -> tuple[int, dict[str, Any]]:
        shutil.copyfile(EXAMPLES / name, self.folder / name)
        return self(self.folder / name, *self._small, *values)

    def settings(self, *values: str) -> tuple[str, ...]:
        return (*self._small, *values)

    def __call__(self, path: Path, *values: str) -> tuple[int, dict[str, Any]]:
        self._capsys.readouterr()
        code: Any = 0
        try:
            main(["run", str(path), "--json", "--quiet", *(word for value in values for word in ("--set", value))])
        except SystemExit as stop:
            code = stop.code
        return code, only_document(self._capsys.readouterr().out)


@pytest.fixture
def runs(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]) -> Runs:
    folder = tmp_path / "work"
    folder.mkdir()
    return Runs(folder, small_texts(tmp_path_factory), capsys)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_release(runs: Runs, tiny_nf4: Path, tiny_adapter: Path) -> None:
    values = (f"base={tiny_nf4}", f"adapter={tiny_adapter}")
    # Random adapters do next to nothing, so rounding to 4 bits hides it.
    met = ("gates.merge.kl_mean.max=1", "gates.adapter_effect_retained.min=-1e3")
    code, document = runs.example("release.yaml", *values, *met)
    (output,) = document["outputs"]
    assert (code, output["verdict"], document["train"]) == (0, "pass", None)
    assert names(runs.folder) == ["out-awq", "release.yaml", "report"]
    assert output == report_of(runs.folder / "out-awq") | {"folder": str(runs.folder / "out-awq"), "exit_code": 0}
    assert report_of(runs.folder / "report") == report_of(runs.folder / "out-awq")
    rules = {gate["name"]: (gate["rule"], gate["origin"]) for gate in output["gates"]}
    assert rules == {
        "kl_mean": ("<= 0.15", "file"),
        "merge.kl_mean": ("<= 1", "file"),
        "adapter_effect_retained": (">= -1000", "file"),
        "findings": ("<= 0", "default"),
    }
    code, document = runs.example("release.yaml", *values)  # again: nothing is reused or replaced unasked
    assert (code, document["error"]["kind"]) == (3, "RecipeError")
    assert "release.yaml:9: outputs[0].out: " in document["error"]["message"]
    assert "exists already" in document["error"]["message"]


def test_a_missed_gate_of_one_output_is_exit_code_4(runs: Runs, tiny_nf4: Path, tiny_adapter: Path) -> None:
    values = (f"base={tiny_nf4}", f"adapter={tiny_adapter}", "gates={kl_mean: {max: 1e-3}}")
    outputs = f"outputs=[{{out: {runs.folder / 'a'}, target: fp8}}, {{out: {runs.folder / 'b'}}}]"
    asked = (*values, outputs, "validation.attribution=never")
    code, document = runs.example("release.yaml", *asked)  # which has text to calibrate on
    assert code == 3
    assert "calibration: nothing is calibrated here (fp8 by fp8); drop it" in document["error"]["message"]
    code, document = runs.example("release.yaml", *asked, "calibration={}")
    assert [output["verdict"] for output in document["outputs"]] == ["fail", "pass"]
    assert (code, document["exit_code"]) == (4, 4)
    assert [output["exit_code"] for output in document["outputs"]] == [4, 0]
    assert [Path(output["folder"]).name for output in document["outputs"]] == ["a.rejected", "b"]
    assert names(runs.folder / "report") == ["a", "b"]


def test_several_targets(runs: Runs, tiny_nf4: Path, tiny_adapter: Path) -> None:
    values = (f"base={tiny_nf4}", f"adapter={tiny_adapter}", "default-gates=false")
    code, document = runs.example("several-targets.yaml", *values)
    assert code == 0
    assert names(runs.folder) == ["out-awq", "out-bf16", "out-fp8", "out-w4a16", "reports", "several-targets.yaml"]
    assert names(runs.folder / "reports") == ["out-awq", "out-bf16", "out-fp8", "out-w4a16"]
    targets = {Path(output["folder"]).name: output["subject"]["target"] for output in document["outputs"]}
    assert targets == {"out-awq": "awq", "out-w4a16": "w4a16", "out-fp8": "fp8", "out-bf16": "plain"}
    config = json.loads((runs.folder / "out-awq" / "config.json").read_text())
    assert config["quantization_config"]["group_size"] == 64
    bits = {m: scheme.bits for m, scheme in dequantize(open_checkpoint(runs.folder / "out-w4a16")).schemes.items()}
    assert len(bits) == NUM_LINEARS
    assert {module for module in bits if bits[module] == 8} == {f"model.layers.{i}.mlp.down_proj" for i in range(4)}


def test_quantize_only(runs: Runs, tiny_llama: Path) -> None:
    code, document = runs.example("quantize-only.yaml", f"base={tiny_llama}")
    assert (code, document["outputs"][0]["command"]) == (0, "quantize")
    assert [gate["name"] for gate in document["outputs"][0]["gates"]] == ["kl_mean"]
    config = json.loads((runs.folder / "out-gptq" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 128, True)


def test_train_and_release(runs: Runs, tiny_nf4: Path, tmp_path: Path) -> None:
    """Two steps change next to nothing, so that no gate on the adapter's effect could be met."""
    pytest.importorskip("peft")
    text = tmp_path / "text.txt"
    text.write_text("One day a small model learned to say what it was told. " * 40)
    (tmp_path / "prompts.txt").write_text("One day\n")
    values = [f"base={tiny_nf4}", f"train.data={text}", *SHORT, f"validation.prompts={tmp_path / 'prompts.txt'}"]
    values += ["validation.new-tokens=2", "validation.attribution=never", "gates={}", "default-gates=false"]
    code, document = runs.example("train-and-release.yaml", *values)
    assert code == 0, document
    trained = document["train"]
    assert (trained["steps"], trained["tokens"], trained["trained_on"]) == (2, 32, "nf4-dq")
    assert trained["folder"] == str(runs.folder / "adapter")
    (output,) = document["outputs"]
    assert output["subject"]["adapter"] == str(runs.folder / "adapter")
    # What was merged is what was trained: the adapter's digests stand in the report.
    assert (runs.folder / "adapter" / "qconv-train.json").is_file()
    assert "adapter_model.safetensors" in output["provenance"]["adapter"]
    assert output["fidelity"]["prompts"]["num_prompts"] == 1
    # The adapter is there now: neither reused nor replaced unasked.
    before = (runs.folder / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(runs.folder / "out-w4a16")
    code, document = runs.example("train-and-release.yaml", *values)
    assert code == 3
    assert "train.out: " in document["error"]["message"]
    assert "exists already" in document["error"]["message"]
    assert (runs.folder / "adapter" / "adapter_model.safetensors").read_bytes() == before
    code, document = runs.example("train-and-release.yaml", *values, "train=null", f"adapter={runs.folder}/adapter")
    assert (code, document["train"]) == (0, None)
    code, _ = runs.example("train-and-release.yaml", *values, "overwrite=true", "train.seed=1")
    assert code == 0
    assert (runs.folder / "adapter" / "adapter_model.safetensors").read_bytes() != before


BEFORE_TRAINING: dict[str, tuple[list[str], str]] = {
    "group size": (["outputs.0.group-size=96"], "group size 96 does not divide"),
    "calibration text": (["calibration.samples=100000"], "100000 rows of 64 tokens"),
    "evaluation text": (["validation.tokens=10000000"], "rows of 64 tokens"),
    "the same text": (["calibration.sources=[default-eval]", "validation.data=default-eval"], "share text"),
    "gate without prompts": (
        ["gates={prompts_identical: {min: 90%}}", "validation.prompts=null"],
        "add prompts default",
    ),
    "pattern": (["outputs.0.ignore=['*.o_prj']"], "ignore '*.o_prj' matches no linear; did you mean *.o_proj or"),
    "override": (["outputs.0.overrides=[{pattern: x, bits: 8}]"], "overrides 'x' matches no linear"),
    "tied head": (["outputs.0.lm-head=true"], "lm-head: the output head is the input embedding"),
    "nothing left": (["outputs.0.ignore=['*']"], "ignore leaves no linear to quantize; drop target"),
    "device": (["device=tpu"], "device takes cpu"),
    "no model": (["base=."], "config.json"),
}


@pytest.mark.parametrize("case", BEFORE_TRAINING)
def test_what_cannot_become_of_it_is_refused_before_training(
    runs: Runs, tiny_nf4: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    def train(*_: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr("qconv.train.train", train)
    values, words = BEFORE_TRAINING[case]
    base = [f"base={tiny_nf4}"] if not values[0].startswith("base") else [f"base={runs.folder}"]
    rest = [value for value in values if not value.startswith("base")]
    code, document = runs.example("train-and-release.yaml", *SHORT, *base, *rest)
    assert (code, names(runs.folder)) == (3, ["train-and-release.yaml"]), document
    assert words in document["error"]["message"]
    assert "--" not in document["error"]["message"].removeprefix("--set: ")


AFTER_TRAINING: dict[str, tuple[dict[str, str], int, list[str]]] = {
    "group size": ({"OUTPUT": "group-size: 96"}, 5, ["outputs[0]: ", "group size 96 does not divide"]),
    "a pattern": ({"OUTPUT": "ignore: ['*.o_prj']"}, 5, ["outputs[0].ignore", "matches no linear"]),
    "an override": ({"OUTPUT": "overrides: [{pattern: x, bits: 8}]"}, 5, ["outputs[0].overrides", "no linear"]),
    "damping": ({"OUTPUT": "algorithm: rtn, damping: 0.1"}, 5, ["outputs[0].damping", "w4a16 by rtn does not use it"]),
    "folder": ({"out: out,": "out: text.txt/out,"}, 5, ["outputs[0].out", "text.txt is a file"]),
    "folder of somebody": ({"out: out,": "out: theirs,"}, 5, ["outputs[0].out", "theirs.partial", "not made by qconv"]),
    "adapter's folder": ({"out: adapter": "out: text.txt/a"}, 3, ["train.out", "text.txt is a file"]),
    "text to train on": ({"data: text.txt": "data: empty.jsonl"}, 3, ["train", "empty.jsonl"]),
    "calibration": ({"sources: [text.txt]": "sources: [empty.jsonl]"}, 6, ["calibration", "empty.jsonl"]),
    "calibration rows": ({"samples: 8": "samples: 99999"}, 6, ["calibration: ", "99999 rows of 64 tokens"]),
    "evaluation": ({"data: default-eval": "data: empty.jsonl"}, 7, ["validation", "empty.jsonl"]),
    "a gate": ({"GATES": "prompts_identical: {min: 90%}"}, 9, ["gates.prompts_identical", "add prompts default"]),
    "a machine": ({"device: cpu": "device: cuda"}, 11, ["device", "no CUDA device", "use device cpu or auto"]),
    "report": ({"REPORT": "text.txt"}, 10, ["report", "text.txt: not a folder"]),
}


@pytest.mark.parametrize("case", AFTER_TRAINING)
def test_what_comes_after_training_is_refused_before_it_at_its_line(
    runs: Runs, tiny_nf4: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr("qconv.train._load_model", lambda *_: pytest.fail("training began"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (runs.folder / "text.txt").write_text("Something to read, again and again, until it is long enough. " * 100)
    (runs.folder / "empty.jsonl").write_text("")
    (runs.folder / "theirs.partial").mkdir()
    changes, line, words = AFTER_TRAINING[case]
    text = f"""recipe: 1
base: {tiny_nf4}
train: {{out: adapter, data: text.txt, steps: 1, batch-size: 1, seq-len: 16}}
outputs:
  - {{target: w4a16, out: out, OUTPUT}}
calibration: {{samples: 8, seq-len: 64, sources: [text.txt]}}
validation: {{data: default-eval, tokens: 512, seq-len: 64}}
gates:
  GATES
report: REPORT
device: cpu
"""
    usual = {"OUTPUT": "group-size: 64", "GATES": "kl_mean: {max: 9}", "REPORT": "reports"}
    for old, new in (changes | {key: value for key, value in usual.items() if key not in changes}).items():
        assert old in text
        text = text.replace(old, new)
    (runs.folder / "recipe.yaml").write_text(text)
    before = sorted(runs.folder.rglob("*"))
    code, document = runs(runs.folder / "recipe.yaml")
    message = document["error"]["message"]
    assert (code, document["error"]["kind"]) == (3, "RecipeError")
    assert message.startswith(f"{runs.folder}/recipe.yaml:{line}: {words[0]}"), message
    assert [word for word in words if word not in message] == [], message
    assert "--" not in message
    assert sorted(runs.folder.rglob("*")) == before


def test_room_for_adapter_and_outputs_together_is_looked_for_before_training(
    runs: Runs, tiny_nf4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qconv.train.train", lambda *_: pytest.fail("training began"))
    usage = shutil.disk_usage(runs.folder)
    values = [f"base={tiny_nf4}", *SHORT, "train.rank=64"]
    path = shutil.copyfile(EXAMPLES / "train-and-release.yaml", runs.folder / "train-and-release.yaml")
    recipe = load_recipe(path, runs.settings(*values))
    config, job = recipe.train, recipe.job
    assert config is not None
    alone = estimate_merge(job, plan_before_training(job), "cpu", "run")
    whole = estimate_before_training(config, job)
    coming = adapter_to_come(config)
    assert coming.num_bytes == 4 * 64 * sum(n + k for n, k in TINY_LINEARS) * 4  # float32, 4 blocks
    assert whole.rooms[0].need - alone.rooms[0].need > coming.num_bytes
    reads = {stage.name: stage.reads for stage in whole.stages}
    assert reads["quantize"] == {stage.name: stage.reads for stage in alone.stages}["quantize"] + coming.num_bytes
    free = (whole.rooms[0].need + alone.rooms[0].need) // 2  # enough for either
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    code, document = runs.example("train-and-release.yaml", *values)
    assert (code, names(runs.folder)) == (3, ["train-and-release.yaml"]), document
    assert "train-and-release.yaml:15: outputs: " in document["error"]["message"]
    assert "the 2 outputs need" in document["error"]["message"]


def test_a_recipe_writes_the_bytes_that_flags_write(
    runs: Runs, tiny_nf4: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    calibration, _ = small_texts(tmp_path_factory)
    flags = ["--requant", "w4a16", "--group-size", "64", "--calibration", str(calibration), "--samples", "8"]
    flags += [
        "--seq-len",
        str(SEQ_LEN),
        "--no-validate",
        "--device",
        "cpu",
        "--quiet",
        "-o",
        str(runs.folder / "flags"),
    ]
    cli.main(["merge", str(tiny_nf4), str(tiny_adapter), *flags], standalone_mode=False)
    (runs.folder / "recipe.yaml").write_text(
        f"""
recipe: 1
base: {tiny_nf4}
adapter: {tiny_adapter}
outputs: [{{target: w4a16, group-size: 64, out: out}}]
calibration: {{sources: [{calibration}], samples: 8, seq-len: {SEQ_LEN}}}
validation: false
device: cpu
"""
    )
    code, document = runs(runs.folder / "recipe.yaml")
    assert (code, document["outputs"][0]["verdict"]) == (0, "not gated")
    ours, theirs = (stored_tensors(runs.folder / name) for name in ("out", "flags"))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES.iterdir() if f'runs.example("{path.name}"' not in source] == []
    assert len(list(EXAMPLES.iterdir())) >= 4
