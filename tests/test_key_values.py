"""Scales of an FP8 cache of keys and values: against the caches that transformers fills, and compressed-tensors' own.

Expected scales come from ``past_key_values`` of transformers' models, which no code of ours touches; what rounding does
to logits and answers from compressed-tensors' `QuantizedKVCache`, which transformers puts around the folders.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization import QuantizationConfig as PackageConfig
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.lifecycle.initialize import is_cached_attention_module
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig, DynamicCache, FineGrainedFP8Config
from transformers.models.llama.modeling_llama import LlamaAttention

from qconv import pipeline
from qconv.cached_attentions import cache_use
from qconv.checkpoint import open_checkpoint
from qconv.config import OutputConfig, ValidateJob, ValidationConfig
from qconv.convert import CACHE_SCHEME, dequantize
from qconv.convert.key_values import read_cache
from qconv.describe import describe
from qconv.errors import CheckpointError, NumericsError, SchemeError, UsageError
from qconv.estimate_jobs import estimate_merge
from qconv.judging import validate
from qconv.layout import _cached_attentions, plan_layout
from qconv.pack import pack
from qconv.plan import make_plan
from qconv.progress import QUIET
from qconv.quantization_config import QuantizationConfig
from qconv.quantize.blocks import QuantizeRequest, quantize_blocks
from qconv.quantize.key_values import BEYOND, CacheRounding, fake_quantize_cached
from qconv.runners import Candidate, candidate_model
from qconv.sensitivity import measured_by
from qconv.serving_config import PackConfig
from qconv.skeleton import linear_weights
from qconv.streaming import StreamedModel
from qconv.targets import TARGETS
from qconv.types import TensorSpec
from tests.cli_cases import EVAL_TOKENS, SEQ_LEN, job, report_of, small_texts
from tests.conftest import copy_tokenizer
from tests.expert_cases import moe

NEAREST_BF16 = 2**-8  # a scale is rounded once
SCALES = (".k_scale", ".v_scale")
HOLDING = [name for name, target in TARGETS.items() if target.holds_cache_scales]

Making = Callable[..., Path]


def config(target: str, **more: Any) -> QuantizationConfig:
    return QuantizationConfig(target=target, kv_cache="fp8", **more)


def plain(target: str) -> QuantizationConfig:
    return QuantizationConfig(target=target)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Making:
    """``make("w4a16", algorithm="awq")``: an output in float32 with scales of its cache; unvalidated, made once."""
    known: dict[str, Path] = {}

    def make(target: str, **more: Any) -> Path:
        key = str((target, more))
        if key not in known:
            known[key] = tmp_path_factory.mktemp("cached") / "out"
            options = {"quantization": config(target, **more), "dtype": "fp32", "validation": None}
            pipeline.run(job(tmp_path_factory, known[key], tiny_llama, **options))
        return known[key]

    return make


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Tensor:
    """The rows that every output here is calibrated on."""
    out = tmp_path_factory.mktemp("planned") / "out"
    rows = make_plan(job(tmp_path_factory, out, tiny_llama, quantization=config("fp8")), QUIET).calibration
    assert rows is not None
    return rows


def stored_scales(folder: Path) -> dict[str, float]:
    tensors = load_file(folder / "model.safetensors")
    return {name: float(tensor) for name, tensor in tensors.items() if name.endswith(SCALES)}


def dense(folder: Path) -> nn.Module:
    """transformers' model of a folder, decoded while loading: nothing rounds keys or values."""
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    quantization = (FineGrainedFP8Config if method == "fp8" else CompressedTensorsConfig)(dequantize=True)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization
    )
    return model


@torch.no_grad()
def expected_scales(model: nn.Module, rows_TS: Tensor) -> dict[str, float]:
    """The largest magnitudes in the cache that transformers fills, after rotary embedding, / 448."""
    cache = DynamicCache()  # without a config: it keeps what lies before a sliding window, too
    model(rows_TS, past_key_values=cache, use_cache=True)
    found = {}
    for index, layer in enumerate(cache.layers):
        found[f"model.layers.{index}.self_attn.k_scale"] = float(layer.keys.abs().max()) / 448
        found[f"model.layers.{index}.self_attn.v_scale"] = float(layer.values.abs().max()) / 448
    return found


def assert_scales(found: Mapping[str, float], expected: Mapping[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, scale in found.items():
        assert scale == pytest.approx(expected[name], rel=NEAREST_BF16), name


# Scales


@pytest.mark.parametrize(
    ("target", "more"),
    [
        ("w4a16", {}),
        ("w4a16", {"algorithm": "awq"}),
        ("int8", {"algorithm": "smoothquant"}),
        ("fp8", {}),
        ("fp8-block", {}),
    ],
    ids=str,
)
def test_scales_are_of_what_the_stored_model_caches(
    make: Making, calibration: Tensor, target: str, more: dict[str, Any]
) -> None:
    """Folds of AWQ change values, so those of the unfolded model would not do."""
    folder = make(target, **more)
    assert_scales(stored_scales(folder), expected_scales(dense(folder), calibration))


def test_folds_and_codes_change_what_is_cached(make: Making, tiny_llama: Path, calibration: Tensor) -> None:
    """The merged model's own keys and values would not pass the test above."""
    before = expected_scales(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), calibration)
    after = stored_scales(make("w4a16", algorithm="awq"))
    assert max(abs(after[name] / before[name] - 1) for name in after if name.endswith("v_scale")) > 4 * NEAREST_BF16


def test_outputs_of_one_pass_see_the_unquantized_blocks_before(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tmp_path: Path, calibration: Tensor
) -> None:
    """Their own weights on the unquantized model's hidden states; GPTQ's codes are as without a cache."""
    plain = {"w4a16": QuantizationConfig(target="w4a16"), "fp8": QuantizationConfig(target="fp8", activations="static")}
    made: dict[str, dict[str, Path]] = {}
    for cached in ("fp8", None):
        folders = {name: tmp_path / str(cached) / name for name in plain}
        outputs = tuple(
            OutputConfig(out=folders[name], dtype="fp32", quantization=replaced(quantization, cached))
            for name, quantization in plain.items()
        )
        pipeline.run(job(tmp_path_factory, tmp_path / "unused", tiny_llama, outputs=outputs, validation=None))
        made[str(cached)] = folders
    hidden = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)(
        calibration, output_hidden_states=True
    ).hidden_states
    for name, folder in made["fp8"].items():
        tensors, others = load_file(folder / "model.safetensors"), load_file(made["None"][name] / "model.safetensors")
        assert tensors.keys() - others.keys() == stored_scales(folder).keys()
        assert all(torch.equal(tensors[key], others[key]) for key in others), "a cache changes codes"
        model: Any = dense(folder)
        for layer, h_BSH in zip(model.model.layers, hidden[:-1], strict=True):
            layer.register_forward_pre_hook(lambda _, args, h=h_BSH: (h, *args[1:]))
        assert_scales(stored_scales(folder), expected_scales(model, calibration))


def replaced(quantization: QuantizationConfig, cached: str | None) -> QuantizationConfig:
    return QuantizationConfig(
        target=quantization.target,
        activations=quantization.activations,
        kv_cache=cached,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "phi3", "llama4_text", "mixtral", "qwen3_moe"])
def test_families(random_model: Callable[..., Path], family: str) -> None:
    """Names as compressed-tensors gives them, and scales as transformers' cache has them, block after stored block."""
    folder = random_model(family)
    view, ids_BS = open_checkpoint(folder), torch.arange(3 * 40).reshape(3, 40)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = [name for name, module in model.named_modules() if is_cached_attention_module(module)]
    assert cache_use(view).handing == tuple(names)
    weights = linear_weights(view)
    quantization = config("fp8")
    request = QuantizeRequest(
        config=quantization,
        scheme=quantization.scheme_for([128], ""),
        weights=weights,
        storage=torch.float32,
        model_type=family,
    )
    found: dict[str, float] = {}
    for block in quantize_blocks(StreamedModel(view, "cpu", torch.float32), [request], ids_BS):
        for attention, (keys, values) in block.cache_scales.items():
            found |= {f"{attention}.k_scale": float(keys), f"{attention}.v_scale": float(values)}
        for name, linear in block.linears.items():
            _set_weight(model, name, linear.dequantize())
    assert_scales(found, expected_scales(model, ids_BS))
    assert request.cache_scales.keys() == set(names)


def test_a_family_whose_files_are_fused(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """gpt-oss: windows and sinks in the attention, experts of a layer in one tensor, and scales beside both."""
    model: Any = moe("gpt_oss", vocab_size=2048)
    model.save_pretrained(tmp_path / "base")
    copy_tokenizer(tmp_path / "base")
    quantization = config("w4a16", ignore=("*.experts.*",))
    pipeline.run(job(tmp_path_factory, tmp_path / "out", tmp_path / "base", quantization=quantization, validation=None))
    view = dequantize(open_checkpoint(tmp_path / "out"))
    with torch.no_grad():
        for module in view.quantized_modules:
            model.get_parameter(f"{module}.weight").copy_(view.read(f"{module}.weight"))
    planned = job(tmp_path_factory, tmp_path / "other", tmp_path / "base", quantization=quantization)
    rows_TS = make_plan(planned, QUIET).calibration
    assert rows_TS is not None
    assert_scales(stored_scales(tmp_path / "out"), expected_scales(model.float().eval(), rows_TS))


def _set_weight(model: Any, name: str, w_NK: Tensor) -> None:
    """Into transformers' model, which has the experts of a layer in two parameters."""
    parts = name.removesuffix(".weight").replace("block_sparse_moe", "mlp").split(".")
    with torch.no_grad():
        if "experts" not in parts:
            model.get_parameter(name).copy_(w_NK)
            return
        at = parts.index("experts")
        experts, number, role = model.get_submodule(".".join(parts[: at + 1])), int(parts[at + 1]), parts[-1]
        inner = experts.down_proj.shape[-1]
        if role in ("down_proj", "w2"):
            experts.down_proj[number].copy_(w_NK)
        else:
            begin = 0 if role in ("gate_proj", "w1") else inner
            experts.gate_up_proj[number, begin : begin + inner].copy_(w_NK)


def test_keys_that_are_not_finite_name_their_attention(tiny_llama: Path) -> None:
    class Broken(StreamedModel):
        def read_block(self, index: int) -> dict[str, Tensor]:
            tensors = super().read_block(index)
            if index == 1:
                tensors["input_layernorm.weight"].fill_(float("inf"))
            return tensors

    view, quantization = open_checkpoint(tiny_llama), config("fp8")
    request = QuantizeRequest(
        config=quantization,
        scheme=quantization.scheme_for([256], ""),
        weights=linear_weights(view),
        storage=torch.float32,
        model_type="llama",
    )
    blocks = quantize_blocks(Broken(view, "cpu", torch.float32), [request], torch.arange(64).reshape(1, 64))
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.self_attn: keys hold NaN or infinity"):
        list(blocks)


@pytest.mark.gpu
def test_scales_on_a_gpu(tiny_llama: Path) -> None:
    view, quantization = open_checkpoint(tiny_llama), config("w4a16")
    found = []
    for device in ("cpu", "cuda"):
        request = QuantizeRequest(
            config=quantization,
            scheme=quantization.scheme_for([256], ""),
            weights=linear_weights(view),
            storage=torch.float32,
            model_type="llama",
        )
        list(quantize_blocks(StreamedModel(view, device, torch.float32), [request], torch.arange(256).reshape(4, 64)))
        found.append(request.cache_scales)
    assert found[0].keys() == found[1].keys()
    for name, scales in found[0].items():
        assert scales == pytest.approx(found[1][name], rel=0.02), name


# What readers get


def test_what_is_stored(make: Making) -> None:
    folder = make("w4a16")
    read = json.loads((folder / "config.json").read_text())["quantization_config"]
    args = PackageConfig.model_validate(read).kv_cache_scheme
    assert args == QuantizationArgs(num_bits=8, type="float", strategy="tensor", dynamic=False, symmetric=True)
    tensors = load_file(folder / "model.safetensors")
    for name in stored_scales(folder):
        assert tensors[name].shape == (1,)
        assert tensors[name].dtype == torch.float32  # as everything that is not quantized here
        assert float(tensors[name].bfloat16()) == float(tensors[name].half()) == float(tensors[name])
    assert describe(folder)["keys and values"] == "float8, scales of 4 attentions"
    assert not any(name.endswith(SCALES) for name in dequantize(open_checkpoint(folder)).specs())


LIKE_OTHERS = ("nvfp4a16", "mxfp4a16", "w4a8-fp8")  # but for the inputs of linears


@pytest.mark.parametrize("target", [name for name in HOLDING if name not in (*LIKE_OTHERS, "fp8-block")])
def test_every_layout_loads_in_transformers(make: Making, target: str) -> None:
    """Scales arrive in the attentions, nothing is missing, and nothing left over."""
    folder = make(target, algorithm="rtn") if "rtn" in TARGETS[target].algorithms else make(target)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, scale in stored_scales(folder).items():
        assert model.get_parameter(name).detach().item() == scale


@torch.no_grad()
def test_logits_and_answers_are_those_of_compressed_tensors_cache(make: Making) -> None:
    """With the package's rounding of keys and values, in one pass and token by token."""
    folder = make("w4a16")
    ids_BS = torch.randint(2048, (2, 48), generator=torch.Generator().manual_seed(0))
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    candidate = Candidate.of(open_checkpoint(folder))
    model, how = candidate_model(candidate, candidate.view, "cpu", False, None)
    assert "keys and values rounded to float8" in how
    (h_BSH,) = model.embed([ids_BS])
    for index in range(model.num_blocks):
        h_BSH = model.run_block(index, model.load_block(index), h_BSH)
    expected = theirs(ids_BS, use_cache=False).logits
    torch.testing.assert_close(model.head()(h_BSH), expected, atol=1e-3, rtol=1e-3)
    unrounded = dense(folder)(ids_BS).logits
    assert (expected - unrounded).abs().max() > 0.1, "rounding shows"
    whole: Any = model.whole()
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(whole.generate(ids_BS, **options), theirs.generate(ids_BS, **options))


def test_rounding_is_the_packages() -> None:
    x_BHSD = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0)) * 100
    args = QuantizationArgs(num_bits=8, type="float", strategy="tensor")
    for scale in (torch.tensor([0.25]), torch.tensor([0.017])):
        expected = fake_quantize(x_BHSD, scale, None, args)
        assert torch.equal(fake_quantize_cached(x_BHSD, scale), expected)
    per_head = torch.tensor([0.3, 0.01, 2.0]).reshape(3, 1, 1)
    expected = torch.stack([fake_quantize(x_BHSD[:, head], per_head[head, 0], None, args) for head in range(3)], dim=1)
    assert torch.equal(fake_quantize_cached(x_BHSD, per_head), expected)


class _SelfAttention(nn.Module):
    """The least that counts as one."""

    def __init__(self) -> None:
        super().__init__()
        self.k_proj = nn.Linear(2, 2)

    def forward(self, keys: Tensor, values: Tensor, past_key_values: Any = None) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = past_key_values.update(keys, values, 0)
        return result


def test_what_lies_beyond_the_range_is_counted() -> None:
    block = nn.ModuleDict({"self_attn": _SelfAttention()})
    scales = torch.tensor([2.0]), torch.tensor([1.0])
    rounding = CacheRounding(scales={"model.layers.0.self_attn": scales})
    rounding.decorate("model.layers.0.", block)
    keys = torch.tensor([0.0, 2 * 463.9, -2 * BEYOND, 1e4]).reshape(1, 1, 2, 2)
    back, _ = block["self_attn"](keys, torch.zeros(1, 1, 2, 2))
    assert back.flatten().tolist() == [0.0, 896.0, -896.0, 896.0]
    block["self_attn"](torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    assert rounding.clipped() == {
        "keys": (2 / 8, "model.layers.0.self_attn"),
        "values": (0.0, "model.layers.0.self_attn"),
    }
    with pytest.raises(NumericsError, match="self_attn: values hold NaN or infinity"):
        block["self_attn"](keys, torch.full((1, 1, 2, 2), float("inf")))


# Reports


def test_report_of_a_run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pipeline.run(job(tmp_path_factory, out, tiny_llama, quantization=config("fp8")))
    report = report_of(out)
    stored = stored_scales(out)
    attentions = report["stages"]["key-value cache"]["attentions"]
    assert {f"{name}.k_scale": scales["keys"] for name, scales in attentions.items()} | {
        f"{name}.v_scale": scales["values"] for name, scales in attentions.items()
    } == stored
    assert report["stages"]["calibration"]["samples"] == 8, "FP8 by itself needs no text, its cache does"
    assert report["fidelity"]["candidate"]["runs"].endswith("as an FP8 cache keeps them")
    assert report["fidelity"]["candidate"]["kv_cache"]["keys"]["clipped"] < 0.01
    assert any("of the keys were beyond the range" in note for note in report["fidelity"]["notes"])
    assert "FP8 cache of keys and values" in (out / "README.md").read_text()


def validated(factory: pytest.TempPathFactory, reference: Path, candidate: Path) -> dict[str, Any]:
    _, evaluation = small_texts(factory)
    settings = ValidationConfig(source=str(evaluation), tokens=EVAL_TOKENS, seq_len=SEQ_LEN, defaults=False)
    found = validate(ValidateJob(reference=str(reference), candidate=str(candidate), validation=settings, device="cpu"))
    fidelity: dict[str, Any] = found.document["fidelity"]
    return fidelity


def changed(folder: Path, to: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """A copy with other tensors or another ``quantization_config``."""
    shutil.copytree(folder, to)
    tensors, found = load_file(to / "model.safetensors"), json.loads((to / "config.json").read_text())
    change(tensors, found["quantization_config"])
    save_file(tensors, to / "model.safetensors")
    (to / "config.json").write_text(json.dumps(found))
    return to


def test_validation_sees_scales_that_are_too_small(
    make: Making, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tmp_path: Path
) -> None:
    def shrink(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors["model.layers.2.self_attn.k_scale"] /= 16

    folder = make("w4a16")
    good = validated(tmp_path_factory, tiny_llama, folder)
    bad = validated(tmp_path_factory, tiny_llama, changed(folder, tmp_path / "small", shrink))
    assert bad["total"]["kl"]["mean"] > 2 * good["total"]["kl"]["mean"]
    assert bad["candidate"]["kv_cache"]["keys"]["most_in"] == "model.layers.2.self_attn"
    assert bad["candidate"]["kv_cache"]["keys"]["clipped"] > 0.05


@torch.no_grad()
@pytest.mark.parametrize("inner", ["", ".attn", ".qkv_proj"])
def test_scales_are_found_under_engines_own_names(inner: str) -> None:
    names = [f"model.layers.0.self_attn{inner}.{part}_scale" for part in "kv"]
    specs = {name: TensorSpec(name=name, shape=(1,), dtype=torch.float32) for name in names}
    found = read_cache(specs, {"kv_cache_scheme": dict(CACHE_SCHEME)}, "here")
    assert found.scales == {"model.layers.0.self_attn": tuple(names)}
    assert found.why_not is None


def test_foreign_scales_by_head_are_rounded_by(make: Making, tmp_path: Path) -> None:
    """llm-compressor's ``attn_head`` strategy, ``[heads, 1, 1]``, against the package's cache."""

    def by_head(tensors: dict[str, Tensor], quantization: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith(SCALES)]:
            tensors[name] = tensors[name] * torch.tensor([1.0, 0.25]).reshape(2, 1, 1)
        quantization["kv_cache_scheme"]["strategy"] = "attn_head"

    folder = changed(make("w4a16"), tmp_path / "heads", by_head)
    ids_BS = torch.arange(40).reshape(1, 40)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids_BS, use_cache=False).logits
    candidate = Candidate.of(open_checkpoint(folder))
    whole: Any = candidate_model(candidate, candidate.view, "cpu", False, None)[0].whole()
    torch.testing.assert_close(whole(ids_BS).logits, expected, atol=1e-3, rtol=1e-3)


def _dynamic(tensors: dict[str, Tensor], quantization: dict[str, Any]) -> None:
    quantization["kv_cache_scheme"]["dynamic"] = True


def _without_scales(tensors: dict[str, Tensor], quantization: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.endswith(SCALES)]:
        del tensors[name]


def _unannounced(tensors: dict[str, Tensor], quantization: dict[str, Any]) -> None:
    quantization["kv_cache_scheme"] = None


def _without_a_cache(tensors: dict[str, Tensor], quantization: dict[str, Any]) -> None:
    _without_scales(tensors, quantization)
    _unannounced(tensors, quantization)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_dynamic, "announces a cache of keys and values that is not computed here"),
        (_unannounced, "holds scales for an FP8 cache, and its config asks for none"),
    ],
)
def test_what_is_not_computed_is_said(
    make: Making,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor], dict[str, Any]], None],
    words: str,
) -> None:
    folder = changed(make("w4a16"), tmp_path / "foreign", change)
    fidelity = validated(tmp_path_factory, tiny_llama, folder)
    assert any(words in note for note in fidelity["notes"])
    assert "kv_cache" not in fidelity["candidate"]
    assert words in describe(folder)["keys and values"]


def _scales_of(tensors: dict[str, Tensor], layers: tuple[int, ...]) -> list[str]:
    return [name for name in tensors if name.endswith(SCALES) and int(name.split(".")[2]) in layers]


@torch.no_grad()
@pytest.mark.parametrize("layers", [(1, 3), (0, 1, 2, 3)], ids=str)
def test_attentions_without_scales_have_one_as_in_vllm(
    make: Making, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tmp_path: Path, layers: tuple[int, ...]
) -> None:
    """Expected logits are transformers' for scales of 1 that are stored."""

    def lose(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        for name in _scales_of(tensors, layers):
            del tensors[name]

    def make_one(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        for name in _scales_of(tensors, layers):
            tensors[name] = torch.ones(1)

    folder = changed(make("w4a16"), tmp_path / "lost", lose)
    ids_BS = torch.arange(40).reshape(1, 40)
    stored = changed(make("w4a16"), tmp_path / "ones", make_one)
    expected = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32)(ids_BS, use_cache=False).logits
    candidate = Candidate.of(open_checkpoint(folder))
    whole: Any = candidate_model(candidate, candidate.view, "cpu", False, None)[0].whole()
    found = whole(ids_BS).logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    candidate.rounding.scales.clear()  # type: ignore[union-attr, attr-defined]
    unrounded: Any = candidate_model(candidate, candidate.view, "cpu", False, None)[0].whole()
    assert (found - unrounded(ids_BS).logits).abs().max() > 0.01, "rounding shows"
    (note,) = [note for note in validated(tmp_path_factory, tiny_llama, folder)["notes"] if "no scales" in note]
    named = (
        f"{len(layers)} of 4 attentions (model.layers.{layers[0]}.self_attn and others): the candidate has 1 for them"
    )
    assert named in note
    words = describe(folder)["keys and values"]
    assert words == (
        "float8, scales of 2 attentions" if len(layers) == 2 else "float8, no scales stored, for which vLLM takes 1"
    )
    document = pack(PackConfig(model=str(folder), engine="vllm", out=tmp_path / "pack", answers=False)).document
    assert "--kv-cache-dtype" in document["launch"]


def test_scales_of_nothing_are_named(
    make: Making, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tmp_path: Path
) -> None:
    def rename(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        for name in _scales_of(tensors, (3,)):
            tensors[name.replace("self_attn", "mixer")] = tensors.pop(name)

    notes = validated(tmp_path_factory, tiny_llama, changed(make("w4a16"), tmp_path / "other", rename))["notes"]
    assert any("1 of 4 attentions (model.layers.3.self_attn)" in note for note in notes)
    assert any("stored for model.layers.3.mixer, which hands none to a cache" in note for note in notes)


def test_caches_of_latents_are_not_computed(make: Making, tmp_path: Path) -> None:
    folder = changed(make("w4a16"), tmp_path / "latent", _without_scales)
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | {"kv_lora_rank": 16}))
    cache = dequantize(open_checkpoint(folder)).cache
    assert not cache.is_float8
    assert "one latent for keys and values" in str(cache.why_not)


def test_the_reference_has_no_such_cache(make: Making, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Against itself as a base, which training saw without a cache, what the cache does is all that differs."""
    folder = make("w4a16")
    fidelity = validated(tmp_path_factory, folder, folder)
    assert fidelity["total"]["kl"]["mean"] > 1e-5
    assert any("the base announces a quantized cache" in note for note in fidelity["notes"])


def test_one_scale_of_two_is_refused(make: Making, tmp_path: Path) -> None:
    def lose(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        del tensors["model.layers.1.self_attn.v_scale"]

    folder = changed(make("w4a16"), tmp_path / "lost", lose)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.self_attn' has a scale of keys for its cache and"):
        dequantize(open_checkpoint(folder))


# Options


def test_targets_that_hold_no_scales() -> None:
    for target in TARGETS:
        if target not in HOLDING:
            with pytest.raises(UsageError, match=f"from {target}; w4a16, w8a16, fp8"):
                config(target)
        else:
            assert config(target).needs_calibration
            assert measured_by(config(target)).kv_cache is None


def test_models_without_keys_and_values_of_heads(random_model: Callable[..., Path]) -> None:
    sizes = {"num_attention_heads": 2, "hidden_size": 8, "num_hidden_layers": 1, "kv_lora_rank": 4}
    latent = SimpleNamespace(location="deepseek", config={"model_type": "deepseek_v3", **sizes})
    with pytest.raises(SchemeError, match=r"deepseek: --kv-cache: keys and values are kept as one latent \(MLA\)"):
        _cached_attentions(latent)  # type: ignore[arg-type]
    gpt2 = open_checkpoint(random_model("gpt2"))
    with pytest.raises(SchemeError, match="no attention of this family has projections of keys and values"):
        _cached_attentions(gpt2)


def inkling(folder: Path) -> Path:
    """Its attentions keep states of convolutions beside keys and values."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "mlp_layer_types": ["dense"] * 2, "dense_intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    own = {f"swa_{name}": number for name, number in heads.items()}
    found = AutoConfig.for_model("inkling_text", vocab_size=2048, **sizes, **heads, **own)
    AutoModelForCausalLM.from_config(found, dtype=torch.bfloat16).save_pretrained(folder)
    copy_tokenizer(folder)
    return folder


def test_attentions_that_keep_something_else_are_refused_before_the_work(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    planned = job(tmp_path_factory, tmp_path / "out", inkling(tmp_path / "base"), quantization=config("fp8"))
    with pytest.raises(
        SchemeError, match=r"--kv-cache: model\.layers\.0\.self_attn: .* asks .* 'get_conv_state', which"
    ):
        make_plan(planned, QUIET)
    make_plan(replace(planned, outputs=(OutputConfig(out=tmp_path / "out", quantization=plain("fp8")),)), QUIET)


def test_attentions_that_share_keys_and_values_are_refused_before_the_work(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = LlamaAttention.forward

    def shared(self: Any, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return own(self, *args, past_key_values=past_key_values if self.layer_idx != 2 else None, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", shared)
    use = cache_use(open_checkpoint(tiny_llama))
    assert use.handing == tuple(f"model.layers.{index}.self_attn" for index in (0, 1, 3))
    planned = job(tmp_path_factory, tmp_path / "out", tiny_llama, quantization=config("fp8"))
    with pytest.raises(SchemeError, match=r"model\.layers\.2\.self_attn: hands no keys and values to a cache"):
        make_plan(planned, QUIET)


def test_what_attentions_do_is_asked_without_weights(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_checkpoint(tiny_llama)
    monkeypatch.setattr(source, "read", None)
    found = cache_use(source)
    assert len(found.handing) == 4
    assert not found.others


def test_layout_plans_what_is_written(make: Making, tiny_llama: Path) -> None:
    view = open_checkpoint(tiny_llama)
    layout = plan_layout(view, "fp32", config("w4a16"), linear_weights(view))
    found = load_file(make("w4a16") / "model.safetensors")
    assert {spec.name: (spec.shape, spec.dtype) for spec in layout.specs} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()
    }


def test_estimates_count_the_passes(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tmp_path: Path) -> None:
    """One for the next block's input where nothing else is calibrated; of two outputs each looks for itself."""

    def passes(*quantizations: QuantizationConfig) -> float:
        outputs = tuple(OutputConfig(out=tmp_path / str(i), quantization=q) for i, q in enumerate(quantizations))
        planned = job(tmp_path_factory, tmp_path / "x", tiny_llama, outputs=outputs, validation=None)
        estimate = estimate_merge(planned, make_plan(planned, QUIET), "cpu", "")
        stage = next(stage for stage in estimate.stages if stage.name == "quantize")
        return stage.units.get("forward", 0.0)

    one = passes(config("fp8"))
    assert passes(QuantizationConfig(target="fp8")) == 0
    assert one > 0
    assert passes(config("fp8"), config("fp8-block")) == 3 * one
    squares = passes(QuantizationConfig(target="w4a16")) - 2 * one
    assert passes(config("w4a16")) == 2 * one + squares


# Serving


def test_packs_keep_such_a_cache_unasked(make: Making, tmp_path: Path) -> None:
    folder, plain = make("w4a16"), tmp_path / "plain"
    changed(folder, plain, _without_a_cache)
    per_token = {}
    block = pack(PackConfig(model=str(make("fp8-block")), engine="vllm", out=tmp_path / "block", answers=False))
    assert "--kv-cache-dtype fp8" in (block.out / "launch.sh").read_text()
    for engine, flag in (("vllm", "fp8"), ("sglang", "fp8_e4m3"), ("tgi", "fp8_e4m3fn")):
        document = pack(PackConfig(model=str(folder), engine=engine, out=tmp_path / engine, answers=False)).document
        launch = document["launch"]
        assert launch[launch.index("--kv-cache-dtype") + 1] == flag
        assert any("cuts float8 keys and values" in note for note in document["notes"]) == (engine == "vllm")
        per_token[engine] = document["memory"]["cache_bytes_per_token"]
        other = pack(PackConfig(model=str(plain), engine=engine, out=tmp_path / f"{engine}0", answers=False)).document
        assert "--kv-cache-dtype" not in other["launch"]
        assert other["memory"]["cache_bytes_per_token"] == 4 * per_token[engine]  # float32
    static = pack(
        PackConfig(model=str(make("fp8", activations="static")), engine="trtllm", out=tmp_path / "trt", answers=False)
    )
    settings = json.loads((static.out / "model" / "hf_quant_config.json").read_text())["quantization"]
    assert settings["kv_cache_quant_algo"] == "FP8"
    assert any("takes 1" in note for note in static.document["notes"])
