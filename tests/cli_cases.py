"""Shared by the tests of whole jobs: outputs that are made once, damaged copies of inputs, and independent decoders.

The decoders follow the published layouts element by element, in numpy, and share no code with `qconv.convert`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qconv import corpus, pipeline
from qconv.config import CalibrationConfig, MergeJob, OutputConfig, ValidationConfig
from qconv.errors import UsageError
from qconv.quantization_config import QuantizationConfig
from qconv.report.document import JSON_NAME
from qconv.targets import TARGETS
from tests.conftest import TINY_LLAMA

NUM_LINEARS = 28  # seven in each of the four blocks of tiny-llama
EVAL_TOKENS, SEQ_LEN = 512, 64
_MADE: dict[tuple[Any, ...], Path] = {}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One cell of the table of outputs."""

    target: str
    algorithm: str
    bits: int
    symmetric: bool | None = None
    desc_act: bool = False
    activations: str | None = None

    def __str__(self) -> str:
        symmetric = {True: "-sym", False: "-asym", None: ""}[self.symmetric]
        return f"{self.target}-{self.algorithm}{self.bits}{symmetric}{'-desc_act' if self.desc_act else ''}" + (
            "-static" if self.activations == "static" else ""
        )

    @property
    def config(self) -> QuantizationConfig:
        return QuantizationConfig(**dataclasses.asdict(self))  # type: ignore[arg-type]


def calibrates(arguments: Iterable[str | Path]) -> bool:
    """Whether a command line asks for an output whose numbers are chosen by calibration."""
    words = list(map(str, arguments))
    pairs = list(itertools.pairwise(words))
    chosen = {option.removeprefix("--"): value for option, value in pairs if option in ("--algorithm", "--activations")}
    targets = [value for option, value in pairs if option in ("--requant", "--to")]
    for target in targets:
        with contextlib.suppress(UsageError):  # the command says so itself
            if QuantizationConfig(target=target, **chosen).needs_calibration:  # type: ignore[arg-type]
                return True
    return False


NEWER = ("w4a8", "w4a8-fp8", "nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16")  # have tests of their own


def all_variants() -> Iterator[Variant]:
    """Everything that `TARGETS` permits; few bits, version 2 of GPTQ and `NEWER` with their own algorithm alone.

    GGUF files and ONNX graphs are no safetensors, gpt-oss's layout is for its own family, and ``zeros`` needs a base in
    integer codes; they have tests of their own.
    """
    for target in TARGETS.values():
        if target.gguf_kind is not None or target.is_onnx or target.name == "gpt-oss-mxfp4":
            continue
        choices = [None] if target.symmetric is None else [True] if target.activations else [True, False]
        for algorithm, bits, symmetric in itertools.product(target.algorithms, target.bits, choices):
            is_like_another = bits < 4 or target.name == "gptq_v2" or target.name in NEWER
            if algorithm == "zeros" or (algorithm != target.algorithms[0] and is_like_another):
                continue
            yield Variant(target.name, algorithm, bits, symmetric)
            if target.format.startswith("gptq") and algorithm == "gptq":
                yield Variant(target.name, algorithm, bits, symmetric, desc_act=True)
            if target.name == "fp8":
                yield Variant(target.name, algorithm, bits, activations="static")


VARIANTS = list(all_variants())
# One of each layout of bytes: what readers and `convert` have to tell apart.
LAYOUTS = [
    Variant("gptq", "rtn", 4, True),
    Variant("gptq", "rtn", 8, False),
    Variant("gptq", "gptq", 4, False, desc_act=True),
    Variant("awq", "rtn", 4, True),
    Variant("awq", "rtn", 4, False),
    Variant("w4a16", "rtn", 4, True),
    Variant("w4a16", "rtn", 4, False),
    Variant("w8a16", "rtn", 8, True),
    Variant("gptq", "rtn", 3, True),
    Variant("gptq_v2", "rtn", 4, False),
    Variant("fp8", "fp8", 8),
    Variant("fp8", "fp8", 8, activations="static"),
]


def small_texts(factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A calibration and an evaluation file: the first documents of the embedded text."""
    if ("texts",) not in _MADE:
        folder = factory.mktemp("texts")
        for name, source in (("calibration.txt", "default"), ("evaluation.txt", "default-eval")):
            (folder / name).write_text("\n\n".join(corpus.load_documents(source)[:2]), encoding="utf-8")
        _MADE[("texts",)] = folder
    folder = _MADE[("texts",)]
    return folder / "calibration.txt", folder / "evaluation.txt"


def job(factory: pytest.TempPathFactory, out: Path, base: Path, adapter: Path | None = None, **more: Any) -> MergeJob:
    """A job on a few hundred tokens; ``more`` are options of it or of its output."""
    calibration, evaluation = small_texts(factory)
    options: dict[str, Any] = {
        "calibration": CalibrationConfig(sources=(str(calibration),), samples=8, seq_len=SEQ_LEN),
        "validation": ValidationConfig(
            source=str(evaluation), tokens=EVAL_TOKENS, seq_len=SEQ_LEN, control_tokens=EVAL_TOKENS, defaults=False
        ),
        "device": "cpu",
    }
    source = None if adapter is None else str(adapter)
    own = {name: more.pop(name) for name in ("quantization", "dtype", "max_shard_bytes") if name in more}
    output = OutputConfig(out=out, **own)
    return MergeJob(base=str(base), adapter=source, **({"outputs": (output,)} | options | more))


def made(
    factory: pytest.TempPathFactory, base: Path, adapter: Path, variant: Variant | None, dtype: str | None = None
) -> Path:
    """The output for a `Variant`, or a plain one; made once in a test run, so never change it."""
    key = (variant, dtype, base, adapter)
    if key not in _MADE:
        out = factory.mktemp("out") / str(variant or "plain")
        quantization = None if variant is None else variant.config
        pipeline.run(job(factory, out, base, adapter, quantization=quantization, dtype=dtype))
        _MADE[key] = out
    return _MADE[key]


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
    return report


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder through the safetensors library."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def damaged(source: Path, folder: Path, edit: Callable[[dict[str, Tensor]], None], **config: Any) -> Path:
    """A copy of a model or adapter folder with edited tensors, and config keys set (or, with None, removed)."""
    shutil.copytree(source, folder)
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    edit(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, weights, metadata={"format": "pt"})
    set_config(folder, **config)
    return folder


def set_config(folder: Path, **config: Any) -> None:
    name = "adapter_config.json" if (folder / "adapter_config.json").exists() else "config.json"
    content = json.loads((folder / name).read_text()) | config
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def evaluation_ids(factory: pytest.TempPathFactory) -> Tensor:
    """The token rows that `job` validates on, ``[rows, SEQ_LEN]``."""
    _, evaluation = small_texts(factory)
    tokenizer = corpus.load_tokenizer(TINY_LLAMA)
    return corpus.pack_tokens(
        corpus.load_documents(str(evaluation)), tokenizer, EVAL_TOKENS // SEQ_LEN, SEQ_LEN, seed=0
    )


def mean_kl(reference_BSV: Tensor, candidate_BSV: Tensor) -> float:
    """KL(reference || candidate) in nats over all positions that have a next token, in float64."""

    def log_softmax(logits: Tensor) -> np.ndarray:
        x = logits[:, :-1].float().numpy().astype(np.float64)
        x -= x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(reference_BSV), log_softmax(candidate_BSV)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def bitsandbytes_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a 4-bit folder as bitsandbytes itself dequantizes it, under its parameter name."""
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return {
        name: dequantize_4bit(p.data, p.quant_state) if hasattr(p, "quant_state") else p.data
        for name, p in model.named_parameters()
    }


def whole_model(weights: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """A transformers model with the architecture of tiny-llama and these weights, cast once."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY_LLAMA), dtype=dtype)
    missing, unexpected = model.load_state_dict({n: t.to(dtype) for n, t in weights.items()}, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    return model.eval()


def logits_of(model: nn.Module, ids_BS: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids_BS).logits
    return logits


def decoded_weights(folder: Path) -> dict[str, Tensor]:
    """All logical weights of a GPTQ or AWQ folder, decoded here; float32."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = stored_tensors(folder)
    decode = {"gptq": decode_gptq, "awq": decode_awq}[config["quant_method"]]
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    weights = {f"{module}.weight": torch.from_numpy(decode(tensors, module, config)) for module in modules}
    plain = {name: t.float() for name, t in tensors.items() if name.rpartition(".")[0] not in modules}
    return weights | plain


def decode_gptq(tensors: Mapping[str, Tensor], module: str, config: Mapping[str, Any]) -> np.ndarray:
    """AutoGPTQ's layout: words along K, zero points along N; version 1 stores those minus one, version 2 as they are.

    The stream of 3-bit numbers crosses words (10, 1, 10, 1, 10 of them), as `QuantLinear.pack` of AutoGPTQ has it.
    """
    minus = {"gptq": 1, "gptq_v2": 0}[config["checkpoint_format"]]
    words = tensors[f"{module}.qweight"].numpy()  # [K * bits / 32, N]
    zero_words = tensors[f"{module}.qzeros"].numpy()  # [G, N * bits / 32]
    scales = tensors[f"{module}.scales"].numpy().astype(np.float32)  # [G, N]
    group = tensors[f"{module}.g_idx"].numpy()  # [K]
    codes, zeros = numbers_of(words.T, config["bits"]).T, numbers_of(zero_words, config["bits"]) + minus
    weight_KN = (codes - zeros[group]).astype(np.float32) * scales[group]
    return np.ascontiguousarray(weight_KN.T)


def numbers_of(words: np.ndarray, bits: int) -> np.ndarray:
    """The numbers in each row of int32 words, low bits first, as int64."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    return stream.reshape(len(words), -1, bits).astype(np.int64) @ (1 << np.arange(bits))


def decode_awq(tensors: Mapping[str, Tensor], module: str, config: Mapping[str, Any]) -> np.ndarray:
    """AutoAWQ's gemm layout: words along N, nibble i holding column (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
    assert (config["version"], config["bits"]) == ("gemm", 4)
    scales = tensors[f"{module}.scales"].numpy().astype(np.float32)  # [G, N]

    def unpack(name: str) -> np.ndarray:
        words = tensors[f"{module}.{name}"].numpy().view(np.uint32)
        values = np.empty((words.shape[0], words.shape[1] * 8), dtype=np.int64)
        for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            values[:, column::8] = (words >> np.uint32(4 * nibble)) & 15
        return values

    codes, zeros = unpack("qweight"), unpack("qzeros")  # [K, N], [G, N]
    size = codes.shape[0] if config["group_size"] == -1 else config["group_size"]
    group = np.arange(codes.shape[0]) // size
    weight_KN = (codes - zeros[group]).astype(np.float32) * scales[group]
    return np.ascontiguousarray(weight_KN.T)
