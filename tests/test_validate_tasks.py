"""Tasks: paired statistics against published values and scipy; the whole path against planted faults.

The texts are speeches that come with the package (public domain); the tiny Llama was trained on such.
"""

from __future__ import annotations

import json
import logging
import lzma
import math
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconv.errors import CalibrationError, NumericsError, UsageError
from qconv.progress import Progress
from qconv.validate.paired import (
    Stratum,
    adjusted_wald_interval,
    bootstrap_interval,
    difference,
    mcnemar_exact,
)
from qconv.validate.tasks import evaluate_tasks, measurements, pair_samples

KEYS = {
    *("name", "metric", "num_samples", "reference", "candidate", "difference", "interval_95"),
    *("better_to_worse", "worse_to_better", "mcnemar_p", "higher_is_better"),
}


def stratum(down: int, up: int, num: int, weight: float = 1.0) -> Stratum:
    same = num - down - up
    return Stratum(
        reference=[1] * down + [0] * up + [1] * same, candidate=[0] * down + [1] * up + [1] * same, weight=weight
    )


# Paired statistics


@pytest.mark.parametrize(
    ("flips", "p"),
    [
        # The examples of Fagerland, Lydersen and Laake 2013 (BMC Med Res Methodol 13:91): airway hyper-responsiveness
        # before and after stem cell transplantation (1 against 7), complete response in myeloma (6 against 16).
        ((1, 7), 0.0703),
        ((6, 16), 0.0525),
        # By hand: 2 (1 + 10 + 45) / 1024, and one flip proves nothing.
        ((2, 8), 0.109375),
        ((0, 1), 1.0),
    ],
)
def test_mcnemar_is_the_published_value(flips: tuple[int, int], p: float) -> None:
    assert mcnemar_exact(*flips) == pytest.approx(p, abs=5e-5)
    assert mcnemar_exact(*reversed(flips)) == mcnemar_exact(*flips)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_binomial_sum(down: int, up: int) -> None:
    flips = down + up
    tail = sum(Fraction(math.comb(flips, i), 2**flips) for i in range(min(down, up) + 1))
    assert mcnemar_exact(down, up) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-12)


@pytest.mark.parametrize(("down", "up"), [(0, 0), (3, 3), (1, 9), (40, 75), (5100, 4900), (9000, 1000)])
def test_mcnemar_agrees_with_scipy(down: int, up: int) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    expected = stats.binomtest(down, down + up, 0.5).pvalue if down + up else 1.0
    assert mcnemar_exact(down, up) == pytest.approx(expected, rel=1e-9)


def test_adjusted_wald_is_the_published_interval() -> None:
    # Fagerland, Lydersen and Laake 2014 (Stat Med 33:2850), table V: 1 against 7 of 21 pairs, -0.508 to -0.013.
    low, high = adjusted_wald_interval([stratum(7, 1, 21)])
    assert (low, high) == (pytest.approx(-0.508, abs=5e-4), pytest.approx(-0.013, abs=1e-3))


def test_no_flips_leave_an_interval_that_shrinks_with_documents() -> None:
    (low, high), (_, tighter) = (adjusted_wald_interval([stratum(0, 0, num)]) for num in (20, 2000))
    assert low == -high
    # One pair of each kind is added: 1.96 sqrt(2) / (n + 2).
    assert high == pytest.approx(1.95996 * math.sqrt(2) / 22, rel=1e-4)
    assert tighter == pytest.approx(1.95996 * math.sqrt(2) / 2002, rel=1e-4)


def test_intervals_cover_what_they_claim() -> None:
    """Of 400 samples from a known truth, about 95% of the intervals hold the true difference."""
    rng = random.Random(7)
    truth, hits = -0.05, {"wald": 0, "bootstrap": 0}
    for _ in range(400):
        draws = [rng.random() for _ in range(150)]
        down, up = sum(x < 0.10 for x in draws), sum(0.10 <= x < 0.15 for x in draws)
        low, high = adjusted_wald_interval([stratum(down, up, 150)])
        hits["wald"] += low <= truth <= high
        low, high = bootstrap_interval([stratum(down, up, 150)], resamples=200)
        hits["bootstrap"] += low <= truth <= high
    # Three standard errors of a share of 0.95 among 400 are 0.033.
    assert 0.917 <= hits["wald"] / 400 <= 0.983
    assert 0.90 <= hits["bootstrap"] / 400 <= 0.983


def test_bootstrap_of_a_mean_agrees_with_the_same_mean_as_an_aggregate() -> None:
    pair = [Stratum(reference=[0.1, 0.9, 0.4, 0.7, 0.3], candidate=[0.2, 0.5, 0.4, 0.1, 0.0])]
    fast = bootstrap_interval(pair, seed=3)
    slow = bootstrap_interval(pair, lambda items: sum(items) / len(items), seed=3)
    assert fast == pytest.approx(slow)
    assert fast[0] < difference(pair)[2] < fast[1]


def test_bootstrap_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    rng = np.random.default_rng(0)
    reference = rng.normal(0.5, 0.2, 200)
    candidate = reference - rng.normal(0.05, 0.1, 200)
    ours = bootstrap_interval([Stratum(reference=list(reference), candidate=list(candidate))], resamples=5000)
    theirs = stats.bootstrap(
        (candidate - reference,), np.mean, n_resamples=5000, method="percentile", random_state=1
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.0015)


def test_strata_keep_their_weights() -> None:
    strata = [stratum(10, 0, 100, weight=0.5), stratum(0, 1, 2, weight=0.5)]
    assert difference(strata)[2] == pytest.approx(-0.5 * 0.1 + 0.5 * 0.5)
    low, high = adjusted_wald_interval(strata)
    assert low < 0.2 < high
    assert bootstrap_interval([stratum(1, 0, 1)]) == (-math.inf, math.inf)


def test_unpaired_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot pair 2"):
        Stratum(reference=[1, 0], candidate=[1])


# Pairing of samples


def sample(document: int, **changes: Any) -> dict[str, Any]:
    hashes = {what: f"{what} {document}" for what in ("doc_hash", "prompt_hash", "target_hash")}
    return {"doc_id": document, "filter": "none", "metrics": ["acc"], "acc": 1.0, **hashes, **changes}


def test_samples_pair_by_document_in_any_order() -> None:
    pairs = pair_samples("t", [sample(0), sample(1)], [sample(1, acc=0.0), sample(0)])
    assert [(a["doc_id"], b["doc_id"], b["acc"]) for a, b in pairs] == [(0, 0, 1.0), (1, 1, 0.0)]


@pytest.mark.parametrize(
    ("reference", "candidate", "message"),
    [
        ([], [], "no documents"),
        ([sample(0), sample(1)], [sample(0)], "1 of the answers have no partner, first document 1"),
        ([sample(0)], [sample(0, filter="strict")], "2 of the answers have no partner"),
        ([sample(0), sample(0)], [sample(0)], "1 documents were answered more than once"),
        ([sample(0)], [sample(0, prompt_hash="other")], "document 0: reference and candidate saw different prompts"),
        ([sample(0)], [sample(0, doc_hash="other")], "different docs"),
    ],
)
def test_samples_that_do_not_pair_are_refused(reference: Any, candidate: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        pair_samples("t", reference, candidate)


def test_measurements_grow_as_the_candidate_gets_worse() -> None:
    common = {"interval_95": [-0.3, -0.1], "difference": -0.2}
    measured = measurements(
        [
            {"name": "quiz", "metric": "acc", "higher_is_better": True, **common},
            {"name": "text", "metric": "word_perplexity", "higher_is_better": False, **common},
        ]
    )
    assert measured == {
        "task.quiz.acc_drop": {"value": 0.2, "interval_95": [0.1, 0.3]},
        "task.text.word_perplexity_rise": {"value": -0.2, "interval_95": [-0.3, -0.1]},
    }


def test_without_lm_eval_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(UsageError, match=r'pip install "qconv\[eval\]"'):
        evaluate_tasks({"reference": torch.nn.Linear(1, 1), "candidate": torch.nn.Linear(1, 1)}, None, ["arc_easy"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {"reference": torch.nn.Linear(1, 1)}}, "compare reference and candidate"),
        ({"limit": 0}, "at least 1, got 0"),
        ({"chat_template": True}, "no chat template"),
    ],
)
def test_impossible_requests_are_refused(changes: dict[str, Any], message: str) -> None:
    linear = torch.nn.Linear(1, 1)
    options: dict[str, Any] = {"models": {"reference": linear, "candidate": linear}, "tokenizer": None, "tasks": ["t"]}
    with pytest.raises(UsageError, match=message):
        evaluate_tasks(**(options | changes))


# Whole tasks, through lm_eval


@pytest.fixture
def harness(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm_eval is here, and the data sets that it prepares go into a temporary folder."""
    pytest.importorskip("lm_eval", reason='lm-evaluation-harness is not installed (pip install "qconv[eval]")')
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="session")
def load(tiny_llama: Path) -> Callable[[], Any]:
    from transformers import AutoModelForCausalLM

    return lambda: AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="auto")


@pytest.fixture(scope="session")
def load_scrambled(load: Callable[[], Any]) -> Callable[[], Any]:
    """The same model with the columns of every down projection in another order."""

    def scrambled() -> Any:
        model, generator = load(), torch.Generator().manual_seed(0)
        for layer in model.model.layers:
            weight = layer.mlp.down_proj.weight
            weight.data = weight.data[:, torch.randperm(weight.shape[1], generator=generator)]
        return model

    return scrambled


@pytest.fixture(scope="session")
def speeches() -> list[str]:
    with lzma.open(str(files("qconv") / "data" / "speeches-evaluation.txt.xz"), "rt", encoding="utf-8") as file:
        return file.read().split()


@pytest.fixture
def task_folder(tmp_path: Path, speeches: list[str], harness: None) -> Path:
    """``order`` (multiple choice), ``words`` (generation, two filters), ``text`` (perplexity), group ``all_tiny``."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    chunks = [speeches[i : i + 16] for i in range(0, 16 * 60, 16)]
    # Which goes on: the words that were said, or the same words from back to front? Either can stand first, as a
    # model that cannot tell takes the first.
    order = []
    for i, chunk in enumerate(chunks):
        right, wrong = " ".join(chunk[11:]), " ".join(reversed(chunk[11:]))
        choices = [wrong, right] if i % 2 else [right, wrong]
        order.append({"text": " ".join(chunk[:11]), "choices": choices, "answer": i % 2})
    places = [i for i, word in enumerate(speeches) if i > 20 and word == "States" and speeches[i - 1] == "United"]
    words = [{"text": " ".join(speeches[i - 8 : i]), "answer": "States"} for i in places[:12]]
    texts = [{"text": " ".join(chunk)} for chunk in chunks[:10]]
    for name, rows in {"order": order, "words": words, "text": texts}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    write_task(
        folder,
        "order",
        output_type="multiple_choice",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=[mean_metric("acc"), mean_metric("acc_norm")],
    )
    first_word = [{"function": "regex", "regex_pattern": r"(\w+)"}, {"function": "take_first"}]
    write_task(
        folder,
        "words",
        output_type="generate_until",
        generation_kwargs={"until": ["."], "max_gen_toks": 3, "do_sample": False},
        doc_to_target="{{answer}}",
        metric_list=[mean_metric("exact_match")],
        filter_list=[{"name": "first-word", "filter": first_word}, {"name": "raw", "filter": first_word[1:]}],
    )
    write_task(
        folder,
        "text",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )
    group = {
        "group": "all_tiny",
        "task": ["order", "words"],
        "aggregate_metric_list": [{"metric": "acc", "filter_list": ["none"], "weight_by_size": True}],
    }
    (folder / "all_tiny.yaml").write_text(json.dumps(group), encoding="utf-8")  # JSON is YAML
    return folder


def mean_metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


def write_task(folder: Path, name: str, **options: Any) -> Path:
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},  # beside the YAML file
        "test_split": "test",
        "doc_to_text": "{{text}}",
        **options,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(task), encoding="utf-8")
    return path


@contextmanager
def recorded_results() -> Iterator[list[dict[str, Any]]]:
    """What lm_eval itself returned, run by run."""
    from lm_eval import evaluator

    seen: list[dict[str, Any]] = []
    original = evaluator.evaluate

    def recording(*args: Any, **kwargs: Any) -> Any:
        seen.append(original(*args, **kwargs))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "evaluate", recording)
        yield seen


def by_metric(tasks: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(task["name"], task["metric"]): task for task in tasks}


def test_an_identical_candidate_flips_nothing(task_folder: Path, load: Any, tokenizer: Any) -> None:
    tasks = evaluate_tasks(
        {"reference": load, "candidate": load}, tokenizer, ["order", "words"], include=task_folder, batch_size=16
    )
    assert [(task["name"], task["metric"], task["num_samples"]) for task in tasks] == [
        ("order", "acc", 60),
        ("order", "acc_norm", 60),
        ("words", "exact_match,first-word", 12),
        ("words", "exact_match,raw", 12),
    ]
    for task in tasks:
        assert set(task) == KEYS
        assert (task["better_to_worse"], task["worse_to_better"], task["mcnemar_p"]) == (0, 0, 1.0)
        assert task["difference"] == 0
        assert task["interval_95"][0] < 0 < task["interval_95"][1]
    # The tiny Llama knows its speeches; a pattern that never matched would score 0 everywhere and flip nothing.
    values = by_metric(tasks)
    assert values["order", "acc"]["reference"] > 0.9
    assert values["words", "exact_match,first-word"]["reference"] > 0.9


def test_a_scrambled_candidate_is_found_out(task_folder: Path, load: Any, load_scrambled: Any, tokenizer: Any) -> None:
    tasks = evaluate_tasks(
        {"reference": load, "candidate": load_scrambled},
        tokenizer,
        [str(task_folder / "all_tiny.yaml"), str(task_folder / "text.yaml")],
        include=task_folder,
        batch_size=16,
    )
    values = by_metric(tasks)
    order = values["order", "acc"]
    assert order["mcnemar_p"] < 0.01
    assert order["interval_95"][1] < 0
    assert order["better_to_worse"] - order["worse_to_better"] == round(-60 * order["difference"])
    assert values["words", "exact_match,first-word"]["mcnemar_p"] < 0.01
    text = values["text", "word_perplexity"]
    assert (text["mcnemar_p"], text["better_to_worse"], text["num_samples"]) == (None, None, 10)
    assert 0 < text["interval_95"][0] < text["difference"] < text["interval_95"][1]
    assert ("text", "bits_per_byte") not in values
    # The group aggregates acc alone, and `order` alone has it.
    assert {**values["all_tiny", "acc"], "name": "order"} == order
    drops = measurements(tasks)
    assert drops["task.order.acc_drop"]["interval_95"][0] > 0
    assert drops["task.text.word_perplexity_rise"]["value"] == text["difference"]


def test_values_are_those_that_lm_eval_reports(
    task_folder: Path, load: Any, load_scrambled: Any, tokenizer: Any
) -> None:
    """lm_eval's own aggregation of the same run, and transformers' log-probabilities, are the oracles."""
    with recorded_results() as seen:
        tasks = evaluate_tasks(
            {"reference": load, "candidate": load_scrambled},
            tokenizer,
            ["order", "text"],
            include=task_folder,
            limit=8,
            batch_size=4,
        )
    for task in tasks:
        for model, result in zip(("reference", "candidate"), seen, strict=True):
            assert task[model] == pytest.approx(result["results"][task["name"]][f"{task['metric']},none"], rel=1e-12)
    assert by_metric(tasks)["order", "acc"]["num_samples"] == 8

    model = load().eval()
    rows = [json.loads(line) for line in (task_folder / "order.jsonl").read_text(encoding="utf-8").splitlines()]
    logged, right = list(seen[0]["samples"]["order"]), 0
    for row in rows[:8]:
        scores = []
        for choice in row["choices"]:
            prompt = tokenizer(row["text"], add_special_tokens=False).input_ids
            whole = tokenizer(f"{row['text']} {choice}", add_special_tokens=False).input_ids
            with torch.no_grad():
                logp = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
            scores.append(sum(float(logp[i - 1, whole[i]]) for i in range(len(prompt), len(whole))))
        # In bfloat16, lm_eval's default here, log-likelihoods around -60 would be multiples of 0.25.
        assert [response[0] for response in logged.pop(0)["filtered_resps"]] == pytest.approx(scores, abs=0.1)
        right += scores.index(max(scores)) == row["answer"]
    assert by_metric(tasks)["order", "acc"]["reference"] == right / 8


def test_groups_weight_their_tasks_as_they_say(
    task_folder: Path, load: Any, load_scrambled: Any, tokenizer: Any
) -> None:
    """lm_eval's aggregation of the group is the oracle."""
    short = (task_folder / "order.yaml").read_text(encoding="utf-8").replace('"task": "order"', '"task": "short"')
    rows = (task_folder / "order.jsonl").read_text(encoding="utf-8").splitlines()
    (task_folder / "short.jsonl").write_text("\n".join(rows[:3]), encoding="utf-8")
    (task_folder / "short.yaml").write_text(short.replace("order.jsonl", "short.jsonl"), encoding="utf-8")
    for name, by_size in (("pooled", True), ("averaged", False)):
        aggregates = [{"metric": metric, "weight_by_size": by_size} for metric in ("acc", "acc_norm")]
        group = {"group": name, "task": ["order", "short"], "aggregate_metric_list": aggregates}
        (task_folder / f"{name}.yaml").write_text(json.dumps(group), encoding="utf-8")
    with recorded_results() as seen:
        tasks = evaluate_tasks(
            {"reference": load, "candidate": load_scrambled},
            tokenizer,
            ["pooled", "averaged"],
            include=task_folder,
            limit=12,
            batch_size=8,
        )
    values = by_metric(tasks)
    for name in ("pooled", "averaged"):
        for metric in ("acc", "acc_norm"):
            task = values[name, metric]
            assert task["num_samples"] == 15
            assert task["reference"] == pytest.approx(seen[0]["results"][name][f"{metric},none"])
            assert task["candidate"] == pytest.approx(seen[1]["results"][name][f"{metric},none"])
            parts = [values[part, metric]["better_to_worse"] for part in ("order", "short")]
            assert task["better_to_worse"] == sum(parts)
            assert task["interval_95"][0] < task["difference"] < task["interval_95"][1]
    assert values["pooled", "acc"]["candidate"] != values["averaged", "acc"]["candidate"]


def test_nothing_of_lm_eval_stays_behind(
    task_folder: Path, load: Any, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    import lm_eval.evaluator  # noqa: F401  # what importing leaves behind is not the point here

    logger = logging.getLogger("lm_eval")
    model = load()
    assert tokenizer.pad_token is None  # lm_eval sets one
    random.seed(5)
    torch.manual_seed(5)
    expected = (random.random(), torch.rand(1))
    random.seed(5)
    torch.manual_seed(5)
    before = (dict(os.environ), logger.level, list(logger.handlers), logger.propagate, tokenizer.pad_token)
    capfd.readouterr()
    evaluate_tasks(
        {"reference": model, "candidate": model}, tokenizer, ["order", "words"], include=task_folder, limit=2
    )
    assert (dict(os.environ), logger.level, list(logger.handlers), logger.propagate, tokenizer.pad_token) == before
    assert (random.random(), torch.rand(1)) == expected
    assert "tie_weights" not in vars(model)
    assert capfd.readouterr() == ("", "")


def test_a_head_of_its_own_is_not_tied_to_the_embedding(task_folder: Path, load: Any, tokenizer: Any) -> None:
    model = load()
    head = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.lm_head.weight = head
    tasks = evaluate_tasks({"reference": load, "candidate": model}, tokenizer, ["order"], include=task_folder, limit=6)
    assert model.lm_head.weight is head
    # All tokens are equally likely: nothing is left of what was learned.
    assert by_metric(tasks)["order", "acc"]["candidate"] < by_metric(tasks)["order", "acc"]["reference"]


def test_models_are_never_in_memory_together(task_folder: Path, load: Any, tokenizer: Any) -> None:
    import weakref

    alive: list[weakref.ref[Any]] = []

    def loading() -> Any:
        assert all(ref() is None for ref in alive)
        model = load()
        alive.append(weakref.ref(model))
        return model

    evaluate_tasks({"reference": loading, "candidate": loading}, tokenizer, ["order"], include=task_folder, limit=2)
    assert len(alive) == 2


def test_nan_is_an_error_and_not_the_first_answer(task_folder: Path, load: Any, tokenizer: Any) -> None:
    broken = load()
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NumericsError, match="candidate gives NaN log-likelihoods: task order, document 0"):
        evaluate_tasks({"reference": load, "candidate": broken}, tokenizer, ["order"], include=task_folder, limit=2)


def test_cut_prompts_are_told(task_folder: Path, load: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = load()
    model.config.max_position_embeddings = 16
    evaluate_tasks(
        {"reference": model, "candidate": model},
        tokenizer,
        ["order"],
        include=task_folder,
        limit=2,
        progress=Progress(verbosity=1),
    )
    out, err = capsys.readouterr()
    assert out == ""
    assert "exceeds model's maximum length (16)" in err


def refuse(folder: Path, load: Any, tokenizer: Any, task: str, **options: Any) -> str:
    with pytest.raises((UsageError, CalibrationError)) as error:
        evaluate_tasks({"reference": load, "candidate": load}, tokenizer, [task], include=folder, **options)
    return str(error.value)


def test_unknown_tasks_name_their_neighbours(task_folder: Path, load: Any, tokenizer: Any) -> None:
    (task_folder / "broken.yaml").write_text("task: [unclosed", encoding="utf-8")
    message = refuse(task_folder, load, tokenizer, "all_tinny")
    assert "unknown task 'all_tinny'; did you mean all_tiny" in message
    assert "broken.yaml: cannot be read as a task file" in message


def test_data_that_is_not_here_is_named(task_folder: Path, load: Any, tokenizer: Any) -> None:
    path = write_task(task_folder, "far", dataset_path="nobody/nothing", dataset_kwargs={}, doc_to_target="x")
    assert "documents of task far" in refuse(task_folder, load, tokenizer, str(path))
    write_task(task_folder, "gone", dataset_kwargs={"data_files": {"test": "gone.jsonl"}})
    assert "data file gone.jsonl is neither in the working folder nor beside" in refuse(
        task_folder, load, tokenizer, "gone"
    )


def test_task_files_that_are_none_are_refused(task_folder: Path, load: Any, tokenizer: Any) -> None:
    assert "there is no such task file" in refuse(task_folder, load, tokenizer, str(task_folder / "absent.yaml"))
    (task_folder / "list.yaml").write_text("- a", encoding="utf-8")
    assert "a task file is a YAML mapping, found list" in refuse(
        task_folder, load, tokenizer, str(task_folder / "list.yaml")
    )
    path = write_task(task_folder, "order", output_type="multiple_choice", metric_list=[{"metric": "no_such_metric"}])
    assert "lm_eval cannot build task order" in refuse(task_folder, load, tokenizer, str(path))
    assert "expected a folder with task files" in refuse(task_folder / "absent", load, tokenizer, "order")


def test_code_of_task_files_runs_only_when_allowed(task_folder: Path, load: Any, tokenizer: Any) -> None:
    mark = task_folder / "was-run"
    (task_folder / "code.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\ndef text(doc):\n    return doc['text']\n",
        encoding="utf-8",
    )
    order = (task_folder / "order.yaml").read_text(encoding="utf-8").replace('"order"', '"coded"')
    (task_folder / "base.yaml").write_text(order.replace('"{{text}}"', "!function code.text"), encoding="utf-8")
    (task_folder / "coded.yaml").write_text("include: base.yaml\ntask: coded\n", encoding="utf-8")
    path = str(task_folder / "coded.yaml")
    assert "base.yaml: !function code.text runs Python" in refuse(task_folder, load, tokenizer, path)
    assert not mark.exists()
    tasks = evaluate_tasks(
        {"reference": load, "candidate": load}, tokenizer, [path], include=task_folder, limit=2, allow_task_code=True
    )
    assert mark.exists()
    assert tasks[0]["num_samples"] == 2


def test_tasks_that_run_what_models_write_are_refused(task_folder: Path, load: Any, tokenizer: Any) -> None:
    # Refused before it is built: the data are not even looked for, and nothing that loading would run is run.
    path = write_task(task_folder, "gone", unsafe_code=True)
    assert "task gone runs code that the model writes" in refuse(task_folder, load, tokenizer, str(path))


def test_the_example_of_the_documentation_runs(load: Any, tokenizer: Any, harness: None) -> None:
    folder = Path(__file__).parents[1] / "docs" / "examples" / "tasks"
    tasks = evaluate_tasks(
        {"reference": load, "candidate": load}, tokenizer, ["everyday"], include=folder, batch_size=8
    )
    assert [(task["name"], task["metric"], task["num_samples"]) for task in tasks] == [("everyday", "acc", 40)]
    rows = [json.loads(line) for line in (folder / "everyday.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [len({row["right"] == place for row in rows}) for place in range(4)] == [2] * 4
    assert all(len(set(row["answers"])) == 4 for row in rows)
