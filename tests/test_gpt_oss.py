"""gpt-oss: experts that files hold fused, in 16 bits or in MXFP4; read, merged and written as its readers have them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qconv import pipeline
from qconv.checkpoint import open_checkpoint
from qconv.config import MergeJob
from qconv.convert import FORMATS, dequantize
from qconv.errors import CheckpointError, NumericsError, SchemeError
from qconv.fidelity import audit_all
from qconv.inputs import load_candidate, load_reference
from qconv.merge import merge
from qconv.quantization_config import QuantizationConfig
from qconv.quantize.activations import Activations
from qconv.quantize.gather import gather
from qconv.quantize.gptq import gptq
from qconv.quantize.rtn import rtn
from qconv.runners import streamed
from qconv.streaming import StreamedModel
from qconv.targets import TARGETS
from qconv.types import QuantizedLinear
from tests.cli_cases import job, stored_tensors
from tests.conftest import copy_tokenizer
from tests.expert_cases import adapted, moe, written_model
from tests.merge_cases import IDS, logits
from tests.test_experts_merge import close
from tests.test_streaming import run

EXPERTS = "model.layers.0.mlp.experts"
ON_ALL = {
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "gate.weight"],
}
PUBLISHED = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}


@pytest.fixture(scope="module")
def new_job(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., MergeJob]:
    return partial(job, tmp_path_factory)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In 16 bits."""
    folder = tmp_path_factory.mktemp("gpt-oss") / "base"
    moe("gpt_oss", vocab_size=2048).to(torch.bfloat16).save_pretrained(folder)
    copy_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """The same with random numbers and exponents in the layout of the published checkpoints."""
    folder = tmp_path_factory.mktemp("gpt-oss") / "mxfp4"
    shutil.copytree(base, folder)
    state = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    for name in [name for name in state if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        num_experts, k, n = state.pop(name).shape
        shape = (num_experts, n, k // 32)
        state[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        state[f"{name}_scales"] = torch.randint(120, 124, shape, dtype=torch.uint8, generator=generator)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, quantization_config=PUBLISHED)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def load(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' model; without a GPU it decodes MXFP4 while it loads."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def in_memory(view: Any, layer: int) -> dict[str, Tensor]:
    """The experts of a layer as transformers' parameters hold them."""
    read = lambda role, part: torch.stack(  # noqa: E731
        [view.read(f"model.layers.{layer}.mlp.experts.{number}.{role}.{part}") for number in range(4)]
    )
    gate_up = torch.stack([read("gate_proj", "weight"), read("up_proj", "weight")], dim=2)
    gate_up_bias = torch.stack([read("gate_proj", "bias"), read("up_proj", "bias")], dim=-1)
    return {
        "gate_up_proj": gate_up.flatten(1, 2).mT,
        "gate_up_proj_bias": gate_up_bias.flatten(1),
        "down_proj": read("down_proj", "weight").mT,
        "down_proj_bias": read("down_proj", "bias"),
    }


def same_experts(view: Any, model: Any) -> None:
    for layer in range(2):
        for name, expected in in_memory(view, layer).items():
            assert torch.equal(getattr(model.model.layers[layer].mlp.experts, name), expected.bfloat16()), name


# MXFP4


def test_every_number_and_scale_decodes_as_in_transformers(tmp_path: Path, base: Path) -> None:
    """256 bytes, each with the 255 scales that are numbers; in bfloat16, infinity too."""
    num_scales = 255
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, num_scales, 16, 16).contiguous()
    scales = torch.arange(num_scales, dtype=torch.uint8).view(1, -1, 1).expand(1, num_scales, 16).contiguous()
    tensors = {f"{EXPERTS}.down_proj_blocks": blocks, f"{EXPERTS}.down_proj_scales": scales}
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copyfile(base / "config.json", tmp_path / "config.json")
    edit_config(tmp_path, quantization_config=PUBLISHED)
    view = dequantize(open_checkpoint(tmp_path))
    found = view.read(f"{EXPERTS}.0.down_proj.weight").bfloat16()
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)[0].T
    assert torch.equal(found, expected)


def test_a_published_folder_is_read_as_transformers_reads_it(published: Path) -> None:
    view = dequantize(open_checkpoint(published))
    assert view.kind == "gpt-oss-mxfp4"
    assert len(view.quantized_modules) == 2 * 4 * 3
    model = load(published, torch.bfloat16)
    same_experts(view, model)
    (found,) = run(StreamedModel(view, "cpu", torch.float32), [IDS])
    close(found, logits(model.float()))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 9))
def test_packing_and_its_inverse(n: int, num_groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (n, 32 * num_groups), dtype=torch.uint8, generator=generator)
    exponents = torch.randint(-127, 128, (n, num_groups), generator=generator)
    q = QuantizedLinear(
        codes_NK=codes,
        scales_NG=torch.ldexp(torch.ones(n, num_groups), exponents),
        zeros_NG=None,
        group_index_K=None,
        scheme=TARGETS["gpt-oss-mxfp4"].scheme,  # type: ignore[arg-type]
    )
    fmt = FORMATS["gpt-oss-mxfp4"]
    fmt.check(q, "x", torch.bfloat16)
    packed = fmt.pack(q, "x", torch.bfloat16)
    back = fmt.unpack(packed, "x", q.scheme)
    assert torch.equal(back.codes_NK, q.codes_NK)
    assert torch.equal(back.scales_NG, q.scales_NG)
    expected = convert_moe_packed_tensors(packed["x.weight_blocks"][None], packed["x.weight_scales"][None])
    assert torch.equal(q.dequantize().bfloat16(), expected[0].T)


def test_an_update_below_a_step_survives_by_gptq_alone(tiny_llama: Path) -> None:
    """Of a base that lies on MXFP4's numbers. What is kept: of what the update adds to outputs, by least squares."""
    scheme = TARGETS["gpt-oss-mxfp4"].scheme
    assert scheme is not None
    view = dequantize(open_checkpoint(tiny_llama))
    model = StreamedModel(view, "cpu", torch.float32)
    tensors = model.read_block(1)
    names = [name for name in tensors if name.endswith("_proj.weight")]
    ids_BS = torch.randint(2048, (8, 128), generator=torch.Generator().manual_seed(1))
    model.num_blocks = 2
    hidden = Activations.embed(model, [ids_BS], "device")
    for number, h_BSH in hidden.each():
        hidden.replace(number, model.run_block(0, model.load_block(0), h_BSH))
    statistics = gather(model, 1, tensors, names, hidden, ("gram",))
    kept: dict[str, list[float]] = {"rtn": [], "gptq": []}
    for name in names:
        base_NK, gram_KK = rtn(tensors[name].float(), scheme, name).dequantize(), statistics[name].gram_KK
        assert gram_KK is not None
        generator = torch.Generator().manual_seed(len(name))
        update_NK = torch.randn(len(base_NK), 4, generator=generator) @ torch.randn(
            4, len(gram_KK), generator=generator
        )
        update_NK *= 0.03 * base_NK.norm() / update_NK.norm()
        merged_NK = base_NK + update_NK
        for algorithm, linear in (
            ("rtn", rtn(merged_NK, scheme, name)),
            ("gptq", gptq(merged_NK, gram_KK, scheme, name).linear),
        ):
            change_NK = linear.dequantize() - base_NK
            explained = ((change_NK @ gram_KK) * update_NK).sum() / ((update_NK @ gram_KK) * update_NK).sum()
            kept[algorithm].append(float(explained))
    assert max(kept["rtn"]) < 0.15, kept
    assert min(kept["gptq"]) > 0.4, kept


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda s: s | {f"{EXPERTS}.down_proj_scales": s[f"{EXPERTS}.down_proj_scales"] | 255}, NumericsError, "NaN"),
        (
            lambda s: {
                name: tensor for name, tensor in s.items() if not name.endswith("0.mlp.experts.down_proj_scales")
            },
            CheckpointError,
            "weight_scales",
        ),
        (
            lambda s: s | {f"{EXPERTS}.down_proj_blocks": s[f"{EXPERTS}.down_proj_blocks"].flatten(2)},
            CheckpointError,
            r"\[experts, out, groups, 16\]",
        ),
    ],
)
def test_damaged_checkpoints_are_refused(
    published: Path, tmp_path: Path, edit: Any, error: type[Exception], message: str
) -> None:
    folder = Path(shutil.copytree(published, tmp_path / "damaged"))
    save_file(edit(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(error, match=message):
        dequantize(open_checkpoint(folder)).read(f"{EXPERTS}.0.down_proj.weight")


# Adapters, and what is written


def test_an_adapter_on_a_published_base(published: Path, tmp_path: Path) -> None:
    """It is trained on what transformers decodes, and merged into that."""
    model = load(published, torch.bfloat16).float()  # every value is exact; releases differ in what float32 loads
    before = logits(model)
    peft_model = adapted(model, "gpt_oss", ON_ALL)
    peft_model.save_pretrained(tmp_path / "adapter")
    expected = logits(peft_model)
    assert float((expected - before).abs().max()) > 1e-2
    reference = load_reference(open_checkpoint(published), str(tmp_path / "adapter"), None)
    assert reference.adapter is not None
    assert reference.kind == "16bit"
    close(logits(written_model(merge(reference.base, [reference.adapter]), tmp_path / "merged")), expected)
    (found,) = run(StreamedModel(merge(reference.base, [reference.adapter]), "cpu", torch.float32), [IDS])
    close(found, expected)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    folder = tmp_path_factory.mktemp("gpt-oss") / "adapter"
    adapted(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), "gpt_oss", ON_ALL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, base: Path, adapter: Path, new_job: Callable[..., MergeJob]
) -> Callable[..., tuple[Path, Any]]:
    """The merged output of a target, and the outcome."""
    known: dict[str, tuple[Path, Any]] = {}

    def make(target: str | None, **options: Any) -> tuple[Path, Any]:
        key = f"{target} {options}"
        if key not in known:
            out = tmp_path_factory.mktemp("gpt-oss") / "out"
            quantization = None if target is None else QuantizationConfig(target=target, **options)
            (outcome,) = pipeline.run(new_job(out, base, adapter, quantization=quantization, trained_on="16bit"))
            known[key] = (out, outcome)
        return known[key]

    return make


def no_errors(outcome: Any) -> None:
    assert not [finding for finding in outcome.document["findings"] if finding["severity"] == "error"]
    assert outcome.fidelity["total"]["kl"]["mean"] < outcome.fidelity["base_without_adapter"]["kl"]["mean"] / 3


def test_a_plain_output_is_fused_as_the_base_is(made: Any, base: Path) -> None:
    out, outcome = made(None)
    stored, before = stored_tensors(out), stored_tensors(base)
    assert {name: (t.shape, t.dtype) for name, t in stored.items()} == {
        name: (t.shape, t.dtype) for name, t in before.items()
    }
    untouched = [
        name for name in before if name.endswith(("sinks", "experts.down_proj_bias", "experts.gate_up_proj_bias"))
    ]
    assert len(untouched) == 6
    assert all(torch.equal(stored[name], before[name]) for name in untouched)
    same_experts(dequantize(open_checkpoint(out)), load(out, torch.bfloat16))
    assert outcome.fidelity["total"]["kl"]["mean"] < 0.01
    no_errors(outcome)


@pytest.mark.parametrize("algorithm", ["gptq", "rtn"])
def test_experts_are_written_as_published(made: Any, algorithm: str) -> None:
    out, outcome = made("gpt-oss-mxfp4", algorithm=algorithm)
    assert json.loads((out / "config.json").read_text())["quantization_config"] == PUBLISHED
    stored = stored_tensors(out)
    assert stored[f"{EXPERTS}.gate_up_proj_blocks"].shape == (4, 192, 2, 16)
    assert stored[f"{EXPERTS}.down_proj_scales"].shape == (4, 64, 3)
    assert {t.dtype for name, t in stored.items() if name.endswith(("_blocks", "_scales"))} == {torch.uint8}
    assert {t.dtype for name, t in stored.items() if not name.endswith(("_blocks", "_scales"))} == {torch.bfloat16}
    model, view = load(out, torch.bfloat16), dequantize(open_checkpoint(out))
    same_experts(view, model)
    (found,) = run(StreamedModel(view, "cpu", torch.float32), [IDS])
    close(found, logits(model.float()))
    no_errors(outcome)
    if algorithm == "gptq":
        nearest = made("gpt-oss-mxfp4", algorithm="rtn")[1].fidelity["total"]["kl"]["mean"]
        assert outcome.fidelity["total"]["kl"]["mean"] < nearest
        tokens = outcome.stages["calibration_tokens_of_experts"]
        assert set(tokens) == {"model.layers.0.mlp.experts", "model.layers.1.mlp.experts"}
        assert all(sum(numbers) == 2 * 8 * 64 for numbers in tokens.values())


@pytest.mark.parametrize(("target", "options"), [("fp8", {}), ("w4a16", {"group_size": 64}), ("int8", {})])
def test_attention_alone_in_compressed_tensors(made: Any, target: str, options: dict[str, Any]) -> None:
    """Experts stay fused in 16 bits; transformers and the config's rules agree on what is quantized."""
    pytest.importorskip("compressed_tensors")
    out, outcome = made(target, ignore=("*.experts.*",), **options)
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert "re:model\\.layers\\.0\\.mlp\\.experts\\..*" in ignored
    assert "model.layers.0.mlp.router" in ignored
    view = dequantize(open_checkpoint(out))
    assert {module.split(".")[-1] for module in view.quantized_modules} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    model = load(out, torch.bfloat16)
    same_experts(view, model)
    ids_BS = torch.randint(2048, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(ids_BS).logits.float().log_softmax(-1)
    (ours,) = run(streamed(view, None, None, "cpu"), [ids_BS])
    expected = ours.float().log_softmax(-1)
    assert float((expected.exp() * (expected - found)).sum(-1).mean()) < 0.03
    no_errors(outcome)


def test_one_stale_expert_is_named(made: Any, base: Path, adapter: Path, tmp_path: Path, new_job: Any) -> None:
    """The rows of one expert's up projection are those of the base, as if its update had been lost."""
    clean, _ = made("gpt-oss-mxfp4", algorithm="gptq")
    reference = load_reference(open_checkpoint(base), str(adapter), "16bit")
    assert not [f for f in audit_all(reference, load_candidate(str(clean), None), "cpu") if f["severity"] == "error"]
    config = QuantizationConfig(target="gpt-oss-mxfp4", algorithm="gptq")
    pipeline.run(new_job(tmp_path / "plain", base, quantization=config, validation=None))
    damaged = Path(shutil.copytree(clean, tmp_path / "damaged"))
    tensors, stale = load_file(damaged / "model.safetensors"), load_file(tmp_path / "plain" / "model.safetensors")
    for name in (f"{EXPERTS}.gate_up_proj_blocks", f"{EXPERTS}.gate_up_proj_scales"):
        tensors[name][2, 1::2] = stale[name][2, 1::2]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    found = audit_all(reference, load_candidate(str(damaged), None), "cpu")
    errors = [finding for finding in found if finding["severity"] == "error"]
    assert [finding["tensors"] for finding in errors] == [[f"{EXPERTS}.2.up_proj.weight"]], found


# What is refused


@pytest.mark.parametrize("target", ["fp8", "w4a16", "gptq", "awq", "fp8-block", "int8"])
def test_layouts_of_linears_are_refused_for_experts(base: Path, tmp_path: Path, new_job: Any, target: str) -> None:
    task = new_job(tmp_path / "out", base, quantization=QuantizationConfig(target=target), validation=None)
    with pytest.raises(SchemeError, match=r"in 16 bits or in MXFP4.*Choose --requant gpt-oss-mxfp4"):
        pipeline.run(task)


@pytest.mark.parametrize("target", ["gptq", "awq", "fp8-block"])
def test_attention_alone_is_refused_where_nothing_was_seen_to_read_it(
    base: Path, tmp_path: Path, new_job: Any, target: str
) -> None:
    config = QuantizationConfig(target=target, ignore=("*.experts.*",))
    with pytest.raises(SchemeError, match=r"w4a16, w8a16, fp8, .* for attention alone"):
        pipeline.run(new_job(tmp_path / "out", base, quantization=config, validation=None))


def test_mxfp4_is_for_families_that_are_read_in_it(tiny_llama: Path, tmp_path: Path, new_job: Any) -> None:
    task = new_job(
        tmp_path / "out", tiny_llama, quantization=QuantizationConfig(target="gpt-oss-mxfp4"), validation=None
    )
    with pytest.raises(
        SchemeError, match="gpt-oss-mxfp4 is how engines read the experts of gpt-oss, and model_type is 'llama'"
    ):
        pipeline.run(task)
