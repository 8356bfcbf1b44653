"""ONNX folders against ONNX Runtime, ONNX Runtime GenAI, the onnx package and transformers."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxruntime_genai
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from qconv import judging, onnx_export, onnx_genai, pipeline
from qconv.checkpoint import open_checkpoint
from qconv.cli import cli, main
from qconv.config import MergeJob, OutputConfig, ValidateJob, ValidationConfig
from qconv.convert import dequantize
from qconv.convert.matmul_nbits import MatMulNBits
from qconv.errors import CheckpointError, NumericsError, SchemeError, UsageError
from qconv.inputs import load_reference
from qconv.onnx import GENAI_CONFIG, MODEL_FILE, genai_tokens
from qconv.quantization_config import QuantizationConfig
from qconv.serving import ort_genai_server
from qconv.types import Scheme
from scripts.engines.vocabularies import build as build_vocabulary
from tests.cli_cases import job, report_of
from tests.conftest import TINY_LLAMA
from tests.test_gguf import with_random_vectors

_FILES = {"model.onnx", "model.onnx.data", GENAI_CONFIG, "config.json", "tokenizer.json", "tokenizer_config.json"}
PROMPT = "The history of the"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in float32, by the command line."""
    out = tmp_path_factory.mktemp("onnx") / "converted"
    result = CliRunner().invoke(cli, ["convert", str(TINY_LLAMA), "--to", "onnx", "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert "ONNX Runtime agrees with PyTorch" in result.output
    return out


@pytest.fixture(scope="module")
def merged_fp16(tmp_path_factory: pytest.TempPathFactory, tiny_nf4: Path, tiny_adapter: Path) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "fp16"
    config = QuantizationConfig(target="onnx")
    pipeline.run(job(tmp_path_factory, out, tiny_nf4, tiny_adapter, quantization=config, dtype="fp16"))
    return out


@pytest.fixture(scope="module")
def beside_gptq(tmp_path_factory: pytest.TempPathFactory, tiny_nf4: Path, tiny_adapter: Path) -> Path:
    """One job with two outputs: a GPTQ folder, and the ONNX folder of the same codes."""
    out = tmp_path_factory.mktemp("beside")
    outputs = tuple(
        OutputConfig(out=out / target, quantization=QuantizationConfig(target=target), dtype="fp32")
        for target in ("gptq", "onnx-int4")
    )
    pipeline.run(job(tmp_path_factory, out, tiny_nf4, tiny_adapter, outputs=outputs))
    return out


@pytest.fixture(scope="module")
def int4(beside_gptq: Path) -> Path:
    return beside_gptq / "onnx-int4"


def session_of(folder: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(folder / MODEL_FILE), providers=["CPUExecutionProvider"])


def by_onnxruntime(folder: Path, ids_BS: Tensor) -> Tensor:
    """Logits of a graph for a first call without cached keys and values."""
    session = session_of(folder)
    feed: dict[str, Any] = {"input_ids": ids_BS.numpy(), "attention_mask": np.ones_like(ids_BS.numpy())}
    for entry in session.get_inputs():
        if entry.name.startswith("past"):
            dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[entry.type]
            feed[entry.name] = np.zeros((len(ids_BS), entry.shape[1], 0, _head_size(folder)), dtype=dtype)
    return torch.from_numpy(session.run(["logits"], feed)[0]).float()


def _head_size(folder: Path) -> int:
    return int(json.loads((folder / GENAI_CONFIG).read_text())["model"]["decoder"]["head_size"])


def by_genai(folder: Path, prompt: str, num_tokens: int) -> list[int]:
    """Greedy tokens behind a prompt, with the tokenizer of the folder."""
    model = onnxruntime_genai.Model(str(folder))
    tokenizer = onnxruntime_genai.Tokenizer(model)
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=64, do_sample=False)
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(tokenizer.encode(prompt))
    found = []
    for _ in range(num_tokens):
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    return found


def by_transformers(model: Any, folder: Path, prompt: str, num_tokens: int) -> list[int]:
    inputs = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False)
    found: list[int] = ids[0, inputs["input_ids"].shape[1] :].tolist()
    return found


def decoded_model(folder: Path) -> Any:
    """transformers' model with the weights that qconv reads from a folder."""
    view = dequantize(open_checkpoint(folder))
    model = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()
    left = model.load_state_dict({name: view.read(name).float() for name in view.specs()}, strict=False)
    assert left.unexpected_keys == []
    assert set(left.missing_keys) <= {"lm_head.weight"}  # tied
    return model


# Blocks


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from((4, 8)),
    st.booleans(),
    st.sampled_from((16, 32, 64, 128)),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(0, 2**31),
)
def test_blocks_mean_what_the_kernel_makes_of_them(
    bits: int, symmetric: bool, size: int, groups: int, n: int, seed: int
) -> None:
    """ONNX Runtime multiplies the identity by stored blocks: what comes out are the weights."""
    generator = np.random.default_rng(seed)
    k = size * groups
    stored = generator.integers(0, 256, (n, groups, size * bits // 8), dtype=np.uint8)
    scales = (generator.standard_normal((n, groups)) * 0.01).astype(np.float16).astype(np.float32)
    zeros = generator.integers(0, 256, (n, -(-groups * bits // 8)), dtype=np.uint8)
    tensors = {"qweight": stored, "scales": scales} | ({} if symmetric else {"qzeros": zeros})
    node = helper.make_node(
        "MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft",
        K=k, N=n, bits=bits, block_size=size, accuracy_level=1,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [k, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [k, n])],
        [
            numpy_helper.from_array(value.reshape(-1) if name != "qweight" else value, name)
            for name, value in tensors.items()
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (theirs_KN,) = session.run(None, {"x": np.eye(k, dtype=np.float32)})
    scheme = Scheme(bits=bits, group_size=size, symmetric=symmetric)
    named = {f"m.MatMulNBits.{name}": torch.from_numpy(value) for name, value in tensors.items()}
    ours = MatMulNBits().unpack(named, "m", scheme).dequantize()
    assert torch.allclose(ours, torch.from_numpy(theirs_KN.T.copy()), rtol=1e-6, atol=1e-7)


# Folders


def test_a_plain_graph_has_the_merged_weights(merged_fp16: Path, tiny_nf4: Path, tiny_adapter: Path) -> None:
    merged = load_reference(open_checkpoint(tiny_nf4), str(tiny_adapter), None).merged
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(merged_fp16 / MODEL_FILE)).graph.initializer}
    up = torch.from_numpy(stored["model.layers.1.mlp.up_proj.MatMul.weight"])
    assert torch.equal(up.T, merged.read("model.layers.1.mlp.up_proj.weight").half())
    view = dequantize(open_checkpoint(merged_fp16))
    assert view.kind == "onnx"
    assert view.specs().keys() == merged.specs().keys()
    assert all(torch.equal(view.read(name), merged.read(name).half()) for name in merged.specs())


def check_folder(folder: Path, bound: float, total: float, same: float = 0.97) -> dict[str, Any]:
    """Files and report; bounds are of KL: between PyTorch and ONNX Runtime, and from the reference."""
    names = {file.name for file in folder.iterdir()}
    assert names >= _FILES
    assert not any(name.endswith((".safetensors", ".partial")) for name in names)
    assert not any(file.is_dir() for file in folder.iterdir())
    report = report_of(folder)
    facts = report["stages"]["onnx"]
    assert 0 <= facts["kl_mean"] < bound
    assert 0 <= facts["kl_mean with cached keys and values"] < bound
    assert facts["same_top_token"] > same
    assert report["findings"] == []
    assert report["fidelity"]["candidate"]["runs"].startswith(f"ONNX Runtime {onnxruntime.__version__}, CPU")
    assert report["fidelity"]["total"]["kl"]["mean"] < total
    assert {MODEL_FILE, f"{MODEL_FILE}.data", GENAI_CONFIG} <= report["provenance"]["candidate"].keys()
    assert (folder / "tokenizer.json").read_bytes() == (TINY_LLAMA / "tokenizer.json").read_bytes()
    return report


def test_reports_of_merged_folders(merged_fp16: Path, int4: Path) -> None:
    """Bounds are about five times what was measured."""
    check_folder(merged_fp16, 5e-6, 0.0005)
    quantization = check_folder(int4, 1e-3, 0.02)["stages"]["quantization"]
    assert (quantization["format"], quantization["linears quantized"], quantization["algorithm"]) == (
        "matmul-nbits", 28, "gptq",
    )  # fmt: skip


def test_genai_generates_what_transformers_does(converted: Path, merged_fp16: Path, int4: Path) -> None:
    """With the tokenizer of the folder, and keys and values in the cache of ONNX Runtime GenAI."""
    for folder in (converted, merged_fp16, int4):
        expected = by_transformers(decoded_model(folder), TINY_LLAMA, PROMPT, 24)
        assert by_genai(folder, PROMPT, 24) == expected, folder.name


def test_genai_gets_a_tokenizer_file_of_sentencepiece(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """It reads no ``tokenizer.model``."""
    build_vocabulary("llama-2", TINY_LLAMA, tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").unlink(missing_ok=True)
    assert (tmp_path / "base" / "tokenizer.model").is_file()
    config = QuantizationConfig(target="onnx")
    pipeline.run(job(tmp_path_factory, tmp_path / "out", tmp_path / "base", quantization=config, validation=None))
    assert (tmp_path / "out" / "tokenizer.model").is_file()
    expected = AutoTokenizer.from_pretrained(tmp_path / "base")(PROMPT).input_ids
    assert genai_tokens(tmp_path / "out", [PROMPT], False) == [expected]
    assert "generates the 8 tokens" in report_of(tmp_path / "out")["stages"]["onnx"]["GenAI"]


def test_genai_puts_the_special_tokens_in_front_that_transformers_does(
    building: Callable[..., None], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Of a tokenizer such as Llama 3's, whose BOS is in a template; also in the server of a pack, and by the card."""
    base = shutil.copytree(TINY_LLAMA, tmp_path / "base")
    content = json.loads((base / "tokenizer.json").read_text())
    bos, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    (base / "tokenizer.json").write_text(json.dumps(content))
    building(lambda folder: None)
    folder = tmp_path / "model"
    config = QuantizationConfig(target="onnx")
    pipeline.run(job(tmp_path_factory, folder, base, quantization=config, validation=None))
    expected = AutoTokenizer.from_pretrained(base)(PROMPT).input_ids
    assert expected[0] == 0
    assert genai_tokens(folder, [PROMPT], True) == [expected]
    assert "the tokens of transformers on 16 texts" in report_of(folder)["stages"]["onnx"]["GenAI"]
    assert list(ort_genai_server.Model(str(folder), 64, None, True)._tokenizer.encode(PROMPT)) == expected
    assert 'update_options(add_special_tokens="true")' in (folder / "README.md").read_text()
    main(["pack", str(folder), "--for", "ort-genai", "--no-answers", "-q"])
    assert "--special-tokens" in (tmp_path / "model-ort-genai" / "launch.sh").read_text()


def test_codes_in_the_graph_are_those_that_calibration_chose(beside_gptq: Path) -> None:
    """Decoded by hand from the initializers of the onnx package; q, k and v lie in one node."""
    chosen = dequantize(open_checkpoint(beside_gptq / "gptq"))
    model = onnx.load(str(beside_gptq / "onnx-int4" / MODEL_FILE))
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node if node.op_type == "MatMulNBits"}
    assert len(nodes) == 4 * 5
    for name, node in nodes.items():
        attributes = {a.name: a.i for a in node.attribute}
        assert (attributes["bits"], attributes["accuracy_level"]) == (4, 4)
        n, groups = attributes["N"], attributes["K"] // attributes["block_size"]
        q, scales, zeros = (stored[x] for x in node.input[1:4])
        codes = np.stack((q & 15, q >> 4), axis=-1).reshape(n, groups, -1).astype(np.float32)
        zeros = zeros.reshape(n, -1)
        zeros = np.stack((zeros & 15, zeros >> 4), axis=-1).reshape(n, -1)[:, :groups].astype(np.float32)
        weight = ((codes - zeros[..., None]) * scales.reshape(n, groups)[..., None]).reshape(n, -1)
        _, _, block, where, role, _ = name.split("/")
        parent = f"model.{block}.{ {'attn': 'self_attn', 'mlp': 'mlp'}[where] }."
        roles = ["q_proj", "k_proj", "v_proj"] if role == "qkv_proj" else [role]
        expected = torch.cat([chosen.read(f"{parent}{role}.weight") for role in roles])
        assert torch.equal(torch.from_numpy(weight), expected), name


def test_awq_folds_and_zero_points_arrive_in_float16(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    config = QuantizationConfig(target="onnx-int4", algorithm="awq", symmetric=False, group_size=32)
    folder = tmp_path / "out"
    pipeline.run(job(tmp_path_factory, folder, tiny_nf4, tiny_adapter, quantization=config, dtype="fp16"))
    view = dequantize(open_checkpoint(folder))
    assert (view.kind, view.scheme) == ("onnx-int4", Scheme(bits=4, group_size=32, symmetric=False))
    zeros = view.read_quantized("model.layers.0.mlp.down_proj").zeros_NG
    assert zeros is not None
    assert len(zeros.unique()) > 3
    check_folder(folder, 5e-6, 0.02)
    assert mean_kl(decoded_model(folder), folder) < 5e-6


def mean_kl(model: Any, folder: Path) -> float:
    """Of what ONNX Runtime computes from a model of transformers."""
    ids = torch.arange(3, 67).reshape(1, 64) * 31 % 2048
    with torch.no_grad():
        expected = model(ids).logits.double().log_softmax(-1)
    found = by_onnxruntime(folder, ids).double().log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def of_family(family: str, random_model: Callable[..., Path], folder: Path) -> Path:
    """Biases, norms of heads, a head of its own."""
    return with_random_vectors(random_model(family), folder / "base")


def test_the_window_of_mistral_becomes_the_context(
    random_model: Callable[..., Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base, config = of_family("mistral", random_model, tmp_path), QuantizationConfig(target="onnx")
    pipeline.run(job(tmp_path_factory, tmp_path / "out", base, quantization=config, validation=None))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    assert model.config.sliding_window == 64
    assert json.loads((tmp_path / "out" / GENAI_CONFIG).read_text())["model"]["context_length"] == 64
    assert mean_kl(model, tmp_path / "out") < 1e-8


def test_qwen3_in_bfloat16(
    random_model: Callable[..., Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Its weights are those of the base; ONNX Runtime has no operations in bfloat16 for CPUs and ran its twin."""
    base, config = of_family("qwen3", random_model, tmp_path), QuantizationConfig(target="onnx")
    pipeline.run(job(tmp_path_factory, tmp_path / "out", base, quantization=config, dtype="bf16"))
    original, view = dequantize(open_checkpoint(base)), dequantize(open_checkpoint(tmp_path / "out"))
    assert view.specs().keys() == original.specs().keys()
    assert all(torch.equal(view.read(name), original.read(name)) for name in original.specs())
    report = check_folder(tmp_path / "out", 2e-4, 0.01)
    assert report["fidelity"]["candidate"]["runs"].endswith("bfloat16 weights in float32")


def test_qwen2_in_8_bits(
    random_model: Callable[..., Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Biases of q and k are zero in the first block: the builder leaves those out of the graph."""
    base = of_family("qwen2", random_model, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    for linear in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj):
        torch.nn.init.zeros_(linear.bias)
    torch.nn.init.zeros_(model.model.layers[0].self_attn.v_proj.bias)
    model.save_pretrained(base)
    config = QuantizationConfig(target="onnx-int8", group_size=32)
    pipeline.run(job(tmp_path_factory, tmp_path / "out", base, quantization=config))
    view = dequantize(open_checkpoint(tmp_path / "out"))
    assert torch.equal(view.read("model.layers.0.self_attn.k_proj.bias"), torch.zeros(64))
    own = model.state_dict()["model.layers.1.self_attn.k_proj.bias"].float()
    assert torch.equal(view.read("model.layers.1.self_attn.k_proj.bias"), own)
    assert view.schemes["model.layers.1.mlp.down_proj"] == Scheme(bits=8, group_size=32, symmetric=False)
    check_folder(tmp_path / "out", 0.01, 0.01, same=0.9)  # it was never trained: its best tokens are near one another
    assert mean_kl(model.float().eval(), tmp_path / "out") < 0.01


def test_the_model_card_says_how_to_run_it(int4: Path, converted: Path, tmp_path: Path) -> None:
    """Its code is run as it stands."""
    card = (int4 / "README.md").read_text()
    assert "library_name: onnx" in card
    assert "vllm" not in card
    code = card.partition("```python\n")[2].partition("\n```")[0]
    (tmp_path / "this-folder").symlink_to(int4)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("The capital of France is")
    assert report_of(converted)["command"] == "convert"


# What goes wrong


@pytest.fixture
def building(converted: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``building(change)``: the builder's folder is one from before, changed by ``change(folder)``."""

    def arrange(change: Callable[[Path], None]) -> None:
        def build(source: Path, out: Path, dtype: str, bits: int | None) -> None:
            out.mkdir()
            for name in (MODEL_FILE, f"{MODEL_FILE}.data", GENAI_CONFIG):
                shutil.copyfile(converted / name, out / name)
            change(out)

        monkeypatch.setattr(onnx_export, "build", build)

    return arrange


def _altered(initializer: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (tensor,) = [
            t for t in onnx.load(str(folder / MODEL_FILE), load_external_data=False).graph.initializer
            if t.name == initializer
        ]  # fmt: skip
        place = {entry.key: entry.value for entry in tensor.external_data}
        with open(folder / place["location"], "r+b") as file:
            file.seek(int(place["offset"]))
            file.write(np.full(64, 0.75, np.float32).tobytes())

    return change


def _renamed(folder: Path) -> None:
    content = json.loads((folder / GENAI_CONFIG).read_text())
    content["model"]["decoder"]["inputs"]["past_key_names"] = "past.%d"
    (folder / GENAI_CONFIG).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (_renamed, CheckpointError, "GenAI cannot generate with it"),
        (_altered("model.layers.2.mlp.down_proj.MatMul.weight"), CheckpointError, "changed the values"),
        (_altered("sin_cache"), NumericsError, "computes something else than PyTorch"),
        (lambda folder: (folder / MODEL_FILE).write_bytes(b"no"), CheckpointError, "cannot be read as an ONNX"),
        (lambda folder: (folder / f"{MODEL_FILE}.data").unlink(), CheckpointError, "model.onnx.data cannot be read"),
    ],
    ids=["names of the cache", "weight", "rotary angles", "graph", "data"],
)  # fmt: skip
def test_a_wrong_graph_is_an_error_that_leaves_nothing(
    building: Callable[..., None], tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory, change: Callable[[Path], None], error: type[Exception], match: str,
) -> None:  # fmt: skip
    building(change)
    config = QuantizationConfig(target="onnx")
    with pytest.raises(error, match=match):
        pipeline.run(job(tmp_path_factory, tmp_path / "out", TINY_LLAMA, quantization=config, validation=None))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("found", [[], [7, 7]])
def test_other_tokens_than_the_graphs_are_an_error(
    building: Callable[..., None], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch, found: list[int],
) -> None:  # fmt: skip
    building(lambda folder: None)
    monkeypatch.setattr(onnx_genai, "genai_greedy", lambda *_: found)
    config = QuantizationConfig(target="onnx")
    with pytest.raises(NumericsError, match="GenAI generates"):
        pipeline.run(job(tmp_path_factory, tmp_path / "out", TINY_LLAMA, quantization=config, validation=None))
    assert list(tmp_path.iterdir()) == []


def test_an_unchanged_graph_is_taken(
    building: Callable[..., None], tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    building(lambda folder: None)
    config = QuantizationConfig(target="onnx")
    pipeline.run(job(tmp_path_factory, tmp_path / "out", TINY_LLAMA, quantization=config, validation=None))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_builder_that_fails_is_quoted(tmp_path: Path) -> None:
    from qconv.onnx import build

    with pytest.raises(CheckpointError, match=r"onnxruntime-genai failed \(exit code 1\); it said: "):
        build(tmp_path / "nothing-here", tmp_path / "out", "fp32", None)


@pytest.mark.parametrize("location", ["../model.onnx.data", "/etc/hostname", "sub/model.onnx.data", ".."])
def test_data_outside_of_the_folder_is_refused(converted: Path, tmp_path: Path, location: str) -> None:
    folder = Path(shutil.copytree(converted, tmp_path / "model"))
    model = onnx.load(str(folder / MODEL_FILE), load_external_data=False)
    model.graph.initializer[3].external_data[0].value = location
    onnx.save(model, str(folder / MODEL_FILE))
    with pytest.raises(CheckpointError, match="only plain names in the folder are read"):
        open_checkpoint(folder)


def test_a_folder_that_is_cut_off_is_refused(converted: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(converted, tmp_path / "model"))
    data = folder / f"{MODEL_FILE}.data"
    data.write_bytes(data.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="the file is cut off, or of another model"):
        open_checkpoint(folder)
    (folder / GENAI_CONFIG).write_text('{"model": {"decoder": {"filename": "../model.onnx"}}}')
    with pytest.raises(CheckpointError, match="expected the file name of a decoder in this folder"):
        open_checkpoint(folder)


def test_what_onnx_targets_do_not_take_is_refused(tmp_path: Path) -> None:
    def output(**options: Any) -> OutputConfig:
        return OutputConfig(out=tmp_path, **options)

    for options, match in (
        ({"group_size": 256}, "--group-size: onnx-int4 has blocks of 128, 64, 32, 16"),
        ({"group_size": -1}, "--group-size: onnx-int4 has blocks of"),
        ({"ignore": ("*.down_proj",)}, "--ignore: onnx-int4 quantizes all linears"),
        ({"lm_head": True}, "--lm-head: onnx-int4 keeps the output head"),
        ({"desc_act": True}, "--desc-act belongs to"),
    ):
        with pytest.raises(UsageError, match=match):
            QuantizationConfig(target="onnx-int4", **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="onnx has one scheme"):
        QuantizationConfig(target="onnx", group_size=32)
    config = QuantizationConfig(target="onnx")
    with pytest.raises(UsageError, match="--max-shard-size: onnx has its weights in one file"):
        output(quantization=config, max_shard_bytes=2_000_000)
    with pytest.raises(UsageError, match="--tp: ONNX Runtime GenAI runs a model on one device"):
        MergeJob(base="base", outputs=(output(quantization=config),), tensor_parallel=2)


def test_other_families_and_widths_are_refused_before_any_work(
    random_model: Callable[..., Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for base, config, error, match in (
        (random_model("gemma"), QuantizationConfig(target="onnx"), CheckpointError, "'gemma' is not written as ONNX"),
        (
            random_model("llama", intermediate_size=200),
            QuantizationConfig(target="onnx-int4"),
            SchemeError,
            "no group size of 128, 64, 32 divides",
        ),
    ):
        with pytest.raises(error, match=match):
            pipeline.run(job(tmp_path_factory, tmp_path / "out", base, quantization=config))
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(
    tiny_llama: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    config = QuantizationConfig(target="onnx")
    with pytest.raises(UsageError, match=r"not installed: onnxruntime_genai; pip install 'qconv\[onnx\]'"):
        pipeline.run(job(tmp_path_factory, tmp_path / "out", tiny_llama, quantization=config))


def test_a_package_that_is_missing_is_not_said_of_the_file(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UsageError, match=r"not installed: onnx .*; pip install 'qconv\[onnx\]'"):
        open_checkpoint(converted)


# Validation and the command line


def validated(candidate: Path, base: Path, adapter: Path, **options: Any) -> Any:
    config = ValidationConfig(tokens=256, seq_len=64, defaults=False, **options)
    job = ValidateJob(
        reference=str(base), candidate=str(candidate), adapter=str(adapter), device="cpu", validation=config
    )
    return judging.validate(job)


def test_a_folder_is_validated_as_it_is_run_or_decoded(int4: Path, tiny_nf4: Path, tiny_adapter: Path) -> None:
    folder = int4
    run = validated(folder, tiny_nf4, tiny_adapter, attribution="always")
    decoded = validated(folder, tiny_nf4, tiny_adapter, engine="qconv")
    assert run.document["subject"]["target"] == "onnx-int4"
    assert run.fidelity["candidate"]["runs"].startswith("ONNX Runtime")
    assert decoded.fidelity["candidate"]["runs"].startswith("decoded by qconv")
    assert run.fidelity["blocks"] == []
    assert len(decoded.fidelity["blocks"]) == 4
    assert run.fidelity["attribution"]["linears"]
    assert any("hidden states were not compared" in note for note in run.fidelity["notes"])
    kl, other = (outcome.fidelity["total"]["kl"]["mean"] for outcome in (run, decoded))
    assert kl != other  # inputs of linears are rounded to 8 bits
    assert kl == pytest.approx(other, rel=0.3)


def test_onnxruntime_is_for_its_own_folders(tiny_nf4: Path, tiny_adapter: Path) -> None:
    with pytest.raises(UsageError, match="--engine onnxruntime runs folders of ONNX Runtime GenAI"):
        validated(tiny_nf4, tiny_nf4, tiny_adapter, engine="onnxruntime")


def test_convert_keeps_the_weights(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    view, own = dequantize(open_checkpoint(converted)), dequantize(open_checkpoint(TINY_LLAMA))
    assert all(torch.equal(view.read(name), own.read(name).float()) for name in own.specs())
    words = ["convert", str(TINY_LLAMA), "--to", "bf16", "--dtype", "fp16", "-o", str(tmp_path / "other")]
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert str(caught.value.code) == "2"
    assert "--dtype is not for models" in capsys.readouterr().err


# Packs


def packed(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    main(["pack", *map(str, words), "--device", "cpu", "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_pack_serves_what_the_smoke_test_expects(
    int4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launch script starts ONNX Runtime GenAI itself."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("He went into the\nThe United\n")
    out, port = tmp_path / "pack", free_port()
    document = packed(capsys, int4, "--for", "ort-genai", "-o", out, "--prompts", prompts, "--port", str(port))
    assert document["layout"] == "onnx-int4"
    assert document["answers"] > 0
    assert document["memory"]["cache_bytes_per_token"] == 2 * 4 * 2 * 64 * 4  # keys and values in float32
    assert document["memory"]["concurrency"] == 1
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = [sys.executable, "-I", "-S", str(out / "smoke_test.py"), "--wait", "120"]
    server = subprocess.Popen([out / "launch.sh", "--host", "127.0.0.1"], env=environment, stdout=subprocess.PIPE)
    try:
        smoke = subprocess.run(words, capture_output=True, text=True, check=False)
        assert smoke.returncode == 0, smoke.stdout
        assert smoke.stdout.count(": ok") == len(json.loads((out / "smoke.json").read_text())["cases"])
        url = f"http://127.0.0.1:{port}/v1/completions"
        for body, match in (
            ({"prompt": "a", "stream": True}, "not answered here: stream"),
            ({"prompt": "a", "model": "other"}, "model 'other' is not here"),
            ({"prompt": "a", "max_tokens": 5000}, "the context is 1024"),
            ({}, "a text as prompt"),
        ):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(urllib.request.Request(url, data=json.dumps(body).encode()))
            assert caught.value.code == 400
            assert match in caught.value.read().decode()
    finally:
        server.terminate()
        server.communicate()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_what_a_pack_refuses(int4: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, code, match in (
        ((int4, "--for", "vllm"), 3, "holds an ONNX graph (onnx-int4)"),
        ((converted, "--for", "ollama"), 3, "holds an ONNX graph (onnx)"),
        ((int4, "--for", "ort-genai", "--tp", "2"), 3, "drop --tp"),
        ((int4, "--for", "ort-genai", "--kv-dtype", "fp8"), 3, "drop --kv-dtype"),
        ((int4, "--for", "ort-genai", "--concurrency", "2"), 2, "runs 1 at a time"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(["pack", *map(str, words), "--device", "cpu", "--no-answers", "-o", str(tmp_path / "out")])
        assert int(str(caught.value.code)) == code
        assert match in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
