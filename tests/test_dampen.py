"""A merge whose intruder dimensions are scaled: against numpy's decomposition, and in whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qconv import corpus
from qconv.adapter_configs import AdapterOptions, CombinationConfig
from qconv.checkpoint import open_checkpoint
from qconv.cli import main
from qconv.config import MergeJob, OutputConfig, ValidateJob, ValidationConfig
from qconv.errors import RecipeError, UsageError
from qconv.inputs import load_reference
from qconv.merge import DampenedCheckpoint, Dampening, load_adapter, merge
from qconv.recipe import load_recipe
from tests.merge_cases import TINY_LLAMA, gpt2, llama, plain_model, save_model, trained

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An update so large that it has intruders."""
    folder = tmp_path_factory.mktemp("dampen") / "adapter"
    trained(llama(), target_modules=["k_proj", "down_proj"], lora_alpha=200).save_pretrained(str(folder))
    return folder


def expected(w: Tensor, merged: Tensor, factor: float) -> tuple[np.ndarray, int]:
    """By numpy in float64, from the definition: every component of the sum, those of the intruders times the factor."""
    before, after = w.double().numpy(), merged.double().numpy()
    own = np.linalg.svd(before)[0][:, : min(before.shape)]
    u, s, vt = np.linalg.svd(after, full_matrices=False)
    result, count = np.zeros_like(after), 0
    for place in range(len(s)):
        foreign = place < 10 and np.abs(own.T @ u[:, place]).max() < 0.5
        count += foreign
        result += (factor if foreign else 1.0) * s[place] * np.outer(u[:, place], vt[place])
    return result, count


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0])
def test_each_weight_is_numpys(factor: float, adapter: Path) -> None:
    base = open_checkpoint(TINY_LLAMA)
    loaded = load_adapter(adapter, base)
    plain, dampening = merge(base, [loaded]), Dampening(factor)
    view = DampenedCheckpoint(base, plain, loaded, dampening)
    total = 0
    for name in loaded.deltas:
        merged = plain.read(name)
        wanted, count = expected(base.read(name), merged, factor)
        found = view.read(name)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), wanted, atol=2e-5 * float(merged.abs().max()))
        assert len(dampening.found[name].intruders) == count
        assert torch.equal(view.read(name), found), "decomposed once, the same the second time"
        total += count
    assert total > 0, "so large an update must have some"
    assert dampening.facts()["found"] == total
    assert view.changed == plain.changed
    assert torch.equal(view.read("model.norm.weight"), base.read("model.norm.weight"))


def test_a_weight_that_is_stored_transposed(tmp_path: Path) -> None:
    adapted = trained(gpt2(), target_modules=["c_fc"], lora_alpha=400)
    adapted.save_pretrained(tmp_path / "adapter")
    base = open_checkpoint(save_model(gpt2(), tmp_path / "base"))
    loaded = load_adapter(tmp_path / "adapter", base)
    plain = merge(base, [loaded])
    view = DampenedCheckpoint(base, plain, loaded, Dampening(0.25))
    counts = 0
    for name in loaded.deltas:
        wanted, count = expected(base.read(name).T, plain.read(name).T, 0.25)
        np.testing.assert_allclose(view.read(name).numpy(), wanted.T, atol=1e-4)
        counts += count
    assert counts > 0


def run(adapter: Path, out: Path, task: Path, *options: str) -> dict[str, Any]:
    arguments = ["merge", str(TINY_LLAMA), str(adapter), "--trained-on", "16bit", "--device", "cpu", "-o", str(out)]
    arguments += ["--eval-tokens", "512", "--eval-seq-len", "64", "--attribution", "never", "--dtype", "fp32"]
    main([*arguments, "--no-default-gates", "--task-data", str(task), *options])
    document: dict[str, Any] = json.loads((out / "qconv-report.json").read_text())
    return document


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "task.txt"
    lines = [f"Question {i}: what is {i} and {i + 1}? It is {2 * i + 1}, as anyone can see." for i in range(60)]
    path.write_text("\n\n".join(lines))
    return path


def test_a_run_shows_what_it_did_to_both_texts(
    adapter: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = run(adapter, tmp_path / "out", task, "--dampen-intruders", "0.3")
    losses = document["stages"]["held-out loss"]
    texts = [f"task text {task}", "general text default-eval"]
    models = ["adapter unmerged", "base without the adapter", "merged", "merged, intruders scaled by 0.3"]
    assert list(losses) == [f"{text}: {model}" for text in texts for model in models]
    for text in texts:
        unmerged, base, merged, dampened = (losses[f"{text}: {model}"] for model in models)
        assert abs(merged["change"]) < 0.02, "bfloat16 computes both"
        assert base["change"] == pytest.approx(base["loss"] - unmerged["loss"], abs=1e-6)
        assert dampened["from"] <= dampened["change"] <= dampened["to"]
        assert abs(dampened["change"]) > 0.1
    facts = document["stages"]["merge"]["intruder dimensions"]
    assert facts["scaled by"] == 0.3
    assert facts["found"] > 0
    assert document["findings"] == [], "the audit expects the scaled weights"
    assert any("the reference is still the unmerged" in note for note in document["fidelity"]["notes"])
    plain = run(adapter, tmp_path / "plain", task)
    assert plain["fidelity"]["merge"]["kl"]["mean"] < 0.01
    assert document["fidelity"]["merge"]["kl"]["mean"] > 0.1
    assert document["fidelity"]["requantization"]["kl"]["mean"] < 0.01, "what was written is the dampened merge"
    page = (tmp_path / "out" / "qconv-report.html").read_text()
    section = page.partition('id="intruders"')[2].partition("</section>")[0]
    assert "stronger colour is more" in section
    assert all(model in section for model in models)
    said = capsys.readouterr().err
    assert "loss on task text" in said
    assert f"intruder dimensions scaled by 0.3: {facts['found']}, in {facts['in weights']} weights" in said

    rows = corpus.pack_rows(
        corpus.load_documents(str(task), corpus.load_tokenizer(TINY_LLAMA)), corpus.load_tokenizer(TINY_LLAMA),
        8, 64, 0, allow_fewer=True,
    )  # fmt: skip
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=rows.ids_TS).logits[:, :-1]
    own = cross_entropy(logits.flatten(0, 1), rows.ids_TS[:, 1:].flatten())
    assert losses[f"{texts[0]}: {models[3]}"]["loss"] == pytest.approx(float(own), abs=0.02)


def test_validating_a_folder_that_was_made_this_way(adapter: Path, task: Path, tmp_path: Path) -> None:
    run(adapter, tmp_path / "out", task, "--dampen-intruders", "0")
    arguments = ["validate", "--reference", str(TINY_LLAMA), "--adapter", str(adapter), "--trained-on", "16bit"]
    arguments += ["--candidate", str(tmp_path / "out"), "--device", "cpu", "--eval-tokens", "128"]
    arguments += ["--eval-seq-len", "64", "--attribution", "never", "--no-default-gates"]
    found = {}
    for name, options in (("without", []), ("with", ["--dampen-intruders", "0"])):
        main([*arguments, *options, "--report", str(tmp_path / name)])
        found[name] = json.loads((tmp_path / name / "qconv-report.json").read_text())["findings"]
    assert found["with"] == []
    assert found["without"] != []


def test_it_goes_with_a_combination(adapter: Path) -> None:
    config = CombinationConfig(adapters=(str(adapter), str(adapter)), method="linear", weights=(0.5, 0.5))
    options = AdapterOptions(dampen_intruders=0.0)
    both = load_reference(open_checkpoint(TINY_LLAMA), None, "16bit", config, options).merged
    one = load_reference(open_checkpoint(TINY_LLAMA), str(adapter), "16bit", options=options).merged
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(both.read(name), one.read(name), atol=1e-4, rtol=0)


def job(**more: Any) -> MergeJob:
    values: dict[str, Any] = {"base": "b", "adapter": "a", "outputs": (OutputConfig(out=Path("o")),)}
    return MergeJob(**(values | more))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AdapterOptions(dampen_intruders=1.2), "0 to 1, got 1.2"),
        (lambda: AdapterOptions(dampen_intruders=float("nan")), "0 to 1, got nan"),
        (lambda: job(options=AdapterOptions(dampen_intruders=0.5)), "give --task-data"),
        (lambda: job(adapter=None, options=AdapterOptions(dampen_intruders=0.5), validation=None), "no adapter"),
        (lambda: job(adapter=None, validation=ValidationConfig(task_data="t")), "there is no adapter"),
        (
            lambda: job(
                adapter=None,
                combination=CombinationConfig(adapters=("a", "b"), method="ties", density=0.5),
                options=AdapterOptions(dampen_intruders=0.5),
                validation=None,
            ),
            "not with --combine ties",
        ),
        (lambda: ValidateJob(reference="b", candidate="c", options=AdapterOptions(dampen_intruders=0.5)), "no adapter"),
        (
            lambda: ValidateJob(reference="b", candidate="c", validation=ValidationConfig(task_data="t")),
            "for qconv merge",
        ),
    ],
)
def test_refused(make: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()


def test_no_validate_leaves_no_task_data(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["merge", "b", "a", "-o", "o", "--no-validate", "--task-data", "t", "--dampen-intruders", "0.5"])
    assert "--task-data: --no-validate leaves nothing to compare; drop it" in capsys.readouterr().err


def test_in_a_recipe(adapter: Path, task: Path, tmp_path: Path) -> None:
    text: dict[str, Any] = {"recipe": 1, "base": str(TINY_LLAMA), "adapter": str(adapter), "trained-on": "16bit"}
    text |= {"outputs": [{"out": "out"}], "dampen-intruders": 0.5, "validation": {"task-data": str(task)}}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(text))
    found = load_recipe(path).job
    assert found.options == AdapterOptions(dampen_intruders=0.5)
    assert found.validation is not None
    assert found.validation.task_data == str(task)
    path.write_text(json.dumps(text | {"dampen-intruders": 2}))
    with pytest.raises(RecipeError, match=r"dampen-intruders.*0 to 1"):
        load_recipe(path)


def test_the_written_model_computes_what_the_view_does(adapter: Path, tmp_path: Path) -> None:
    reference = load_reference(
        open_checkpoint(TINY_LLAMA), str(adapter), "16bit", options=AdapterOptions(dampen_intruders=0.0)
    )
    whole = plain_model(reference.merged, tmp_path / "whole")
    plain = plain_model(reference.undampened(reference.base), tmp_path / "plain")
    ids = torch.arange(16)[None]
    with torch.no_grad():
        assert float((whole(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max()) > 1e-2
