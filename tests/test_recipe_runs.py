"""Recipes that run: every example on the tiny Llama, in a copy that settings point at it and keep small."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qconv.checkpoint import open_checkpoint
from qconv.cli import cli, main
from qconv.convert import dequantize
from tests.cli_cases import EVAL_TOKENS, NUM_LINEARS, SEQ_LEN, report_of, small_texts, stored_tensors
from tests.test_cli_machines import only_document

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples" / "recipes"
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
    code, document = runs.example("release.yaml", *values, outputs, "validation.attribution=never")
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
    assert "--" not in document["error"]["message"]


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
