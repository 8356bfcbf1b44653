"""The reference against peft and bitsandbytes themselves, and what a comparison of models says."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from qconv.checkpoint import open_checkpoint
from qconv.config import ValidationConfig
from qconv.convert import dequantize
from qconv.corpus import TokenRows
from qconv.errors import CheckpointError
from qconv.fidelity import measure_fidelity
from qconv.lineup import line_up
from qconv.merge import load_adapter, merge
from qconv.progress import QUIET
from qconv.runners import Candidate, Reference, reference_model
from qconv.streaming import BlockModel, StreamedModel
from qconv.validate.compare import Entrant, Pair, compare
from qconv.validate.distribution import Distribution
from qconv.validate.reference import unmerged
from tests.conftest import ALL_LINEARS, save_random_adapter
from tests.test_streaming import run


def rows_of(ids_TS: torch.Tensor) -> TokenRows:
    """Every row its own document."""
    return TokenRows(ids_TS, torch.arange(len(ids_TS), dtype=torch.int32)[:, None].expand_as(ids_TS))


def entrants(num_rows: int, **models: BlockModel) -> list[Entrant]:
    return [Entrant(name=name, model=model, num_rows=num_rows, rows_per_batch=2) for name, model in models.items()]


def against_reference(*names: str) -> list[Pair]:
    return [Pair(name=name, reference="reference", other=name) for name in names]


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
    bnb, ours = (Distribution(x.reshape(-1, 2048), "x") for x in (expected, logits))
    kl_T, _ = bnb.divergences(ours)
    assert kl_T.mean() < 2e-4
    assert (bnb.top_ids_TK[:, 0] == ours.top_ids_TK[:, 0]).float().mean() > 0.97


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
    models = [StreamedModel(source, "cpu", torch.float32) for source in (view, Broken())]
    result = compare(
        entrants(3, reference=models[0], candidate=models[1]), against_reference("candidate"), rows_of(ids)
    )
    errors = [block.relative_error for block in result.blocks]
    assert errors[0] == errors[1] == 0
    assert errors[2] > 0.01
    assert result.blocks[0].cosine == 1 > result.blocks[2].cosine > 0.9
    assert result.pairs["candidate"].kl_mean > 1e-4
    assert result.pairs["candidate"].num_positions == 3 * 63


class HoldsItsEmbedding(StreamedModel):
    """As a model that is in memory as a whole says of itself."""

    head_bytes = 0


def test_embeddings_that_are_read_are_gone_before_whole_models_are_run(tiny_llama, monkeypatch):
    view = dequantize(open_checkpoint(tiny_llama))
    whole = HoldsItsEmbedding(view, "cpu", torch.float32)
    others = [StreamedModel(view, "cpu", torch.float32) for _ in range(2)]
    order = []
    embed = StreamedModel.embed
    monkeypatch.setattr(StreamedModel, "embed", lambda self, batches: order.append(self) or embed(self, batches))
    ids = torch.randint(2048, (2, 64), generator=torch.Generator().manual_seed(0))
    models = entrants(2, reference=whole, candidate=others[0], merged=others[1], floor=whole)
    pairs = against_reference("candidate", "merged", "floor")
    result = compare(models, pairs, rows_of(ids), after_embedding=lambda: order.append("after"))
    assert order == [*others, "after", whole, whole]
    assert all(pair.kl_mean < 1e-9 for pair in result.pairs.values())


def test_clean_merge_keeps_the_adapter(tiny_nf4, tiny_adapter):
    base = dequantize(open_checkpoint(tiny_nf4))
    adapter = load_adapter(tiny_adapter, base)
    merged = merge(base, [adapter])
    ids = torch.randint(2048, (4, 64), generator=torch.Generator().manual_seed(0))

    def model(view, decorate=None):
        return StreamedModel(view, "cpu", torch.float32, decorate)

    models = entrants(4, reference=model(base, unmerged(adapter)), candidate=model(merged), base=model(base))
    result = compare(models, against_reference("candidate", "base"), rows_of(ids))
    assert result.pairs["candidate"].kl_mean < 1e-6  # float32 log-probabilities leave about 1e-7
    assert result.pairs["base"].kl_mean > 1e-2


def test_perplexity_of_the_reference_is_that_of_transformers(tiny_llama):
    view = dequantize(open_checkpoint(tiny_llama))
    ids = torch.randint(2048, (3, 64))
    models = [StreamedModel(view, "cpu", torch.float32) for _ in range(2)]
    result = compare(
        entrants(3, reference=models[0], candidate=models[1]), against_reference("candidate"), rows_of(ids)
    )
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)(ids, labels=ids).loss
    summary = result.pairs["candidate"].summary()
    assert summary["reference_perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)
    assert summary["perplexity"] == summary["reference_perplexity"]
    assert (summary["positions"], summary["documents"]) == (3 * 63, 3)


@pytest.mark.parametrize(("family", "key"), [("gpt2", "n_layer"), ("llama", "num_hidden_layers")])
def test_another_depth_is_another_model(random_model, family, key):
    """Whatever the family calls its number of layers in config.json."""
    sources = [open_checkpoint(random_model(family)), open_checkpoint(random_model(family, **{key: 3}))]
    reference = Reference(source=sources[0], base=dequantize(sources[0]), adapter=None, kind="16bit")
    with pytest.raises(CheckpointError, match=r"num_hidden_layers 3, the reference .* has 2"):
        measure_fidelity(reference, Candidate.of(sources[1]), ValidationConfig(), "cpu", QUIET)


@pytest.mark.parametrize(("added_rows", "how"), [(0, "bitsandbytes and peft"), (3, "resizes the vocabulary")])
def test_peft_cannot_load_a_resized_vocabulary_on_the_base(tiny_nf4, tmp_path, monkeypatch, added_rows, how):
    """The decision alone: what would be loaded on a GPU, and from whose memory."""
    save_resized_adapter(tiny_nf4, tmp_path / "a", added_rows)
    source = open_checkpoint(tiny_nf4)
    base = dequantize(source)
    reference = Reference(source=source, base=base, adapter=load_adapter(tmp_path / "a", base), kind="nf4-dq")
    asked: list[str] = []
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: asked.append(device) or (2**40, 2**40))
    monkeypatch.setattr("qconv.runners.load_resident", lambda *_: "resident")
    monkeypatch.setattr("qconv.runners.streamed", lambda *_: "streamed")
    model, description = reference_model(reference, base, "cuda:1", False)
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


def test_what_a_block_is_merged_with_is_read_ahead(tiny_nf4, tiny_adapter, monkeypatch):
    source = open_checkpoint(tiny_nf4)
    base = dequantize(source)
    reference = Reference(source=source, base=base, adapter=load_adapter(tiny_adapter, base), kind="nf4-dq")
    lined_up = line_up(reference, None, ValidationConfig(tokens=256, seq_len=128), "cpu")
    begun = []
    monkeypatch.setattr("qconv.lineup.read_ahead", lambda view, names, pin: begun.extend(names))
    lined_up.read_ahead(1)
    merged = lined_up.views.merged
    for name in merged.specs():
        if name.startswith("model.layers.1."):
            merged.read(name)
    assert len(begun) == 2 * 7
    assert sorted(begun) == sorted(name for name, _ in lined_up.views.factors._tensors)
    lined_up.views.forget()
    assert not lined_up.views.factors._tensors
