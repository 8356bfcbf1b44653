"""Whole runs of `qconv validate` and `qconv report` on the tiny model: what is compared, judged and written."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import shutil
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import Tensor

from qconv import cached_fidelity, fidelity
from qconv.cli import main
from qconv.report.document import ALL_NAMES, HTML_NAME, JSON_NAME, MARKDOWN_NAME, load_schema
from qconv.validate import fingerprint
from tests.cli_cases import (
    EVAL_TOKENS,
    SEQ_LEN,
    Variant,
    damaged,
    decoded_weights,
    evaluation_ids,
    logits_of,
    made,
    mean_kl,
    report_of,
    small_texts,
    stored_tensors,
    whole_model,
)
from tests.conftest import save_random_adapter

RTN, GPTQ, FP8 = Variant("w4a16", "rtn", 4), Variant("gptq", "rtn", 4), Variant("fp8", "fp8", 8)
AWQ = Variant("awq", "awq", 4)  # the one whose scales are folded between modules
TASK = Path(__file__).parent.parent / "docs" / "examples" / "tasks" / "everyday.yaml"
DOWN_PROJ = "model.layers.2.mlp.down_proj"

Output = Callable[[Variant | None], Path]


@dataclass(frozen=True)
class Run:
    """What one call of the command line gave."""

    code: int
    out: str
    err: str
    report: dict[str, Any]

    @property
    def fidelity(self) -> dict[str, Any]:
        part: dict[str, Any] = self.report["fidelity"]
        return part

    @property
    def kl(self) -> float:
        return float(self.fidelity["total"]["kl"]["mean"])

    @property
    def gates(self) -> dict[str, dict[str, Any]]:
        return {gate["name"]: gate for gate in self.report["gates"]}


def call(*arguments: str | Path) -> tuple[int, str, str]:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


class Validate:
    """``validate(...)`` in this process on the small text; options that are given replace the usual ones."""

    def __init__(self, text: Path, factory: pytest.TempPathFactory):
        self._factory = factory
        self._usual = {
            "--eval-data": str(text),
            "--eval-tokens": str(EVAL_TOKENS),
            "--eval-seq-len": str(SEQ_LEN),
            "--attribution": "never",
            "--device": "cpu",
        }

    def __call__(self, *arguments: str | Path) -> Run:
        folder = self._factory.mktemp("report")
        code, out, err = self.plain(*arguments, "--report", folder)
        assert "Traceback" not in err
        assert "unexpected" not in err, err
        report = report_of(folder) if (folder / JSON_NAME).exists() else {}
        if report:
            check_schema(report)
            assert sorted(path.name for path in folder.iterdir()) == sorted(ALL_NAMES)
        return Run(code, out, err, report)

    def plain(self, *arguments: str | Path) -> tuple[int, str, str]:
        """Without reports."""
        given = [str(argument) for argument in arguments]
        usual = [word for name, value in self._usual.items() if name not in given for word in (name, value)]
        return call("validate", *given, *usual)

    def refused(self, code: int, words: list[str], *arguments: str | Path) -> None:
        """Asserts exit code and one line that starts with ``error:`` and has the words."""
        found, out, err = self.plain(*arguments)
        assert found == code, err
        assert out == ""
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
        for word in words:
            assert word in err, err


def check_schema(report: Mapping[str, Any]) -> None:
    jsonschema.Draft202012Validator(load_schema()).validate(report)


@pytest.fixture(scope="module")
def validate(tmp_path_factory: pytest.TempPathFactory) -> Validate:
    return Validate(small_texts(tmp_path_factory)[1], tmp_path_factory)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, tiny_nf4: Path, tiny_adapter: Path) -> Output:
    return lambda variant: made(tmp_path_factory, tiny_nf4, tiny_adapter, variant)


@pytest.fixture(scope="module")
def pair(tiny_nf4: Path, tiny_adapter: Path) -> list[str | Path]:
    return ["--reference", tiny_nf4, "--adapter", tiny_adapter]


@pytest.fixture(scope="module")
def other_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "other"
    save_random_adapter(tiny_llama, folder, base_name="other", r=4)
    return folder


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, output: Output) -> Path:
    """The plain merge with one linear of block 2 turned around."""

    def turn(tensors: dict[str, Tensor]) -> None:
        tensors[f"{DOWN_PROJ}.weight"] = -tensors[f"{DOWN_PROJ}.weight"]

    return damaged(output(None), tmp_path_factory.mktemp("broken") / "model", turn)


@pytest.fixture(scope="module")
def direct(validate: Validate, pair: list[str | Path], output: Output) -> Run:
    """The round-to-nearest candidate against the reference itself, the controls on all rows."""
    return validate(*pair, "--candidate", output(RTN), "--control-tokens", str(EVAL_TOKENS))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, validate: Validate, pair: list[str | Path]) -> tuple[Path, Run]:
    path = tmp_path_factory.mktemp("cache") / "reference.qcache"
    run = validate(*pair, "--reference-cache", path, "--control-tokens", str(EVAL_TOKENS))
    assert run.code == 0, run.err
    return path, run


# Any pair


def test_quantized_reference_without_adapter(
    validate: Validate, output: Output, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The reference decoded here, run by transformers: the KL of two folders of any format."""
    ids_BS = evaluation_ids(tmp_path_factory)
    reference = whole_model(decoded_weights(output(GPTQ)), torch.bfloat16)
    candidate = whole_model(stored_tensors(output(None)), torch.bfloat16)
    run = validate("--reference", output(GPTQ), "--candidate", output(None), "--no-default-gates")
    assert run.code == 0
    assert run.report["verdict"] == "not gated"
    assert run.kl == pytest.approx(mean_kl(logits_of(reference, ids_BS), logits_of(candidate, ids_BS)), rel=0.02)
    assert run.fidelity["merge"] is None
    assert run.fidelity["adapter_effect_retained"] is None


@pytest.mark.parametrize("variant", [None, GPTQ, FP8], ids=str)
def test_a_folder_against_itself(validate: Validate, output: Output, variant: Variant | None) -> None:
    run = validate("--reference", output(variant), "--candidate", output(variant))
    assert run.code == 0
    assert run.kl == 0
    assert run.fidelity["total"]["top1_agreement"]["value"] == 1
    assert run.report["findings"] == []


def test_16_bit_reference_needs_no_adapter(validate: Validate, tiny_llama: Path, tiny_nf4: Path) -> None:
    run = validate("--reference", tiny_llama, "--candidate", tiny_nf4)
    assert run.code == 0
    assert 1e-3 < run.kl < 0.1
    back = validate("--reference", tiny_nf4, "--candidate", tiny_llama, "--no-default-gates")
    assert back.kl == pytest.approx(run.fidelity["total"]["reverse_kl"]["mean"], rel=1e-4)


def test_candidate_with_an_unmerged_adapter(
    validate: Validate, pair: list[str | Path], tiny_nf4: Path, tiny_adapter: Path, other_adapter: Path
) -> None:
    served = [*pair, "--candidate", tiny_nf4, "--candidate-adapter"]
    same = validate(*served, tiny_adapter)
    assert same.code == 0
    assert same.kl == 0
    assert same.fidelity["adapter_effect_retained"]["value"] == 1
    assert same.report["findings"] == []  # not "the adapter is not in the weights"
    assert same.report["subject"]["candidate_adapter"] == str(tiny_adapter)
    other = validate(*served, other_adapter, "--max-kl", "0.001")
    assert other.code == 4
    assert other.kl > 0.005


def test_missing_adapter_is_noticed(validate: Validate, pair: list[str | Path], tiny_nf4: Path) -> None:
    run = validate(*pair, "--candidate", tiny_nf4)
    assert run.code == 4
    assert [finding["code"] for finding in run.report["findings"]] == ["adapter-not-applied"]
    assert run.gates["findings"]["verdict"] == "fail"
    assert run.gates["kl_mean"]["verdict"] == "pass"  # four bits hide it


# Engines


@pytest.mark.parametrize(("variant", "tolerance"), [(None, 1e-3), (RTN, 1e-3), (FP8, 0.2)], ids=str)
def test_engines_agree(
    validate: Validate, pair: list[str | Path], output: Output, variant: Variant | None, tolerance: float
) -> None:
    if variant is not None:
        pytest.importorskip("compressed_tensors", reason="transformers needs it to load these folders")
    own = validate(*pair, "--candidate", output(variant))
    theirs = validate(*pair, "--candidate", output(variant), "--engine", "transformers")
    assert theirs.code == 0, theirs.err
    assert theirs.fidelity["candidate"]["runs"].startswith("transformers")
    assert "it/s" not in theirs.err  # bars of libraries
    assert own.fidelity["candidate"]["runs"].startswith("decoded by qconv")
    assert theirs.kl == pytest.approx(own.kl, rel=tolerance)


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is not None, reason="gptqmodel is installed")
@pytest.mark.parametrize("variant", [GPTQ, AWQ], ids=str)
def test_engine_without_its_kernels(
    validate: Validate, pair: list[str | Path], output: Output, variant: Variant
) -> None:
    words = ["gptqmodel", "Without --engine transformers", str(output(variant))]
    validate.refused(3, words, *pair, "--candidate", output(variant), "--engine", "transformers")


# Reference cache


def test_cache_alone_judges_nothing(cache: tuple[Path, Run], direct: Run) -> None:
    path, run = cache
    assert run.report["verdict"] == "not gated"
    assert run.fidelity["total"] is None
    assert run.report["subject"]["candidate"] is None
    assert run.fidelity["reference"]["cache"]["written"] is True
    for name in ("merge", "base_without_adapter", "floor"):
        assert run.fidelity[name] == direct.fidelity[name]
    assert path.stat().st_size < 1.3 * 588 * run.fidelity["evaluation"]["positions"]


def test_reference_of_a_cache_run_is_measured_on_all_rows(
    tmp_path: Path, validate: Validate, pair: list[str | Path], direct: Run
) -> None:
    run = validate(*pair, "--reference-cache", tmp_path / "c", "--control-tokens", str(SEQ_LEN))
    expected = direct.fidelity["reference"]["perplexity"]
    assert run.fidelity["reference"]["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_cache_agrees_with_the_direct_run(
    tmp_path: Path,
    validate: Validate,
    pair: list[str | Path],
    output: Output,
    direct: Run,
    cache: tuple[Path, Run],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashed: Counter[Path] = Counter()
    digest = fingerprint._sha256
    monkeypatch.setattr(fingerprint, "_sha256", lambda file, stop=None: hashed.update([file]) or digest(file, stop))
    path, _ = cache
    candidate = ["--candidate", output(RTN)]
    both = validate(*pair, *candidate, "--reference-cache", tmp_path / "c", "--control-tokens", str(EVAL_TOKENS))
    assert both.fidelity["total"] == direct.fidelity["total"]  # this run had the reference itself
    loss = both.fidelity["reference"]["cache"]["loss"]
    assert loss["kl_mean_exact"] == pytest.approx(direct.kl, rel=1e-6)
    error = 4 * loss["rms_per_position"] / loss["positions"] ** 0.5  # four standard errors of the drawn tail
    assert 0 < error < 0.05 * direct.kl

    audited = validate(*pair, *candidate, "--reference-cache", path)
    # For the report and for what binds the cache to its files: read once in each run.
    assert {count for file, count in hashed.items() if file.suffix == ".safetensors"} == {2}
    alone = validate("--reference-cache", path, *candidate)
    for run in (audited, alone):
        assert run.code == 0, run.err
        assert run.kl == pytest.approx(loss["kl_mean_cached"], rel=1e-6)
        assert abs(run.kl - direct.kl) < error
        assert run.fidelity["reference"]["cache"]["kl_lower_bound"] < run.kl
        total, exact = run.fidelity["total"], direct.fidelity["total"]
        assert total["perplexity"] == pytest.approx(exact["perplexity"], rel=1e-5)
        for name in ("top1_agreement", "top5_agreement", "flips"):
            assert total[name]["value"] == pytest.approx(exact[name]["value"], rel=1e-5)
            assert total[name]["interval_95"] == pytest.approx(exact[name]["interval_95"], rel=1e-5)
        kept, expected = (r.fidelity["adapter_effect_retained"]["value"] for r in (run, direct))
        assert abs(kept - expected) < error / direct.fidelity["base_without_adapter"]["kl"]["mean"]
        assert run.fidelity["blocks"] == []
        assert [worst["target"] for worst in run.fidelity["worst_tokens"][:1]] == [
            worst["target"] for worst in direct.fidelity["worst_tokens"][:1]
        ]
    assert "findings" in audited.gates
    assert "findings" not in alone.gates
    assert any("not audited" in note for note in alone.fidelity["notes"])
    assert not any("not audited" in note for note in audited.fidelity["notes"])


def test_cache_answers_for_controls(validate: Validate, output: Output, direct: Run, cache: tuple[Path, Run]) -> None:
    gates = ["merge.kl_mean<=0.01", "merge.top1_agreement>=0.9", "kl_mean<=1000x floor", "adapter_effect_retained>=-1"]
    asked = [word for gate in gates for word in ("--gate", gate)]
    run = validate("--reference-cache", cache[0], "--candidate", output(RTN), *asked)
    assert run.code == 0, run.out
    assert run.gates["merge.kl_mean"]["value"] == direct.fidelity["merge"]["kl"]["mean"]
    assert run.gates["merge.kl_mean"]["interval_95"] == direct.fidelity["merge"]["kl"]["interval_95"]
    assert run.gates["merge.top1_agreement"]["value"] == direct.fidelity["merge"]["top1_agreement"]["value"]
    floor = max(direct.fidelity["floor"]["kl"]["mean"], torch.finfo(torch.bfloat16).eps ** 2)
    assert run.gates["kl_mean"]["rule"] == f"<= 1000 x floor = {1000 * floor:.6g}"


def test_cache_cannot_tell(validate: Validate, output: Output, cache: tuple[Path, Run]) -> None:
    gates = ["--gate", "block_sqnr_db_min>=3", "--gate", "findings<=0"]
    run = validate("--reference-cache", cache[0], "--candidate", output(RTN), *gates)
    assert run.code == 4
    for name in ("block_sqnr_db_min", "findings"):
        assert (run.gates[name]["verdict"], run.gates[name]["value"]) == ("fail", None)
    assert any("was not measured" in reason for reason in run.report["reasons"])


def test_cached_candidate_with_an_unmerged_adapter_is_not_audited(
    validate: Validate, pair: list[str | Path], tiny_nf4: Path, tiny_adapter: Path, cache: tuple[Path, Run]
) -> None:
    served = ["--candidate", tiny_nf4, "--candidate-adapter", tiny_adapter, "--reference-cache", cache[0]]
    for more in ([], pair):
        run = validate(*served, *more)
        assert run.code == 0, run.out
        assert run.kl == pytest.approx(0, abs=1e-6)
        assert run.report["findings"] == []
        assert "findings" not in run.gates
        assert any("not audited" in note for note in run.fidelity["notes"])


def test_damaged_candidate_fails_from_the_cache(
    validate: Validate, pair: list[str | Path], broken: Path, cache: tuple[Path, Run]
) -> None:
    alone = validate("--reference-cache", cache[0], "--candidate", broken)
    assert alone.code == 4
    audited = validate(*pair, "--reference-cache", cache[0], "--candidate", broken)
    (finding,) = [f for f in audited.report["findings"] if f["severity"] == "error"]
    assert finding["tensors"] == [f"{DOWN_PROJ}.weight"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--eval-seq-len", "32"], ["seq_len was 64, is 32"]),
        (["--seed", "1"], ["seed was 0, is 1"]),
        (["--eval-tokens", "256"], ["8 x 64 then, 4 x 64 now"]),
        (["--eval-data", "default-eval"], ["the evaluated tokens differ"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_cache_of_another_evaluation(
    validate: Validate, output: Output, cache: tuple[Path, Run], options: list[str], words: list[str]
) -> None:
    validate.refused(3, words, "--reference-cache", cache[0], "--candidate", output(RTN), *options)


def test_cache_of_another_model(
    tmp_path: Path,
    validate: Validate,
    pair: list[str | Path],
    output: Output,
    cache: tuple[Path, Run],
    tiny_nf4: Path,
    tiny_llama: Path,
    tiny_adapter: Path,
    other_adapter: Path,
) -> None:
    use = ["--reference-cache", cache[0], "--candidate", output(RTN)]
    words = ["the adapter's weights differ: adapter_model.safetensors"]
    validate.refused(3, words, "--reference", tiny_nf4, "--adapter", other_adapter, *use)
    validate.refused(3, ["the cache is of an adapter, now there is none"], "--reference", tiny_nf4, *use)
    other = ["--reference", tiny_llama, "--adapter", tiny_adapter, "--trained-on", "nf4-dq"]
    validate.refused(3, ["the reference's weights differ"], *other, *use)

    changed = tmp_path / "tokenizer"
    shutil.copytree(output(RTN), changed)
    tokenizer = json.loads((changed / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"] += [{**tokenizer["added_tokens"][0], "id": 2047, "content": "the"}]
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    validate.refused(3, ["the tokenizer's files differ: tokenizer.json"], *use[:2], "--candidate", changed)


def test_caches_that_are_not_there_or_damaged(
    tmp_path: Path, validate: Validate, pair: list[str | Path], output: Output, cache: tuple[Path, Run]
) -> None:
    candidate = ["--candidate", output(RTN)]
    validate.refused(2, ["exists already", "--candidate"], *pair, "--reference-cache", cache[0])
    validate.refused(2, ["--candidate", "--reference"], "--reference-cache", cache[0])
    validate.refused(3, ["missing"], "--reference-cache", tmp_path / "missing", *candidate)
    data = bytearray(cache[0].read_bytes())
    data[-100] ^= 1
    (tmp_path / "flipped").write_bytes(data)
    validate.refused(3, ["flipped"], "--reference-cache", tmp_path / "flipped", *candidate)
    (tmp_path / "cut").write_bytes(data[:-1000])
    validate.refused(3, ["cut"], "--reference-cache", tmp_path / "cut", *candidate)


def test_place_of_a_cache_is_checked_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, validate: Validate, pair: list[str | Path]
) -> None:
    def too_late(*_: Any, **__: Any) -> None:
        raise AssertionError("the comparison was begun")

    monkeypatch.setattr(cached_fidelity, "measure_fidelity", too_late)
    validate.refused(3, ["no folder"], *pair, "--reference-cache", tmp_path / "no" / "such" / "cache")


@pytest.mark.parametrize(
    "option", [["--prompts", "default"], ["--attribution", "always"], ["--tasks", "everyday"]], ids=lambda o: o[0]
)
def test_what_needs_the_reference_is_refused_with_a_cache(
    validate: Validate, output: Output, cache: tuple[Path, Run], option: list[str]
) -> None:
    use = ["--reference-cache", cache[0], "--candidate", output(RTN)]
    validate.refused(2, [option[0], "reference"], *use, *option)


@pytest.mark.parametrize(
    "option",
    [["--max-kl", "0.1"], ["--prompts", "default"], ["--attribution", "always"], ["--tasks", "everyday"]],
    ids=lambda o: o[0],
)
def test_what_needs_a_candidate_is_refused_without(
    tmp_path: Path, validate: Validate, pair: list[str | Path], option: list[str]
) -> None:
    validate.refused(2, ["--candidate"], *pair, "--reference-cache", tmp_path / "cache", *option)
    assert not (tmp_path / "cache").exists()


# Prompts


def test_identical_models_answer_identically(validate: Validate, output: Output) -> None:
    same = ["--reference", output(None), "--candidate", output(None)]
    run = validate(*same, "--prompts", "default", "--new-tokens", "8", "--gate", "prompts_identical>=80%")
    assert run.code == 0, run.out
    prompts = run.fidelity["prompts"]
    assert (prompts["num_prompts"], prompts["identical"], prompts["median_first_divergence"]) == (16, 16, 8)
    assert all(example["first_divergence"] is None for example in prompts["examples"])
    assert run.gates["prompts_identical"]["value"] == 1
    strict = validate(*same, "--prompts", "default", "--new-tokens", "2", "--gate", "prompts_identical>=95%")
    assert strict.code == 5  # 16 prompts cannot show that
    assert "more prompts" in strict.report["reasons"][0]


def test_damaged_model_answers_otherwise(tmp_path: Path, validate: Validate, output: Output, broken: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\n\nThe king said to the\nIn the morning she went\n", encoding="utf-8")
    asked = ["--prompts", prompts, "--new-tokens", "12", "--gate", "prompts_identical>=90%", "--no-default-gates"]
    run = validate("--reference", output(None), "--candidate", broken, *asked)
    assert run.code == 4
    found = run.fidelity["prompts"]
    assert found["num_prompts"] == 3
    assert found["identical"] == 0
    for example in found["examples"]:
        assert example["reference"] != example["candidate"]
        assert 0 <= example["first_divergence"] < 12


def test_answers_are_those_of_transformers(tmp_path: Path, validate: Validate, output: Output) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "Once upon a time there was"}) + "\n", encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(output(None), dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(output(None))
    inputs = tokenizer("Once upon a time there was", return_tensors="pt")
    ids_BS = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    expected = tokenizer.decode(ids_BS[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    same = ["--reference", output(None), "--candidate", output(None)]
    run = validate(*same, "--prompts", prompts, "--new-tokens", "16")
    (example,) = run.fidelity["prompts"]["examples"]
    assert example["reference"] == example["candidate"] == expected
    assert len(expected) > 8


def test_penalties_of_a_folder_do_not_change_answers(tmp_path: Path, validate: Validate, output: Output) -> None:
    """generation_config.json is read where transformers loads a model, and not where qconv does."""
    folder = tmp_path / "penalised"
    shutil.copytree(output(None), folder)
    settings = {"repetition_penalty": 1.8, "do_sample": True, "temperature": 3.0, "no_repeat_ngram_size": 1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    engines = ["--engine", "transformers", "--prompts", "default", "--new-tokens", "12"]
    plain, penalised = (
        validate("--reference", output(None), "--candidate", candidate, *engines)
        for candidate in (output(None), folder)
    )
    assert penalised.fidelity["prompts"] == plain.fidelity["prompts"]


# Tasks


def test_tasks(validate: Validate, output: Output, broken: Path) -> None:
    pytest.importorskip("lm_eval", reason="task accuracy is measured by lm_eval, which is not installed")
    asked = ["--tasks", TASK, "--task-limit", "20", "--gate", "task.everyday.acc_drop<=30%"]
    same = validate("--reference", output(None), "--candidate", output(None), *asked)
    assert same.code == 0, same.err
    (task,) = same.report["tasks"]
    assert (task["name"], task["metric"], task["num_samples"], task["difference"]) == ("everyday", "acc", 20, 0)
    assert (task["better_to_worse"], task["worse_to_better"]) == (0, 0)
    assert same.gates["task.everyday.acc_drop"]["verdict"] == "pass"
    other = validate("--reference", output(None), "--candidate", broken, *asked, "--no-default-gates")
    (task,) = other.report["tasks"]
    assert task["better_to_worse"] + task["worse_to_better"] > 0
    assert task["candidate"] - task["reference"] == pytest.approx(task["difference"])
    assert other.gates["task.everyday.acc_drop"]["value"] == pytest.approx(-task["difference"])


def test_gate_goes_by_the_name_of_the_task(tmp_path: Path, validate: Validate, output: Output) -> None:
    pytest.importorskip("lm_eval", reason="task accuracy is measured by lm_eval, which is not installed")
    shutil.copy(TASK.with_suffix(".jsonl"), tmp_path)
    shutil.copy(TASK, tmp_path / "mine.yaml")
    asked = ["--reference", output(None), "--candidate", output(None), "--tasks", tmp_path / "mine.yaml"]
    run = validate(*asked, "--task-limit", "5", "--gate", "task.everyday.acc_drop<=90%")
    assert run.code == 0, run.err
    assert run.gates["task.everyday.acc_drop"]["value"] == 0
    validate.refused(2, ["task.mine.acc_drop", "everyday"], *asked, "--gate", "task.mine.acc_drop<=90%")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_tasks_without_the_harness(monkeypatch: pytest.MonkeyPatch, validate: Validate, output: Output) -> None:
    models = ["--reference", output(None), "--candidate", output(RTN)]
    monkeypatch.setattr(fidelity, "compare", None)  # said before the work
    validate.refused(2, ["lm_eval", "install"], *models, "--tasks", TASK)


# Attribution


@pytest.mark.parametrize("variant", [None, RTN, GPTQ, AWQ, FP8], ids=str)
def test_attribution_names_the_parts(
    validate: Validate, pair: list[str | Path], output: Output, variant: Variant | None
) -> None:
    run = validate(*pair, "--candidate", output(variant), "--attribution", "always", "--eval-tokens", "128")
    assert run.code == 0, run.out
    part = run.fidelity["attribution"]
    blocks = [unit["name"] for unit in part["blocks"]]
    assert [name for name in blocks if "." in name] == [f"model.layers.{index}" for index in range(4)]
    assert part["sum_of_parts"] == pytest.approx(sum(unit["kl_mean"] for unit in part["blocks"]))
    assert sum(unit["share"] for unit in part["blocks"]) == pytest.approx(1)
    assert part["total_kl"] == pytest.approx(run.kl, rel=0.02)
    assert 0.3 < part["additivity"] < 3
    assert len(part["linears"]) >= 3
    assert all(unit["name"].startswith("model.layers.") for unit in part["linears"])
    costs = [unit["kl_mean"] for unit in part["linears"]]
    assert costs == sorted(costs, reverse=True)
    # A swapped linear of a folded block would cost many times what its block does.
    dearest = max(unit["kl_mean"] for unit in part["blocks"])
    assert max(costs) < 10 * dearest


def test_attribution_finds_the_damaged_linear(validate: Validate, pair: list[str | Path], broken: Path) -> None:
    run = validate(*pair, "--candidate", broken, "--attribution", "auto", "--eval-tokens", "128")
    assert run.code == 4
    part = run.fidelity["attribution"]
    assert max(part["blocks"], key=lambda unit: unit["kl_mean"])["name"] == "model.layers.2"
    assert part["linears"][0]["name"] == DOWN_PROJ
    (finding,) = [f for f in run.report["findings"] if f["severity"] == "error"]
    assert finding["tensors"] == [f"{DOWN_PROJ}.weight"]


def test_attribution_waits_for_a_gate_that_does_not_pass(
    validate: Validate, pair: list[str | Path], output: Output
) -> None:
    asked = [*pair, "--candidate", output(RTN), "--eval-tokens", "128", "--attribution"]
    assert validate(*asked, "auto").fidelity["attribution"] is None
    failed = validate(*asked, "auto", "--gate", "kl_max<=1e-6")
    assert failed.code == 4
    assert failed.fidelity["attribution"]["blocks"]
    assert validate(*asked, "never", "--gate", "kl_max<=1e-6").fidelity["attribution"] is None


# Gates


def test_gates_and_exit_codes(validate: Validate, pair: list[str | Path], output: Output, direct: Run) -> None:
    models = [*pair, "--candidate", output(RTN)]
    assert direct.code == 0
    assert {gate["origin"] for gate in direct.report["gates"]} == {"default"}
    assert set(direct.gates) == {"kl_mean", "merge.kl_mean", "findings"}

    failed = validate(*models, "--gate", "top1_agreement>=99.9%", "--no-default-gates")
    assert (failed.code, failed.report["verdict"]) == (4, "fail")
    assert list(failed.gates) == ["top1_agreement"]
    assert failed.gates["top1_agreement"]["origin"] == "flag"
    assert "a gate failed" in failed.err

    near = 0.95 * direct.kl
    undecided = validate(*models, "--max-kl", repr(near))
    assert (undecided.code, undecided.report["verdict"]) == (5, "inconclusive")
    tokens = undecided.gates["kl_mean"]["tokens_to_settle"]
    assert tokens > EVAL_TOKENS
    assert f"--eval-tokens {tokens}" in undecided.report["reasons"][0]
    assert undecided.gates["kl_mean"]["interval_95"][0] < near < undecided.gates["kl_mean"]["interval_95"][1]

    nothing = validate(*models, "--no-default-gates")
    assert (nothing.code, nothing.report["verdict"], nothing.report["gates"]) == (0, "not gated", [])


def test_limit_relative_to_the_floor(validate: Validate, pair: list[str | Path], output: Output, direct: Run) -> None:
    floor = max(direct.fidelity["floor"]["kl"]["mean"], torch.finfo(torch.bfloat16).eps ** 2)
    gates = [word for gate in ("kl_mean<=5x floor", "merge.kl_mean<=5x floor") for word in ("--gate", gate)]
    run = validate(*pair, "--candidate", output(RTN), *gates, "--control-tokens", "512")
    assert run.code == 4
    assert run.gates["kl_mean"]["rule"] == f"<= 5 x floor = {5 * floor:.6g}"
    # The floor of this model is next to nothing: its batches are computed in one order.
    assert [run.gates[name]["verdict"] for name in ("kl_mean", "merge.kl_mean")] == ["fail", "pass"]


def write_policy(path: Path, expires: str, limit: str = "1e-4") -> Path:
    path.write_text(
        f"gates:\n  kl_mean: {{max: {limit}}}\nwaivers:\n  - gate: kl_mean\n    reason: a new tokenizer comes\n"
        f"    approved_by: J. Doe\n    expires: {expires}\n",
        encoding="utf-8",
    )
    return path


def test_policy_and_waivers(tmp_path: Path, validate: Validate, pair: list[str | Path], output: Output) -> None:
    models = [*pair, "--candidate", output(RTN), "--eval-tokens", "128", "--policy"]
    today = datetime.now(UTC).date()
    live = write_policy(tmp_path / "live.yaml", str(today + timedelta(days=30)))
    run = validate(*models, live)
    assert (run.code, run.report["verdict"]) == (0, "pass")
    gate = run.gates["kl_mean"]
    assert (gate["verdict"], gate["origin"], gate["rule"]) == ("waived", "file", "<= 0.0001")
    assert gate["waiver"]["approved_by"] == "J. Doe"
    assert "J. Doe" in run.out

    expired = validate(*models, write_policy(tmp_path / "old.yaml", str(today - timedelta(days=2))))
    assert (expired.code, expired.gates["kl_mean"]["verdict"]) == (4, "fail")
    assert any("expired" in reason for reason in expired.report["reasons"])

    replaced = validate(*models, live, "--max-kl", "0.2")
    assert (replaced.code, replaced.gates["kl_mean"]["origin"]) == (0, "flag")
    assert replaced.gates["kl_mean"]["verdict"] == "pass"


def test_two_gates_on_one_metric_are_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, validate: Validate, pair: list[str | Path], output: Output
) -> None:
    models = [*pair, "--candidate", output(RTN)]
    monkeypatch.setattr(fidelity, "compare", None)
    validate.refused(2, ["two gates on kl_mean"], *models, "--max-kl", "0.1", "--gate", "kl_mean<=0.2")


# Reports


def test_report_command(tmp_path: Path, validate: Validate, pair: list[str | Path], output: Output) -> None:
    folder = tmp_path / "report"
    limits = ["--max-kl", "1e-5", "--attribution", "always", "--prompts", "default", "--new-tokens", "2"]
    limits += ["--eval-tokens", "128"]
    code, printed, _ = validate.plain(*pair, "--candidate", output(RTN), *limits, "--report", folder)
    assert code == 4
    stored = report_of(folder)
    check_schema(stored)

    assert call("report", folder) == (0, printed, "")
    assert call("report", folder / JSON_NAME) == (0, printed, "")
    assert json.loads(call("report", folder, "--format", "json")[1]) == stored
    assert call("report", folder, "--format", "markdown")[1].rstrip() == (folder / MARKDOWN_NAME).read_text().rstrip()
    suite = ElementTree.fromstring(call("report", folder, "--format", "junit")[1].strip().encode())
    (failed,) = [case for case in suite.iter("testcase") if case.find("failure") is not None]
    assert "kl_mean" in str(failed.get("name"))
    assert call("report", folder, "--format", "html", "-o", tmp_path / "page.html") == (0, "", "")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page == (folder / HTML_NAME).read_text(encoding="utf-8")
    assert "FAIL" in page
    assert "model.layers.3" in page


def test_two_reports(tmp_path: Path, validate: Validate, pair: list[str | Path], output: Output) -> None:
    folders = [tmp_path / name for name in ("rtn", "fp8")]
    for folder, variant in zip(folders, (RTN, FP8), strict=True):
        validate.plain(*pair, "--candidate", output(variant), "--eval-tokens", "256", "--report", folder)
    code, text, _ = call("report", *folders)
    assert code == 0
    line = next(line for line in text.splitlines() if line.startswith("KL mean"))
    assert "better" in line
    difference = json.loads(call("report", *folders, "--format", "json")[1])
    assert difference
    assert "| KL mean" in call("report", *folders, "--format", "markdown")[1]
    code, _, err = call("report", *folders, "--format", "html")
    assert (code, err) == (2, "error: two reports are compared as text, markdown or json, not as html\n")
    assert call("report", *folders, folders[0])[0] == 2


def test_wrong_reports(tmp_path: Path, output: Output) -> None:
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "old.json").write_text('{"format": 1, "verdict": "pass"}')
    for name, word in (("missing", "no report there"), ("text.json", "JSON"), ("list.json", "not a qconv report")):
        code, out, err = call("report", tmp_path / name)
        assert (code, out) == (3, "")
        assert word in err
        assert err.count("\n") == 1
    assert "reads format 2" in call("report", tmp_path / "old.json")[2]
    code, _, err = call("report", output(RTN), "-o", tmp_path / "no" / "page.html")
    assert code == 3
    assert "cannot be written" in err


def test_an_output_brings_its_reports(output: Output) -> None:
    folder = output(RTN)
    report = report_of(folder)
    check_schema(report)
    assert {JSON_NAME, MARKDOWN_NAME, HTML_NAME} <= {path.name for path in folder.iterdir()}
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{report['fidelity']['total']['kl']['mean']:.3g}" in card
    assert f"{report['fidelity']['adapter_effect_retained']['value']:.1%}" in card
    assert call("report", folder)[0] == 0


def test_same_run_same_numbers(validate: Validate, pair: list[str | Path], output: Output, direct: Run) -> None:
    again = validate(*pair, "--candidate", output(RTN), "--control-tokens", str(EVAL_TOKENS))
    assert again.fidelity == direct.fidelity
    assert again.report["gates"] == direct.report["gates"]
    assert again.report["provenance"] == direct.report["provenance"]


# Wrong usage

WRONG: dict[str, tuple[int, list[str], list[str]]] = {
    "unknown metric": (2, ["--gate", "kl_men<=0.1"], ["kl_men", "kl_mean"]),
    "wrong direction": (2, ["--gate", "kl_mean>=0.1"], ["kl_mean", "<="]),
    "no limit": (2, ["--gate", "kl_mean"], ["kl_mean", "<="]),
    "negative limit": (2, ["--max-kl", "-1"], ["kl_mean"]),
    "no number": (2, ["--max-kl", "nan"], ["kl_mean"]),
    "effect beyond one": (2, ["--min-effect", "1.5"], ["adapter_effect_retained"]),
    "rows too long": (2, ["--eval-tokens", "32"], ["--eval-tokens", "--eval-seq-len"]),
    "controls too few": (2, ["--control-tokens", "8"], ["--control-tokens"]),
    "prompts gate without prompts": (2, ["--gate", "prompts_identical>=0.9"], ["--prompts"]),
    "task gate without the task": (2, ["--gate", "task.everyday.acc_drop<=0.1"], ["--tasks everyday"]),
    "task folder without tasks": (2, ["--task-folder", "."], ["--tasks"]),
    "no policy": (2, ["--policy", "missing.yaml"], ["missing.yaml"]),
    "no such device": (2, ["--device", "tpu"], ["--device"]),
    "no tokens to answer": (2, ["--prompts", "default", "--new-tokens", "0"], ["--new-tokens"]),
    "no such text": (3, ["--eval-data", "missing.txt"], ["missing.txt"]),
    "no such prompts": (3, ["--prompts", "missing.txt"], ["missing.txt"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, validate: Validate, pair: list[str | Path], output: Output, case: str
) -> None:
    code, options, words = WRONG[case]
    models = [*pair, "--candidate", output(RTN)]
    monkeypatch.setattr(fidelity, "compare", None)  # said before the work
    validate.refused(code, words, *models, *options)


def test_incomplete_pairs_are_refused(
    tmp_path: Path, validate: Validate, tiny_nf4: Path, tiny_adapter: Path, cache: tuple[Path, Run], output: Output
) -> None:
    validate.refused(2, ["--reference is missing"])
    validate.refused(2, ["--candidate is missing"], "--reference", tiny_nf4)
    validate.refused(2, ["--reference is missing"], "--candidate", tiny_nf4)
    adapter = ["--adapter", tiny_adapter, "--reference-cache", cache[0]]
    validate.refused(2, ["--adapter belongs to --reference"], *adapter, "--candidate", output(RTN))
    words = ["adapter_effect_retained", "needs an adapter"]
    both = ["--reference", tiny_nf4, "--candidate", tiny_nf4]
    validate.refused(2, words, *both, "--min-effect", "0.5")
    validate.refused(2, ["no adapter"], *both, "--trained-on", "nf4")
    write = [*both[:2], "--reference-cache", tmp_path / "new"]
    validate.refused(2, ["--candidate-adapter"], *write, "--candidate-adapter", tiny_adapter)
    assert not (tmp_path / "new").exists()


def test_models_keep_nothing_after_the_comparison(
    monkeypatch: pytest.MonkeyPatch, validate: Validate, pair: list[str | Path], output: Output
) -> None:
    """Attribution goes through all blocks again; models that do not fit must not pile up on the way."""
    seen: list[Any] = []
    real = fidelity.line_up

    def line_up(*arguments: Any) -> Any:
        seen.append(real(*arguments))
        return seen[-1]

    monkeypatch.setattr("qconv.lineup._fits", lambda *_: False)
    monkeypatch.setattr("qconv.fidelity.line_up", line_up)
    run = validate(*pair, "--candidate", output(Variant("gptq", "rtn", 4, True)), "--attribution", "always")
    assert run.fidelity["attribution"]["blocks"]
    views = seen[0].views
    assert [len(view._tensors) for view in (views.base, views.merged, views.stored.source)] == [0, 0, 0]


def test_tokenizer_counts_where_weights_are_not_audited(
    tmp_path: Path, validate: Validate, pair: list[str | Path], tiny_nf4: Path, tiny_adapter: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_nf4, base)
    content = json.loads((base / "tokenizer.json").read_text())
    content["model"]["merges"][:2] = content["model"]["merges"][1::-1]
    (base / "tokenizer.json").write_text(json.dumps(content))
    run = validate(*pair, "--candidate", base, "--candidate-adapter", tiny_adapter)
    assert run.code == 4
    assert any(finding["code"] == "vocabulary-differs" for finding in run.report["findings"])


@pytest.mark.parametrize("place", ["out/report", "out", "out.partial/x", "out.rejected"])
def test_reports_do_not_go_where_the_output_is_made(
    tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path, place: str
) -> None:
    code, _, err = call("merge", tiny_nf4, tiny_adapter, "-o", tmp_path / "out", "--report", tmp_path / place)
    assert code == 2
    assert "choose another folder" in err
    assert list(tmp_path.iterdir()) == []
