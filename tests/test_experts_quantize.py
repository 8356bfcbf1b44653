"""Mixtures of experts quantized: what experts are calibrated on, what is written, who reads it, what an audit finds."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qconv import pipeline
from qconv.checkpoint import open_checkpoint
from qconv.config import MergeJob
from qconv.convert import dequantize
from qconv.errors import SchemeError
from qconv.fidelity import audit_all
from qconv.inputs import load_candidate, load_reference
from qconv.overrides import OverrideConfig
from qconv.quantization_config import QuantizationConfig
from qconv.quantize import blocks
from qconv.quantize.activations import Activations
from qconv.quantize.blocks import QuantizeRequest, quantize_blocks
from qconv.quantize.folds import Fold, folds_of
from qconv.quantize.gather import gather
from qconv.quantize.memory import ModelShape
from qconv.skeleton import linear_weights
from qconv.streaming import BlockModel, StreamedModel
from qconv.types import Scheme
from qconv.validate.attribution import attribute
from qconv.validate.resident import ResidentModel
from tests.cli_cases import decoded_weights, job, stored_tensors
from tests.conftest import copy_tokenizer
from tests.expert_cases import ALIKE, moe, roles, save_fused, stored_module
from tests.merge_cases import IDS, TensorsInMemory, save_model, trained
from tests.test_pipeline import Unrounded
from tests.test_streaming import run

peft = pytest.importorskip("peft")
FAMILIES = ["mixtral", "qwen3_moe"]
MOE_FAMILIES = [
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "glm4_moe",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
]
LAYER = 1  # of both the one whose experts are looked at
BARE = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(scope="module")
def new_job(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., MergeJob]:
    return partial(job, tmp_path_factory)


# What experts are calibrated on


def inputs_by_hand(folder: Path, ids_BS: Tensor, family: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Of layer 0: inputs of each expert's linears, of its own tokens and of all; by transformers' own modules."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sparse = model.model.layers[0].mlp
    seen: list[Tensor] = []
    chosen: list[Tensor] = []
    sparse.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    sparse.gate.register_forward_hook(lambda _, __, out: chosen.append(out[2]))
    with torch.no_grad():
        model(ids_BS)
        (x_TH,), (chosen_TJ,) = seen, chosen
        result = {}
        gate, up, down = roles(family)
        for number in range(len(sparse.experts.down_proj)):
            g_TI, u_TI = torch.nn.functional.linear(x_TH, sparse.experts.gate_up_proj[number]).chunk(2, -1)
            inner_TI = torch.nn.functional.silu(g_TI) * u_TI
            is_own_T = (chosen_TJ == number).any(-1)
            for role, x_TK in ((gate, x_TH), (up, x_TH), (down, inner_TI)):
                result[f"{stored_module(family)}.experts.{number}.{role}.weight"] = (x_TK[is_own_T], x_TK)
    return result


@pytest.mark.parametrize(("family", "num_tokens"), [("mixtral", 3), ("mixtral", 90), ("qwen3_moe", 40)])
def test_statistics_are_of_own_tokens_filled_up_with_the_layers(family: str, num_tokens: int, tmp_path: Path) -> None:
    changes = {"num_local_experts": 8} if num_tokens == 3 else {}
    folder = save_model(moe(family, **changes), tmp_path / "m")
    view = dequantize(open_checkpoint(folder))
    ids_BS = torch.randint(64, (1, num_tokens), generator=torch.Generator().manual_seed(3))
    model = StreamedModel(view, "cpu", torch.float32)
    tensors = model.read_block(0)
    names = [name for name in tensors if ".experts." in name]
    hidden = Activations.embed(model, [ids_BS], "device")
    found = gather(model, 0, tensors, names, hidden, ("gram", "mean_abs", "sample"))
    counts = set()
    for name, (own_TK, all_TK) in inputs_by_hand(folder, ids_BS, family).items():
        k = own_TK.shape[1]
        share = min(1.0, len(own_TK) / k)
        counts.add("none" if not len(own_TK) else "few" if share < 1 else "enough")
        gram_KK = (1 - share) * all_TK.T @ all_TK / len(all_TK)
        mean_K = (1 - share) * all_TK.abs().mean(0)
        if len(own_TK):
            gram_KK = gram_KK + share * own_TK.T @ own_TK / len(own_TK)
            mean_K = mean_K + share * own_TK.abs().mean(0)
        torch.testing.assert_close(found[name].gram_KK, gram_KK, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[name].mean_abs_K, mean_K, rtol=1e-4, atol=1e-5)
        assert found[name].num_tokens == len(own_TK)
        sample = found[name].sample
        assert sample is not None
        largest_K = (own_TK if share == 1 else all_TK).abs().amax(0)
        torch.testing.assert_close(sample.max_abs_K, largest_K, rtol=1e-4, atol=1e-5)
    assert {3: "none", 90: "enough", 40: "enough"}[num_tokens] in counts, "the case must occur"
    assert "few" in counts, "the case must occur"
    gate, up, _ = roles(family)
    sparse = f"{stored_module(family)}.experts"
    assert found[f"{sparse}.0.{gate}.weight"] is found[f"{sparse}.0.{up}.weight"]
    assert found[f"{sparse}.0.{gate}.weight"] is not found[f"{sparse}.1.{gate}.weight"]


def test_gram_matrices_of_experts_are_planned_for(tmp_path: Path) -> None:
    """With few tokens all that a plan counts on is there at once: own statistics, and those of all tokens."""
    view = dequantize(open_checkpoint(save_model(moe("mixtral", num_local_experts=8), tmp_path / "m")))
    model = StreamedModel(view, "cpu", torch.float32)
    hidden, inner = 64, 48
    shape = ModelShape.of(model, linear_weights(view))
    attention, of_all_tokens = [hidden, hidden], [hidden]
    assert sorted(shape.grams) == sorted([*attention, *of_all_tokens, *[hidden, inner, inner] * 8])


def test_hidden_states_go_on_as_without_the_second_pass(tmp_path: Path) -> None:
    view = dequantize(open_checkpoint(save_model(moe("mixtral"), tmp_path / "m")))
    model = StreamedModel(view, "cpu", torch.float32)
    tensors = model.read_block(0)
    hidden = Activations.embed(model, [torch.arange(12)[None]], "device")
    expected = [model.run_block(0, model.load_block(0), h_BSH) for _, h_BSH in hidden.each()]
    gather(model, 0, tensors, [n for n in tensors if ".experts." in n], hidden, ("gram",), advance=True)
    assert all(torch.equal(h_BSH, expected[number]) for number, h_BSH in hidden.each())


# Scales in the norm before the experts


def loud(family: str, **changes: Any) -> TensorsInMemory:
    """A 16-bit model, the inputs of whose experts have a few loud channels, as trained ones have."""
    sizes = {"hidden_size": 128, "intermediate_size": 64, "moe_intermediate_size": 64, "num_attention_heads": 8}
    sizes |= {"first_k_dense_replace": 0, "moe_layer_start_index": 0} | (
        {"num_key_value_heads": 8} if "deepseek" in family else {}
    )
    model = moe(family, **sizes, **changes).to(torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[::32] *= 60
            if "q_lora_rank" in changes:
                layer.input_layernorm.weight[::16] *= 20
    names = dequantize(TensorsInMemory(dict(model.state_dict()), model.config.to_dict() | {"dtype": "float32"}))
    return TensorsInMemory({name: names.read(name) for name in names.specs()}, names.config)


def folded(
    view: TensorsInMemory,
    monkeypatch: pytest.MonkeyPatch,
    keep: Callable[[Fold], bool],
    rounded: bool,
    quantized: Callable[[str], bool] | None = None,
) -> TensorsInMemory:
    """The model after some of its folds, linears in AWQ's 4 bits or as the folds left them, all stored in bfloat16."""

    def is_first_of_experts(name: str) -> bool:
        return name.split(".")[-2] in roles(view.config["model_type"])[:2]

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "folds_of", lambda *of: tuple(fold for fold in folds_of(*of) if keep(fold)))
        if not rounded:
            patch.setattr(blocks, "solve", lambda weights, *_: {n: Unrounded(weights.pop(n)) for n in list(weights)})
        request = QuantizeRequest(
            config=QuantizationConfig(target="awq"),
            scheme=Scheme(group_size=64, symmetric=False),
            weights=list(filter(quantized or is_first_of_experts, linear_weights(view))),
            storage=torch.bfloat16,
            model_type=view.config["model_type"],
        )
        ids_BS = torch.randint(64, (8, 64), generator=torch.Generator().manual_seed(9))
        tensors = dict(view.tensors)
        for block in quantize_blocks(StreamedModel(view, "cpu", torch.float32), [request], [ids_BS]):
            tensors |= dict(block.plain) | {name: linear.dequantize() for name, linear in block.linears.items()}
    stored = {name: t if rounded and name in request.weights else t.bfloat16() for name, t in tensors.items()}
    return TensorsInMemory(stored, view.config)


def before_experts(fold: Fold) -> bool:
    return bool(fold.beside)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_scales_before_experts_change_neither_scores_nor_anything_else(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored in bfloat16, router and all, the model computes what it did: powers of two round nothing."""
    view = loud(family)
    after = folded(view, monkeypatch, before_experts, rounded=False)
    router = f"model.layers.0.{stored_module(family)}.gate"
    changed = {
        name.removesuffix(".weight") for name, t in after.tensors.items() if not torch.equal(t, view.tensors[name])
    }
    gate, up, down = roles(family)
    experts = [f"model.layers.0.{stored_module(family)}.experts.{number}" for number in range(4)]
    assert {router, "model.layers.0.post_attention_layernorm"} <= changed
    assert {f"{expert}.{role}" for expert in experts for role in (gate, up)} <= changed
    assert not any(name.endswith(down) for name in changed)
    if family == "qwen2_moe":
        sparse = "model.layers.0.mlp"
        assert {f"{sparse}.shared_expert.gate_proj", f"{sparse}.shared_expert_gate"} <= changed
    s_K = (after.tensors[f"{router}.weight"] / view.tensors[f"{router}.weight"])[0]
    assert set(s_K.tolist()) <= {2.0**n for n in range(-8, 9)}
    assert len(set(s_K.tolist())) > 1
    (expected,), (found,) = (run(StreamedModel(v, "cpu", torch.float32), [IDS]) for v in (view, after))
    assert torch.equal(expected, found)


@pytest.mark.parametrize("q_lora_rank", [None, 16])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_scales_of_latent_attention(family: str, q_lora_rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a norm and the linears after it make together stays, and so does the model's function."""
    view = loud(family, q_lora_rank=q_lora_rank)
    after = folded(view, monkeypatch, lambda fold: "attn" in fold.targets[0], False, lambda name: "self_attn" in name)
    attention = "model.layers.0.self_attn"
    pairs = {"model.layers.0.input_layernorm": ["q_proj" if q_lora_rank is None else "q_a_proj", "kv_a_proj_with_mqa"]}
    pairs |= {f"{attention}.kv_a_layernorm": ["kv_b_proj"]}
    pairs |= {f"{attention}.q_a_layernorm": ["q_b_proj"]} if q_lora_rank is not None else {}
    changed = {
        name.removesuffix(".weight") for name, t in after.tensors.items() if not torch.equal(t, view.tensors[name])
    }
    of_block = {name for name in changed if name.startswith("model.layers.0.")}
    assert of_block == {*pairs, *(f"{attention}.{linear}" for linears in pairs.values() for linear in linears)}
    for norm, linears in pairs.items():
        for linear in linears:
            before_NK, found_NK = (
                tensors[f"{attention}.{linear}.weight"].float() * tensors[f"{norm}.weight"].float()
                for tensors in (view.tensors, after.tensors)
            )
            torch.testing.assert_close(found_NK, before_NK, rtol=2e-2, atol=1e-6)  # rounded to bfloat16 twice
    (expected,), (found,) = (run(StreamedModel(v, "cpu", torch.float32), [IDS]) for v in (view, after))
    assert mean_kl(expected, found) < 1e-3


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_scales_before_experts_are_worth_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    view = loud(family)
    held_out = torch.randint(64, (8, 48), generator=torch.Generator().manual_seed(2))
    results = [view, *(folded(view, monkeypatch, keep, True) for keep in (lambda f: False, before_experts))]
    expected, without, with_scales = (run(StreamedModel(v, "cpu", torch.float32), [held_out])[0] for v in results)
    assert mean_kl(expected, with_scales) < 0.9 * mean_kl(expected, without)


# What is written


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, random_model: Callable[..., Path], new_job: Callable[..., MergeJob]
) -> Callable[..., tuple[Path, Path, Path, Any]]:
    """Base, adapter on experts, router and attention, the merged and quantized output, and the report."""
    known: dict[tuple[str, str, str], tuple[Path, Path, Path, Any]] = {}

    def make(family: str, target: str, **options: Any) -> tuple[Path, Path, Path, Any]:
        key = (family, target, str(options))
        if key not in known:
            base = random_model(family, num_key_value_heads=4)
            folder = tmp_path_factory.mktemp("moe")
            adapted = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            adapted = trained(adapted, target_modules=["q_proj", "v_proj"], target_parameters=[*BARE, "gate.weight"])
            adapted.save_pretrained(folder / "adapter")
            quantization = QuantizationConfig(target=target, **options)
            task = new_job(folder / "out", base, folder / "adapter", quantization=quantization, trained_on="16bit")
            (outcome,) = pipeline.run(task)
            known[key] = (base, folder / "adapter", folder / "out", outcome)
        return known[key]

    return make


TARGETS: dict[str, dict[str, Any]] = {
    "w4a16": {"group_size": 64},
    "gptq": {"group_size": 64},
    "awq": {"group_size": 64},
    "fp8": {},
    "fp8-block": {},
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_quantized_and_routers_are_not(made: Any, family: str, target: str) -> None:
    base, _, out, outcome = made(family, target, **TARGETS[target])
    view, source = dequantize(open_checkpoint(out)), dequantize(open_checkpoint(base))
    assert {f"{module}.weight" for module in view.quantized_modules} == set(linear_weights(source))
    router = f"model.layers.{LAYER}.{stored_module(family)}.gate"
    assert stored_tensors(out)[f"{router}.weight"].dtype == torch.bfloat16
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    ignored = config.get("ignore") or config.get("modules_to_not_convert") or list(config.get("dynamic", {}))
    assert router in ignored or any(rule.startswith("-:") and re.match(rule[2:], router) for rule in ignored)
    assert outcome.fidelity["total"]["kl"]["mean"] < outcome.fidelity["base_without_adapter"]["kl"]["mean"] / 3
    assert outcome.fidelity["merge"]["kl"]["mean"] < 5e-3  # in bfloat16 a token near a tie goes to another expert
    assert not [finding for finding in outcome.document["findings"] if finding["severity"] == "error"]
    if target in ("w4a16", "gptq", "awq"):
        tokens = outcome.stages["calibration_tokens_of_experts"]
        assert all(sum(numbers) == 2 * 8 * 64 for numbers in tokens.values())  # two experts for each of 8 rows of 64
        experts = [n for n in source.specs() if n.endswith(f".experts.0.{roles(family)[0]}.weight")]
        assert {f"{name.rsplit('.', 3)[0]}" for name in experts} == tokens.keys()
        for report in ("qconv-report.md", "qconv-report.html"):
            text = (out / report).read_text()
            assert "alibration tokens of experts" in text
            assert "; ".join(map(str, next(iter(tokens.values())))) in text


def in_memory(view: Any, family: str) -> dict[str, Tensor]:
    """Expert weights of one layer as transformers' parameters hold them."""
    prefix = f"model.layers.{LAYER}.{stored_module(family)}.experts"
    gate, up, down = (
        torch.stack([view.read(f"{prefix}.{number}.{role}.weight") for number in range(4)]) for role in roles(family)
    )
    return {"gate_up_proj": torch.cat([gate, up], dim=1), "down_proj": down}


@pytest.mark.parametrize(
    ("target", "algorithm"), [("w4a16", "gptq"), ("w4a16", "awq"), ("fp8", None), ("fp8-block", None)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_we_read(made: Any, family: str, target: str, algorithm: str | None) -> None:
    """It decodes experts while it loads: code and scale multiplied in bfloat16, or in float32 and rounded once."""
    algorithms = {} if algorithm in (None, "gptq") else {"algorithm": algorithm}  # GPTQ is w4a16's own
    _, _, out, _ = made(family, target, **TARGETS[target], **algorithms)
    view = dequantize(open_checkpoint(out))
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"] | {key for key, *_ in info["mismatched_keys"]}
    experts = model.eval().model.layers[LAYER].mlp.experts
    for name, expected in in_memory(view, family).items():
        assert torch.equal(getattr(experts, name), expected.bfloat16()), name
    ids_BS = torch.randint(2048, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(ids_BS).logits.float()
    (ours,) = run(StreamedModel(view, "cpu", torch.bfloat16), [ids_BS])
    assert mean_kl(ours.float(), found) < (0.02 if target == "w4a16" else 0.1)  # a token near a tie goes elsewhere


def mean_kl(expected: Tensor, found: Tensor) -> float:
    p, q = (x.log_softmax(-1) for x in (expected, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("target", ["gptq", "awq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_published_layouts_decode_to_what_we_read(made: Any, family: str, target: str) -> None:
    _, _, out, _ = made(family, target, **TARGETS[target])
    view = dequantize(open_checkpoint(out))
    decoded = decoded_weights(out)
    assert decoded.keys() == view.specs().keys()
    for name in decoded:
        assert torch.equal(decoded[name], view.read(name).float()), name


def test_a_fused_base_gives_the_same_output(tmp_path: Path, new_job: Callable[..., MergeJob], tiny_llama: Path) -> None:
    outputs = []
    model = moe("mixtral").to(torch.bfloat16)
    for name, save in (("separate", save_model), ("fused", save_fused)):
        folder = save(model, tmp_path / name)
        for file in tiny_llama.glob("tokenizer*.json"):
            shutil.copyfile(file, folder / file.name)
        task = new_job(tmp_path / f"{name}-out", folder, quantization=QuantizationConfig(target="fp8"), validation=None)
        pipeline.run(task)
        outputs.append(stored_tensors(tmp_path / f"{name}-out"))
    assert outputs[0].keys() == outputs[1].keys()
    for name, tensor in outputs[0].items():
        assert torch.equal(tensor.view(torch.uint8), outputs[1][name].view(torch.uint8)), name


@pytest.mark.parametrize("family", ALIKE)
def test_families_alike_are_written_as_transformers_loads_them(
    family: str, tmp_path: Path, new_job: Callable[..., MergeJob]
) -> None:
    """Calibrated, so that blocks run, too. What chooses experts stays as it is, its float32 biases to the bit."""
    model = moe(family, vocab_size=2048).to(torch.bfloat16)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = 7 + torch.randn(buffer.shape, generator=torch.Generator().manual_seed(1)) * 0.01
    if family == "ernie4_5_moe":  # as its files have it
        model.model.layers[LAYER].mlp.gate.float()
    folder = save_model(model, tmp_path / "base")
    copy_tokenizer(folder)
    config = QuantizationConfig(target="w4a16", group_size=8)
    (outcome,) = pipeline.run(new_job(tmp_path / "out", folder, quantization=config))
    stored, before = stored_tensors(tmp_path / "out"), stored_tensors(folder)
    kept = [name for name in before if any(part in name for part in (".gate.", "shared_expert_gate", "moe_statics"))]
    assert kept
    assert all(torch.equal(stored[name], before[name]) and stored[name].dtype == before[name].dtype for name in kept)
    assert any(name.endswith("e_score_correction_bias") for name in kept) == (
        family in ("deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe")
    )
    assert (before[f"model.layers.{LAYER}.mlp.gate.weight"].dtype == torch.float32) == (family == "ernie4_5_moe")
    view = dequantize(open_checkpoint(tmp_path / "out"))
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    experts = loaded.model.layers[LAYER].mlp.experts
    for name, expected in in_memory(view, family).items():
        assert torch.equal(getattr(experts, name), expected.bfloat16()), name
    assert outcome.fidelity["total"]["kl"]["mean"] < 0.1
    assert not [finding for finding in outcome.document["findings"] if finding["severity"] == "error"]


# What is refused


def test_experts_of_a_layer_are_quantized_alike(
    tmp_path: Path, new_job: Callable[..., MergeJob], random_model: Callable[..., Path]
) -> None:
    base = random_model("mixtral")
    run_with = lambda **options: pipeline.run(  # noqa: E731
        new_job(
            tmp_path / "out",
            base,
            quantization=QuantizationConfig(target="w4a16", group_size=64, algorithm="rtn", **options),
            validation=None,
        )
    )
    with pytest.raises(
        SchemeError, match=r"run all experts of a layer as one, and --override makes those of .*experts"
    ):
        run_with(overrides=(OverrideConfig(pattern="*.experts.2.*", bits=8),))
    with pytest.raises(SchemeError, match="run all experts of a layer as one, and --ignore"):
        run_with(ignore=("*.w2",))
    run_with(overrides=(OverrideConfig(pattern="re:.*layers\\.0\\..*experts", bits=8),))
    view = dequantize(open_checkpoint(tmp_path / "out"))
    bits = {module: scheme.bits for module, scheme in view.schemes.items()}
    assert {b for m, b in bits.items() if "layers.0" in m and "experts" in m} == {8}
    assert {b for m, b in bits.items() if not ("layers.0" in m and "experts" in m)} == {4}


def test_targets_that_would_leave_experts_behind_are_refused(
    tmp_path: Path, new_job: Callable[..., MergeJob], random_model: Callable[..., Path]
) -> None:
    task = new_job(
        tmp_path / "out", random_model("mixtral"), quantization=QuantizationConfig(target="nf4"), validation=None
    )
    with pytest.raises(SchemeError, match="transformers keeps experts as bare parameters"):
        pipeline.run(task)


# What an audit finds


@pytest.mark.parametrize("target", ["w4a16", "gptq", "awq", "fp8", "fp8-block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_stale_expert_is_named(
    made: Any, family: str, target: str, tmp_path: Path, new_job: Callable[..., MergeJob]
) -> None:
    """One linear of one expert is that of the base, as if its update had been lost; AWQ's scales of it were others."""
    base, adapter, clean, _ = made(family, target, **TARGETS[target])
    reference = load_reference(open_checkpoint(base), str(adapter), "16bit")
    assert not [f for f in audit_all(reference, load_candidate(str(clean), None), "cpu") if f["severity"] == "error"]
    plain = new_job(
        tmp_path / "plain", base, quantization=QuantizationConfig(target=target, **TARGETS[target]), validation=None
    )
    pipeline.run(plain)
    damaged = Path(shutil.copytree(clean, tmp_path / "damaged"))
    module = f"model.layers.{LAYER}.{stored_module(family)}.experts.2.{roles(family)[2]}"
    tensors, stale = load_file(damaged / "model.safetensors"), load_file(tmp_path / "plain" / "model.safetensors")
    tensors |= {name: stale[name] for name in tensors if name.startswith(f"{module}.")}
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    found = audit_all(reference, load_candidate(str(damaged), None), "cpu")
    errors = [(finding["code"], finding["tensors"]) for finding in found if finding["severity"] == "error"]
    assert errors[0] == ("adapter-partly-applied", [f"{module}.weight"]), found
    producer = module.replace(roles(family)[2], roles(family)[1])  # took the scales of the one that is gone
    assert errors[1:] == ([("scales-unbalanced", [f"{producer}.weight"])] if target == "awq" else []), found


@pytest.mark.parametrize("runs", ["streamed", "whole"])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("num_experts", [4, 20])
def test_attribution_names_the_expert(tmp_path: Path, runs: str, folded: bool, num_experts: int) -> None:
    """One of a few experts, all of a layer where there are many; with folded scales the module that holds them."""
    folder = save_model(moe("mixtral", num_local_experts=num_experts, num_experts_per_tok=4), tmp_path / "m")
    view = dequantize(open_checkpoint(folder))
    tensors = {name: view.read(name) for name in view.specs()}
    tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"] *= -2
    if folded:
        tensors["model.layers.1.input_layernorm.weight"] *= 1.001
    reference: BlockModel = StreamedModel(view, "cpu", torch.float32)
    if runs == "whole":
        reference = ResidentModel(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), "cpu")
    candidate = StreamedModel(TensorsInMemory(tensors, view.config), "cpu", torch.float32)
    found = attribute(reference, candidate, torch.randint(64, (2, 32)))
    costs = {name: kl for name, kl in found.linears.items() if name.startswith("model.layers.1.")}
    name, cost = max(costs.items(), key=lambda item: item[1])
    module = "mlp" if runs == "whole" else "block_sparse_moe"
    number = "" if num_experts > 16 or runs == "whole" else ".2"
    assert name.startswith(f"model.layers.1.{module}" + ("" if folded else f".experts{number}"))
    assert cost == pytest.approx(found.total, rel=0.05)
    assert cost > 20 * max(kl for other, kl in costs.items() if other != name)
