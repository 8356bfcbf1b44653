"""GGUF files against the gguf package's quantizers and reader, and against transformers, which loads such files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qconv import judging, pipeline
from qconv.adapter_configs import CombinationConfig
from qconv.checkpoint import open_checkpoint
from qconv.config import MergeJob, OutputConfig, ValidateJob
from qconv.convert import GGML_FORMATS, dequantize
from qconv.describe import describe
from qconv.errors import CheckpointError, SchemeError, UsageError
from qconv.gguf import BLOCK_KINDS, encode, pack, unpack
from qconv.inputs import load_reference
from qconv.quantization_config import QuantizationConfig
from qconv.targets import GGUF_TARGETS, TARGETS
from qconv.types import QuantizedLinear
from tests.cli_cases import job, report_of
from tests.conftest import TINY_LLAMA
from tests.test_convert_formats import assert_same, random_linear

KINDS = [target.removeprefix("gguf-") for target in GGUF_TARGETS]
CALIBRATED = [target for target in GGUF_TARGETS if TARGETS[target].algorithms[0] == "gptq"]
_MADE: dict[tuple[Any, ...], Path] = {}


def number_of(kind: str) -> GGMLQuantizationType:
    return GGMLQuantizationType[kind.upper()]


def file_in(folder: Path) -> Path:
    (file,) = folder.glob("*.gguf")
    return file


def by_transformers(folder: Path) -> Any:
    file = file_in(folder)
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32).eval()


def decoded(folder: Path) -> dict[str, Tensor]:
    view = dequantize(open_checkpoint(folder))
    return {name: view.read(name).float() for name in view.specs()}


@pytest.fixture(scope="module")
def made_gguf(tmp_path_factory: pytest.TempPathFactory, tiny_nf4: Path, tiny_adapter: Path) -> Callable[..., Path]:
    """A merged output of a target; made once."""

    def make(target: str, algorithm: str | None = None) -> Path:
        key = (target, algorithm)
        if key not in _MADE:
            out = tmp_path_factory.mktemp("gguf") / target
            config = QuantizationConfig(target=target, algorithm=algorithm)  # type: ignore[arg-type]
            pipeline.run(job(tmp_path_factory, out, tiny_nf4, tiny_adapter, quantization=config))
            _MADE[key] = out
        return _MADE[key]

    return make


# Blocks


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Of any magnitude; with equal magnitudes of both signs, constant blocks and zeros."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(draw(st.integers(1, 5)), 32 * draw(st.integers(1, 4)), generator=generator)
    w *= 10.0 ** draw(st.integers(-4, 3))
    match draw(st.sampled_from(("as drawn", "ties", "bfloat16", "zero rows"))):
        case "ties":
            w = (w / w.abs().max() * 3).round()
        case "bfloat16":
            w = w.bfloat16().float()
        case "zero rows":
            w[0] = 0
    return w


@settings(max_examples=150, deadline=None)
@given(matrices(), st.sampled_from(list(BLOCK_KINDS)))
def test_blocks_are_the_packages_bit_for_bit(w: Tensor, kind: str) -> None:
    stored = encode(w, kind, "w")
    assert np.array_equal(stored.numpy(), gguf.quants.quantize(w.numpy(), number_of(kind)))
    blocks = stored.view(-1, BLOCK_KINDS[kind].num_bytes)
    assert torch.equal(pack(*unpack(blocks, kind), kind), blocks)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_numbers_without_blocks_are_the_packages(kind: str) -> None:
    w = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    expected = gguf.quants.quantize(w.numpy(), number_of(kind))
    assert encode(w, kind, "w").contiguous().view(torch.uint8).numpy().tobytes() == expected.tobytes()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(GGML_FORMATS)), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31))
def test_chosen_codes_come_back_and_mean_the_same_to_the_package(name: str, n: int, blocks: int, seed: int) -> None:
    fmt = GGML_FORMATS[name]
    q = random_linear(fmt.scheme, n, 32 * blocks, seed, False, lowest_zero=0)
    fmt.check(q, "layer", torch.bfloat16)
    tensors = fmt.pack(q, "layer", torch.bfloat16)
    assert_same(fmt.unpack(tensors, "layer", q.scheme), q)
    (stored,) = tensors.values()
    values = torch.from_numpy(gguf.quants.dequantize(stored.numpy(), number_of(fmt.kind)))
    if q.zeros_NG is None:
        assert torch.equal(values, q.dequantize())
    else:  # the minimum is rounded to float16: 2^-11 of 15 steps at most
        steps = (values - q.dequantize()).abs() / q.scales_NG.abs().repeat_interleave(32, dim=1)
        assert steps.max() < 0.0075


def test_what_blocks_do_not_hold_is_refused() -> None:
    fmt = GGML_FORMATS["gguf-q4_0"]
    q = random_linear(fmt.scheme, 2, 64, 0, False, lowest_zero=0)
    with pytest.raises(SchemeError, match="stores no group index"):
        fmt.check(QuantizedLinear(**{**vars(q), "group_index_K": torch.arange(64).int() // 32}), "m", torch.bfloat16)
    with pytest.raises(SchemeError, match="gguf-q4_1 holds"):
        GGML_FORMATS["gguf-q4_1"].check(q, "m", torch.bfloat16)
    with pytest.raises(SchemeError, match="blocks of 32 weights along the input features, got 48"):
        encode(torch.zeros(2, 48), "q8_0", "w")


# Files


@pytest.mark.parametrize("target", GGUF_TARGETS)
def test_uncalibrated_files_hold_what_the_package_makes_of_the_merge(
    made_gguf: Callable[..., Path], tiny_nf4: Path, tiny_adapter: Path, target: str
) -> None:
    """Every byte of every tensor, in llama.cpp's order of rows, found under llama.cpp's names."""
    kind = target.removeprefix("gguf-")
    merged = load_reference(open_checkpoint(tiny_nf4), str(tiny_adapter), None).merged
    reader = GGUFReader(file_in(made_gguf(target, "ggml")))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    expected = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    expected |= {f"blk.{b}.{own}.weight": f"model.layers.{b}.{name}.weight" for b in range(4)
                 for name, own in names.items()}  # fmt: skip
    assert stored.keys() == expected.keys()
    for name, own in expected.items():
        w = merged.read(own).float().numpy()
        if "attn_q" in name or "attn_k" in name:
            heads = 4 if "attn_q" in name else 2
            w = w.reshape(heads, 2, 32, 256).swapaxes(1, 2).reshape(w.shape)
        wanted = "f32" if w.ndim == 1 else kind if name.startswith("blk.") or kind not in BLOCK_KINDS else "q8_0"
        assert stored[name].tensor_type == number_of(wanted), name
        assert stored[name].data.tobytes() == gguf.quants.quantize(w, number_of(wanted)).tobytes(), name


def test_an_embedding_beside_a_head_is_stored_as_the_weights_are(
    random_model: Callable[..., Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = random_model("llama")
    config = QuantizationConfig(target="gguf-q4_1", algorithm="ggml")
    pipeline.run(job(tmp_path_factory, tmp_path / "out", base, quantization=config, validation=None))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file_in(tmp_path / "out")).tensors}
    assert (kinds["token_embd.weight"], kinds["output.weight"]) == ("Q4_1", "Q8_0")


@pytest.mark.parametrize(("target", "algorithm"), [(t, None) for t in GGUF_TARGETS] + [("gguf-q4_0", "awq+gptq")])
def test_transformers_loads_the_weights_that_were_judged(
    made_gguf: Callable[..., Path], target: str, algorithm: str | None
) -> None:
    folder = made_gguf(target, algorithm)
    theirs, ours = by_transformers(folder).state_dict(), decoded(folder)
    assert ours.keys() == theirs.keys() - {"lm_head.weight"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("target", GGUF_TARGETS)
def test_reports_of_files(made_gguf: Callable[..., Path], target: str) -> None:
    """Bounds are about three times what was measured."""
    folder = made_gguf(target)
    report = report_of(folder)
    facts = report["stages"]["quantization"]
    bits = TARGETS[target].bits[0]
    assert (facts["format"], facts["bits"], facts["linears quantized"]) == (target, bits, 28)
    assert facts["algorithm"] == TARGETS[target].algorithms[0]
    assert ("calibration" in report["stages"]) == (target in CALIBRATED)
    assert report["findings"] == []
    assert report["fidelity"]["total"]["kl"]["mean"] < {4: 0.02, 5: 0.01, 8: 0.001}.get(bits, 0.0005)
    digest = hashlib.sha256(file_in(folder).read_bytes()).hexdigest()
    assert report["provenance"]["candidate"][file_in(folder).name] == digest
    assert (folder / "Modelfile").read_text() == f"FROM ./{file_in(folder).name}\n"
    card = (folder / "README.md").read_text()
    assert "library_name: gguf\n" in card
    assert f"llama-server -m ./this-folder/{file_in(folder).name} " in card
    assert not any(word in card for word in ("vllm", "transformers"))


@pytest.mark.parametrize(
    ("target", "words"),
    [("gguf-q5_1", "q5_1 x 28; q8_0 x 1"), ("gguf-q8_0", "q8_0"), ("gguf-q4_0", "q4_0 x 28; q8_0 x 1")],
)
def test_inspecting_says_the_kinds_of_blocks(made_gguf: Callable[..., Path], target: str, words: str) -> None:
    assert describe(str(made_gguf(target)))["scheme"] == words


@pytest.mark.parametrize("target", ["gguf-q4_0", "gguf-q4_1"])
def test_calibrated_codes_are_nearer_than_llama_cpps_rule(made_gguf: Callable[..., Path], target: str) -> None:
    calibrated, rule = (
        report_of(made_gguf(target, algorithm))["fidelity"]["total"]["kl"]["mean"] for algorithm in (None, "ggml")
    )
    assert calibrated < 0.8 * rule


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("is_varied", [False, True], ids=["plain", "tied, random norms and biases"])
def test_families_compute_the_same_from_the_file(
    random_model: Callable[..., Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    is_varied: bool,
) -> None:
    # Room for tokens that some tokenizers add; and the only size of a head that transformers' reader knows of qwen3.
    sizes = {"vocab_size": 2080} | ({"head_dim": 128} if family == "qwen3" else {})
    varied = {"tie_word_embeddings": True} | ({"attention_bias": True} if family == "llama" else {})
    base = random_model(family, **sizes, **(varied if is_varied else {}))
    if is_varied:
        base = with_random_vectors(base, tmp_path / "base")
    config = QuantizationConfig(target="gguf-f32")
    pipeline.run(job(tmp_path_factory, tmp_path / "out", base, quantization=config, validation=None))
    ids = torch.arange(3, 63).reshape(2, 30) * 31 % 2048
    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    config = AutoConfig.for_model(**dict(open_checkpoint(tmp_path / "out").config))  # type: ignore[assignment]
    read = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    read.load_state_dict(decoded(tmp_path / "out"), strict=False)
    with torch.no_grad():
        expected = original(ids).logits
        assert torch.allclose(read(ids).logits, expected, atol=1e-4)
        if not (family == "llama" and is_varied):  # transformers' reader does not know biases of this architecture
            assert torch.allclose(by_transformers(tmp_path / "out")(ids).logits, expected, atol=1e-4)


def with_random_vectors(base: Path, folder: Path) -> Path:
    """Biases and norms are constant in a model that was never trained."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float(parameter.detach()[0]), std=0.2)
    shutil.copytree(base, folder)
    model.save_pretrained(folder)
    return folder


ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 20000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_scaling_goes_into_the_file(
    random_model: Callable[..., Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    base = random_model("llama", rope_parameters=ROPES[kind])
    config = QuantizationConfig(target="gguf-f16")
    pipeline.run(job(tmp_path_factory, tmp_path / "out", base, quantization=config, validation=None))
    assert open_checkpoint(tmp_path / "out").config["rope_parameters"] == ROPES[kind]
    stored = {tensor.name: tensor.data for tensor in GGUFReader(file_in(tmp_path / "out")).tensors}
    assert ("rope_freqs.weight" in stored) == (kind == "llama3")
    if kind == "llama3":  # llama.cpp divides its frequencies by these
        model = AutoModelForCausalLM.from_pretrained(base)
        plain = 500000.0 ** -(torch.arange(0, 32, 2) / 32)
        expected = plain / model.model.rotary_emb.inv_freq
        assert torch.allclose(torch.from_numpy(stored["rope_freqs.weight"].copy()), expected, rtol=1e-5)


# Tokenizer and keys


def test_the_tokenizer_is_in_the_file(made_gguf: Callable[..., Path]) -> None:
    folder = made_gguf("gguf-q8_0")
    fields = GGUFReader(file_in(folder)).fields
    content = json.loads((TINY_LLAMA / "tokenizer.json").read_text())
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert {text: number for number, text in enumerate(tokens)} == content["model"]["vocab"] | {
        added["content"]: added["id"] for added in content["added_tokens"]
    }
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    assert fields["tokenizer.ggml.merges"].contents() == merges
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    types = fields["tokenizer.ggml.token_type"].contents()
    assert (types[:2], set(types[2:])) == ([3, 3], {1})
    own = AutoTokenizer.from_pretrained(TINY_LLAMA)
    theirs = AutoTokenizer.from_pretrained(folder, gguf_file=file_in(folder).name)
    text = "It's 2024, isn't it?\n\n  def f(x):\n\treturn x+1  # 3.14159 — Ünïcödé 漢字"
    assert theirs(text)["input_ids"] == own(text)["input_ids"]


def test_the_adapters_chat_template_is_in_the_file(
    tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    adapter = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}")
    config = QuantizationConfig(target="gguf-f16")
    pipeline.run(job(tmp_path_factory, tmp_path / "out", tiny_nf4, adapter, quantization=config, validation=None))
    fields = GGUFReader(file_in(tmp_path / "out")).fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages[0].content }}"


def tokenizer_with(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(TINY_LLAMA, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def _split(expression: str) -> dict[str, Any]:
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        ],
    }


_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
CUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "smollm": ({"pre_tokenizer": _DIGITS}, {}),
    "llama-bpe": ({"pre_tokenizer": _split(_WORDS)}, {"ignore_merges": True}),
    "qwen2": ({"pre_tokenizer": _split(_WORDS.replace("{1,3}", "")), "normalizer": {"type": "NFC"}}, {}),
}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "other regex": ({"pre_tokenizer": _split(_WORDS + "|x")}, {"ignore_merges": True}, r"no known name .*\|x"),
    "merges ignored": ({"pre_tokenizer": _DIGITS}, {"ignore_merges": True}, "takes whole words before merging"),
    "llama 3 without it": ({"pre_tokenizer": _split(_WORDS)}, {}, "no known name"),
    "normalizer": ({"normalizer": {"type": "NFKC"}}, {}, "with normalizer NFKC"),
    "fallback": ({}, {"byte_fallback": True}, "falls back to bytes and has no token <0x00>"),
    "prefix": (
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {},
        "add_prefix_space",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CUTS)
def test_how_text_is_cut_is_found_by_its_rule(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    changes, of_model = CUTS[name]
    base = tokenizer_with(
        tmp_path / "base", lambda content: (content.update(changes), content["model"].update(of_model))
    )
    config = QuantizationConfig(target="gguf-f16")
    pipeline.run(job(tmp_path_factory, tmp_path / "out", base, quantization=config, validation=None))
    assert GGUFReader(file_in(tmp_path / "out")).fields["tokenizer.ggml.pre"].contents() == name


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_cut_otherwise_is_refused(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, case: str
) -> None:
    changes, of_model, message = REFUSED[case]
    base = tokenizer_with(
        tmp_path / "base", lambda content: (content.update(changes), content["model"].update(of_model))
    )
    config = QuantizationConfig(target="gguf-f16")
    with pytest.raises(CheckpointError, match=message):
        pipeline.run(job(tmp_path_factory, tmp_path / "out", base, quantization=config, validation=None))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "scaling 'dynamic' is not written"),
        ("qwen3", {"attention_bias": True}, "_proj.bias' has no place in the GGUF architecture 'qwen3'"),
        ("llama", {"intermediate_size": 200}, "blocks of 32 weights along the input features, got 200"),
    ],
)
def test_what_is_not_written_is_refused_before_work(
    random_model: Callable[..., Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    config = QuantizationConfig(target="gguf-q8_0", algorithm="ggml")
    with pytest.raises((CheckpointError, SchemeError), match=message):
        pipeline.run(job(tmp_path_factory, tmp_path / "out", random_model(family, **changes), quantization=config))


def test_linears_that_are_left_out_stay_in_16_bits(
    random_model: Callable[..., Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = random_model("llama", intermediate_size=200)
    config = QuantizationConfig(target="gguf-q4_0", ignore=("*.down_proj",))
    pipeline.run(job(tmp_path_factory, tmp_path / "out", base, quantization=config, dtype="fp16"))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file_in(tmp_path / "out")).tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q4_0")
    assert report_of(tmp_path / "out")["findings"] == []


# Reading


def test_a_file_alone_is_a_candidate(
    made_gguf: Callable[..., Path],
    tiny_nf4: Path,
    tiny_adapter: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = made_gguf("gguf-q4_0")
    alone = tmp_path / "other-name.gguf"
    shutil.copyfile(file_in(folder), alone)
    options = job(tmp_path_factory, tmp_path / "unused", tiny_nf4).validation
    assert options is not None
    options = dataclasses.replace(options, attribution="always")
    outcome = judging.validate(
        ValidateJob(
            reference=str(tiny_nf4), adapter=str(tiny_adapter), candidate=str(alone), validation=options, device="cpu"
        )
    )
    assert outcome.fidelity is not None
    assert outcome.fidelity["total"]["kl"] == report_of(folder)["fidelity"]["total"]["kl"]
    assert outcome.document["findings"] == []
    assert any("tokenizer inside a GGUF file was not compared" in note for note in outcome.fidelity["notes"])
    units = {unit["name"] for unit in outcome.fidelity["attribution"]["blocks"]}  # float32 beside bfloat16
    assert {"model.layers.0", "model.layers.3"} <= units


def test_a_changed_key_is_seen(made_gguf: Callable[..., Path], tmp_path: Path) -> None:
    """The config that is judged is made of the file's keys, not of the config.json beside it."""
    folder = Path(shutil.copytree(made_gguf("gguf-f16"), tmp_path / "copy"))
    reader = GGUFReader(file_in(folder), "r+")
    reader.fields["llama.rope.freq_base"].parts[-1][0] = 500.0
    reader.data.flush()
    assert open_checkpoint(folder).config["rope_parameters"]["rope_theta"] == 500.0


def test_plain_weights_come_out_of_a_file(made_gguf: Callable[..., Path], tmp_path: Path) -> None:
    folder = made_gguf("gguf-q5_1")
    output = OutputConfig(out=tmp_path / "plain", dtype="fp32")
    pipeline.run(MergeJob(base=str(folder), outputs=(output,), validation=None, device="cpu"))
    ours, plain = decoded(folder), decoded(tmp_path / "plain")
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in ours)


def test_k_quants_are_read(tmp_path: Path) -> None:
    """A file of other tools; the package reads these kinds and does not write them, so their bytes are drawn."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
    for add, value in (
        (writer.add_context_length, 128), (writer.add_embedding_length, 256), (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 256), (writer.add_head_count, 4), (writer.add_layer_norm_rms_eps, 1e-5),
    ):  # fmt: skip
        add(value)
    kind = GGMLQuantizationType.Q6_K
    row = gguf.quants.quant_shape_to_byte_shape((8, 256), kind)
    blocks = rng.integers(0, 40, row, dtype=np.uint8)
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=kind)
    writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    view = dequantize(open_checkpoint(tmp_path / "m.gguf"))
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
    assert torch.equal(view.read("model.layers.0.mlp.up_proj.weight"), expected)
    assert (view.kind, set(view.bits.values()), view.config["num_key_value_heads"]) == ("gguf-q6_k", {6}, 4)


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "no magic": (lambda b: b"GGML" + b[4:], "not a little-endian GGUF file"),
    "old version": (lambda b: b[:4] + b"\x01" + b[5:], "of version 2 or 3"),
    "cut in the data": (lambda b: b[:-1000], "the file is cut off"),
    "cut in the header": (lambda b: b[:300], "damaged|cut off"),
    "empty": (lambda b: b"", "not a little-endian GGUF file"),
    "many tensors": (lambda b: b[:8] + b"\xff" * 8 + b[16:], "damaged"),
    "architecture": (lambda b: b.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0rwkv7", 1), "'rwkv7' is not"),
    "unknown tensor": (lambda b: b.replace(b"blk.0.ffn_up", b"blk.0.ffn_xx"), "'blk.0.ffn_xx.weight' is none"),
    "twice": (lambda b: b.replace(b"blk.0.ffn_up", b"blk.1.ffn_up"), "'blk.1.ffn_up.weight' stands twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_files_are_refused(made_gguf: Callable[..., Path], tmp_path: Path, case: str) -> None:
    damage, message = DAMAGES[case]
    (tmp_path / "m.gguf").write_bytes(damage(file_in(made_gguf("gguf-q8_0")).read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "m.gguf")


# Options


def test_options_that_files_do_not_have() -> None:
    for options, message in (
        ({"group_size": 64}, "gguf-q4_0 has one scheme"),
        ({"symmetric": False}, "gguf-q4_0 has one scheme"),
        ({"lm_head": True}, "by llama.cpp's rule"),
        ({"algorithm": "rtn"}, "takes --algorithm gptq or"),
    ):
        with pytest.raises(UsageError, match=message):
            QuantizationConfig(target="gguf-q4_0", **options)
    with pytest.raises(UsageError, match="--max-shard-size: gguf-q4_0 is one file"):
        OutputConfig(out=Path("o"), quantization=QuantizationConfig(target="gguf-q4_0"), max_shard_bytes=10**7)
    with pytest.raises(UsageError, match="--dtype: gguf-f16 says the dtype itself"):
        OutputConfig(out=Path("o"), quantization=QuantizationConfig(target="gguf-f16"), dtype="bf16")


def test_files_beside_other_outputs(
    tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One reading of the base fills a file by llama.cpp's rule, a calibrated one and a folder of safetensors."""
    outputs = tuple(
        OutputConfig(out=tmp_path / name, quantization=config)
        for name, config in (
            ("solved", QuantizationConfig(target="gguf-q8_0")),
            ("rule", QuantizationConfig(target="gguf-q8_0", algorithm="ggml")),
            ("w4a16", QuantizationConfig(target="w4a16", algorithm="rtn")),
        )
    )
    pipeline.run(job(tmp_path_factory, tmp_path, tiny_nf4, tiny_adapter, outputs=outputs, validation=None))
    solved, rule, packed = (decoded(tmp_path / name) for name in ("solved", "rule", "w4a16"))
    assert solved.keys() == rule.keys() == packed.keys()
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(solved[name], rule[name])
    assert (solved[name] - rule[name]).norm() < 0.01 * rule[name].norm()


def test_several_adapters_go_into_a_file(
    tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    half = CombinationConfig(method="linear", adapters=(str(tiny_adapter), str(tiny_adapter)), weights=(0.5, 0.5))
    one = job(tmp_path_factory, tmp_path / "one", tiny_nf4, tiny_adapter, validation=None,
              quantization=QuantizationConfig(target="gguf-f32"))  # fmt: skip
    two = job(tmp_path_factory, tmp_path / "two", tiny_nf4, combination=half, validation=None,
              quantization=QuantizationConfig(target="gguf-f32"))  # fmt: skip
    pipeline.run(one)
    pipeline.run(two)
    ours, theirs = decoded(tmp_path / "one"), decoded(tmp_path / "two")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
