"""Statistics against scipy-style numpy in float64, gates, and the reference against peft itself."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from qconv.checkpoint import open_checkpoint
from qconv.config import ValidationConfig
from qconv.convert import dequantize
from qconv.errors import CheckpointError, NumericsError
from qconv.fidelity import Reference, measure_fidelity, reference_model
from qconv.merge import load_adapter, merge
from qconv.progress import QUIET
from qconv.streaming import StreamedModel
from qconv.validate.compare import compare
from qconv.validate.gates import Gate, overall
from qconv.validate.reference import unmerged
from qconv.validate.report import Report, judge, measure
from qconv.validate.statistics import PairStatistics, ReferenceRow, effect_retained, log_probabilities, mean_interval
from tests.conftest import ALL_LINEARS, save_random_adapter
from tests.test_streaming import run


def log_softmax64(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_statistics_agree_with_float64():
    rng = np.random.default_rng(0)
    ref = rng.normal(size=(3, 40, 500)).astype(np.float32) * 3
    cand = ref + rng.normal(size=ref.shape).astype(np.float32) * 0.3
    targets = rng.integers(500, size=(3, 40))
    pair = PairStatistics("candidate")
    for row in range(3):
        reference = ReferenceRow(log_probabilities(torch.from_numpy(ref[row]), "reference"))
        pair.add(reference, log_probabilities(torch.from_numpy(cand[row]), "candidate"), torch.from_numpy(targets[row]))
    p, q = log_softmax64(ref), log_softmax64(cand)
    kl = (np.exp(p) * (p - q)).sum(-1)
    summary = pair.summary()
    assert summary["kl_mean"] == pytest.approx(kl.mean(), rel=1e-6)
    assert summary["kl_p99"] == pytest.approx(np.quantile(kl, 0.99), rel=1e-6)
    assert summary["kl_max"] == pytest.approx(kl.max(), rel=1e-6)
    assert summary["top1_agreement"] == (ref.argmax(-1) == cand.argmax(-1)).mean()
    nll = -np.take_along_axis(q, targets[..., None], -1)
    assert summary["perplexity"] == pytest.approx(np.exp(nll.mean()), rel=1e-6)


def test_identical_models_have_no_distance():
    logits = torch.randn(7, 100)
    pair = PairStatistics("same")
    pair.add(
        ReferenceRow(log_probabilities(logits, "r")), log_probabilities(logits, "c"), torch.zeros(7, dtype=torch.long)
    )
    assert pair.kl_mean == 0
    assert pair.summary()["top1_agreement"] == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_are_refused(bad):
    logits = torch.randn(3, 10)
    logits[1, 4] = bad
    with pytest.raises(NumericsError, match="candidate"):
        log_probabilities(logits, "candidate")


def test_interval_covers_the_true_mean():
    """The 95% interval of 40 rows must miss the true mean in about 5% of draws, not in 15%."""
    generator = torch.Generator().manual_seed(1)
    misses = 0
    for _ in range(300):
        low, high = mean_interval(torch.randn(40, generator=generator) + 2.0, resamples=400)
        misses += not low <= 2.0 <= high
    assert 3 <= misses <= 36


def test_effect_retained():
    base = torch.tensor([0.4, 0.2, 0.6])
    assert effect_retained(base * 0.01, base)["value"] == pytest.approx(0.99)
    assert effect_retained(base, base)["value"] == pytest.approx(0.0)
    with pytest.raises(NumericsError, match="changes no output"):
        effect_retained(base, base * 0)


@pytest.mark.parametrize(
    ("upper", "low", "high", "verdict"),
    [
        (True, 0.1, 0.4, "pass"),
        (True, 0.4, 0.6, "inconclusive"),
        (True, 0.6, 0.9, "fail"),
        (False, 0.6, 0.9, "pass"),
        (False, 0.4, 0.6, "inconclusive"),
        (False, 0.1, 0.4, "fail"),
        (True, float("nan"), float("nan"), "fail"),
        (True, float("-inf"), float("inf"), "inconclusive"),
    ],
)
def test_gate_compares_the_interval(upper, low, high, verdict):
    gate = Gate(name="g", limit=0.5, upper=upper, value=(low + high) / 2, low=low, high=high)
    assert gate.verdict == verdict
    assert overall([gate]) == verdict


def test_worst_verdict_wins():
    def gate(low, high):
        return Gate(name="g", limit=0.5, upper=True, value=0.5, low=low, high=high)

    assert overall([gate(0.1, 0.2), gate(0.4, 0.6)]) == "inconclusive"
    assert overall([gate(0.4, 0.6), gate(0.8, 0.9), gate(0.1, 0.2)]) == "fail"
    assert overall([]) == "pass"


VARIANTS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "bias": {"lora_bias": True}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_equals_peft_unmerged_in_float32(tiny_llama, random_model, tmp_path, variant):
    folder = random_model("qwen2") if variant == "bias" else tiny_llama  # qwen2 has biases in q, k and v
    targets = ["q_proj", "v_proj"] if variant == "bias" else [*ALL_LINEARS, "lm_head"]
    save_random_adapter(folder, tmp_path / "a", str(folder), **VARIANTS[variant], target_modules=targets)
    base = dequantize(open_checkpoint(folder))
    adapter = load_adapter(tmp_path / "a", base)
    ids = torch.randint(2048, (2, 64))
    (logits,) = run(StreamedModel(base, "cpu", torch.float32, unmerged(adapter)), [ids])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        plain = model(ids).logits
        expected = PeftModel.from_pretrained(model, tmp_path / "a").eval()(ids).logits
    assert (expected - plain).abs().max() > 0.05  # the adapter matters
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_reference_equals_bitsandbytes_and_peft_in_4_bits(tiny_nf4, tiny_adapter):
    """In train mode: bitsandbytes' eval forward on CPUs repacks weights in place, and computes differently."""
    base = dequantize(open_checkpoint(tiny_nf4))
    adapter = load_adapter(tiny_adapter, base)
    ids = torch.randint(2048, (4, 64), generator=torch.Generator().manual_seed(0))
    (logits,) = run(StreamedModel(base, "cpu", torch.bfloat16, unmerged(adapter)), [ids])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_nf4), tiny_adapter).train()
    with torch.no_grad():
        expected = model(ids).logits
    pair = PairStatistics("bnb")
    reference = ReferenceRow(log_probabilities(expected.reshape(-1, 2048), "bnb"))
    pair.add(reference, log_probabilities(logits.reshape(-1, 2048), "ours"), ids.reshape(-1))
    assert pair.kl_mean < 2e-4
    assert pair.summary()["top1_agreement"] > 0.97


def test_comparison_blames_the_block(tiny_llama):
    view = dequantize(open_checkpoint(tiny_llama))

    class Broken:
        location, config = view.location, view.config
        specs = staticmethod(view.specs)

        @staticmethod
        def read(name, device="cpu"):
            tensor = view.read(name, device)
            return tensor * 1.3 if name == "model.layers.2.mlp.down_proj.weight" else tensor

    ids = torch.randint(2048, (3, 64))
    models = {name: StreamedModel(source, "cpu", torch.float32) for name, source in [("a", view), ("b", Broken())]}
    result = compare(models["a"], {"candidate": models["b"]}, ids, rows_per_batch=2)
    errors = [block.relative_error for block in result.blocks["candidate"]]
    assert errors[0] == errors[1] == 0
    assert errors[2] > 0.01
    assert result.pairs["candidate"].kl_mean > 1e-4
    assert result.num_positions == 3 * 63


def test_clean_merge_keeps_the_adapter(tiny_nf4, tiny_adapter):
    base = dequantize(open_checkpoint(tiny_nf4))
    adapter = load_adapter(tiny_adapter, base)
    merged = merge(base, [adapter])
    ids = torch.randint(2048, (4, 64), generator=torch.Generator().manual_seed(0))

    def model(view, decorate=None):
        return StreamedModel(view, "cpu", torch.float32, decorate)

    others = {"candidate": model(merged), "base": model(base)}
    result = compare(model(base, unmerged(adapter)), others, ids, rows_per_batch=4)
    assert result.pairs["candidate"].kl_mean < 1e-6  # float32 log-probabilities leave about 1e-7
    assert result.pairs["base"].kl_mean > 1e-2


def test_perplexity_of_the_reference_is_that_of_transformers(tiny_llama):
    view = dequantize(open_checkpoint(tiny_llama))
    ids = torch.randint(2048, (3, 64))
    models = [StreamedModel(view, "cpu", torch.float32) for _ in range(2)]
    result = compare(models[0], {"candidate": models[1]}, ids, rows_per_batch=2)
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)(ids, labels=ids).loss
    assert result.reference_perplexity == pytest.approx(float(loss.exp()), rel=1e-5)
    assert result.pairs["candidate"].perplexity == result.reference_perplexity
    assert (result.num_positions, result.num_rows) == (3 * 63, 3)


@pytest.mark.parametrize(("family", "key"), [("gpt2", "n_layer"), ("llama", "num_hidden_layers")])
def test_another_depth_is_another_model(random_model, family, key):
    """Whatever the family calls its number of layers in config.json."""
    sources = [open_checkpoint(random_model(family)), open_checkpoint(random_model(family, **{key: 3}))]
    reference = Reference(source=sources[0], base=dequantize(sources[0]), adapter=None, kind="16bit")
    with pytest.raises(CheckpointError, match=r"num_hidden_layers 3, the reference .* has 2"):
        measure_fidelity(reference, sources[1], ValidationConfig(), "cpu", QUIET)


@pytest.mark.parametrize(("added_rows", "how"), [(0, "bitsandbytes and peft"), (3, "resizes the vocabulary")])
def test_peft_cannot_load_a_resized_vocabulary_on_the_base(tiny_nf4, tmp_path, monkeypatch, added_rows, how):
    """The decision alone: what would be loaded on a GPU, and from whose memory."""
    save_resized_adapter(tiny_nf4, tmp_path / "a", added_rows)
    source = open_checkpoint(tiny_nf4)
    base = dequantize(source)
    reference = Reference(source=source, base=base, adapter=load_adapter(tmp_path / "a", base), kind="nf4-dq")
    asked: list[str] = []
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: asked.append(device) or (2**40, 2**40))
    monkeypatch.setattr("qconv.fidelity.load_resident", lambda *_: "resident")
    monkeypatch.setattr("qconv.fidelity.streamed_reference", lambda *_: "streamed")
    model, description = reference_model(reference, "cuda:1")
    assert how in description
    assert model == ("streamed" if added_rows else "resident")
    assert asked == ["cuda:1"]
    plain = AutoModelForCausalLM.from_pretrained(tiny_nf4)
    with pytest.raises(RuntimeError, match="size mismatch") if added_rows else nullcontext():
        PeftModel.from_pretrained(plain, tmp_path / "a")


def save_resized_adapter(base: Path, folder: Path, added_rows: int) -> None:
    """A LoRA with the embedding saved along, after `resize_token_embeddings`."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if added_rows:
        model.resize_token_embeddings(2048 + added_rows)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder, save_embedding_layers=bool(added_rows))


def test_report_is_json_without_nan(tiny_llama):
    view = dequantize(open_checkpoint(tiny_llama))
    models = [StreamedModel(view, "cpu", torch.float32) for _ in range(2)]
    result = compare(models[0], {"candidate": models[1]}, torch.randint(2048, (1, 64)), rows_per_batch=1)
    fidelity = measure(result, {"source": "x"})
    gates = judge(fidelity, ValidationConfig(max_kl=0.1))
    report = Report(subject={"base": "b"}, fidelity=fidelity, gates=gates)
    document = json.loads(report.to_json(), parse_constant=lambda c: pytest.fail(f"{c} in JSON"))
    assert document["verdict"] == "inconclusive"  # one row has no interval
    assert document["fidelity"]["candidate"]["kl_mean"] == 0
    assert "KL mean" in report.to_markdown()
