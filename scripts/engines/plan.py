"""Which artifacts are made, and which engine reads which: rows of data, and a ``read_*`` file for each engine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from qconv.targets import Target

_CALIBRATED = "--calibration default-prose --samples 8"


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One output of qconv.

    Attributes:
        target: of `qconv.targets.TARGETS`, or None for plain weights.
        arguments: of qconv, with ``{base}``, ``{adapter}``, ``{vocabularies}`` and ``{gpt_oss}`` to fill in.
        rows: of 512 tokens to score; more where single tokens differ more.
        texts: tokenizers are asked for the tokens of `vocabularies.TEXTS`, too.
    """

    target: str | None
    arguments: str
    rows: int = 8
    texts: bool = False


def _merged(target: str, options: str = _CALIBRATED, rows: int = 8) -> Artifact:
    """SmolLM2-135M with the adapter in it, to a target."""
    arguments = f"merge {{base}} {{adapter}} --requant {target} {options}"
    return Artifact(target=target, arguments=arguments, rows=rows)


ARTIFACTS = {
    "bf16": Artifact(target=None, arguments="merge {base} {adapter}"),
    "gptq": _merged("gptq"),
    "gptq-desc-act": _merged("gptq", f"--desc-act {_CALIBRATED}"),
    "gptq-asym": _merged("gptq", f"--asym {_CALIBRATED}"),
    "gptq-v2": _merged("gptq_v2"),
    "awq": _merged("awq"),
    "w4a16": _merged("w4a16"),
    "w4a16-asym": _merged("w4a16", f"--asym {_CALIBRATED}"),
    "w4a16-partly": _merged("w4a16", f"--algorithm awq+gptq --ignore '*.layers.0.*' {_CALIBRATED}"),
    "w4a16-cache": _merged("w4a16", f"--kv-cache fp8 {_CALIBRATED}", rows=16),
    "w8a16": _merged("w8a16"),
    "int8": _merged("int8", "--algorithm int8", rows=48),
    "int8-smoothed": _merged("int8", rows=24),
    "fp8": _merged("fp8", "", rows=16),
    "fp8-static": _merged("fp8", f"--activations static {_CALIBRATED}", rows=16),
    "fp8-cache": _merged("fp8", f"--kv-cache fp8 {_CALIBRATED}", rows=32),
    # Blocks of 128 divide no layer of SmolLM2, whose width is 576.
    "fp8-block": Artifact(target="fp8-block", arguments="quantize tests/data/tiny-llama --to fp8-block"),
    "w4a8": _merged("w4a8", rows=48),
    "w4a8-fp8": _merged("w4a8-fp8", rows=48),
    "nvfp4": _merged("nvfp4"),
    "nvfp4a16": _merged("nvfp4a16", "--algorithm rtn"),
    "mxfp4": _merged("mxfp4"),
    "mxfp4a16": _merged("mxfp4a16", "--algorithm rtn"),
    "gpt-oss-mxfp4": Artifact(
        target="gpt-oss-mxfp4", arguments="quantize {gpt_oss} --to gpt-oss-mxfp4 --algorithm rtn"
    ),
    "nf4": _merged("nf4", ""),
    "gguf-q4_0": _merged("gguf-q4_0"),
    "gguf-q4_1": _merged("gguf-q4_1"),
    "gguf-q8_0": _merged("gguf-q8_0"),
    "gguf-q5_0": _merged("gguf-q5_0", ""),
    "gguf-q5_1": _merged("gguf-q5_1", ""),
    "gguf-f16": _merged("gguf-f16", ""),
    "gguf-bf16": _merged("gguf-bf16", ""),
    "gguf-f32": _merged("gguf-f32", ""),
    "onnx": _merged("onnx", ""),
    "onnx-fp16": _merged("onnx", "--dtype fp16"),
    "onnx-int4": _merged("onnx-int4", rows=16),
    "onnx-int8": _merged("onnx-int8", rows=16),
    **{
        f"vocabulary-{style}": Artifact(
            target="gguf-f32", arguments=f"quantize {{vocabularies}}/{style} --to gguf-f32", texts=True
        )
        for style in ("llama-2", "mistral", "gemma")
    },
}
"""By name, which is that of the artifact's folder, too."""

_IN_16_BITS = ("w4a16", "w4a16-partly", "w4a16-cache", "w8a16", "nvfp4a16", "mxfp4a16")
_ROUNDING_INPUTS = ("int8", "int8-smoothed", "fp8", "fp8-cache", "fp8-block", "w4a8", "w4a8-fp8", "nvfp4", "mxfp4")
_GGUF = tuple(name for name in ARTIFACTS if name.startswith("gguf-"))
_VOCABULARIES = tuple(name for name in ARTIFACTS if name.startswith("vocabulary-"))
_CACHES = ("w4a16-cache", "fp8-cache")
_ONNX = ("onnx", "onnx-int4", "onnx-int8")
_IN_FLOAT32 = 0.001
"""Lead of a best logit that two computations in float32 may disagree about: they differ by about 0.0001."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What reads artifacts.

    Attributes:
        key: of its readings on disk.
        reader: the file of this folder that runs in its environment.
        environment: the folder ``.venv-NAME`` that it runs in, or None: qconv's own.
        reads: artifacts that it must read, and agree on.
        tried: those that it may refuse; what it reads all the same must agree.
        stands_for: names of `Target.readers` that it answers for, where these are not its own name.
        note: what one has to know to repeat a reading.
        notes: the same for single artifacts.
        close: artifacts whose greedy tokens must be the same, each with the lead of qconv's best logit up to which they
            may part.
        without_onednn: artifacts for which PyTorch's matrix products have to do without oneDNN.
        settings: artifacts that need environment variables of their own.
        cuts: artifacts whose keys and values it cuts towards zero where others round to nearest; for these, so does
            qconv's reading (see `cut`).
    """

    key: str
    name: str
    reader: str
    environment: str | None
    reads: tuple[str, ...]
    note: str
    tried: tuple[str, ...] = ()
    stands_for: tuple[str, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()
    close: Mapping[str, float] = field(default_factory=dict)
    without_onednn: tuple[str, ...] = ()
    settings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    cuts: tuple[str, ...] = ()

    @property
    def answers_for(self) -> tuple[str, ...]:
        return (self.name, *self.stands_for)


ENGINES = (
    Engine(
        key="vllm",
        name="vLLM",
        reader="read_vllm.py",
        environment=".venv-vllm",
        reads=(
            *("bf16", "gptq", "gptq-v2", "awq", "w4a16", "w4a16-asym", "w4a16-partly", "w4a16-cache"),
            *("int8", "int8-smoothed", "fp8", "fp8-cache", "w4a8"),
        ),
        tried=(
            *("w8a16", "fp8-static", "gptq-desc-act", "gptq-asym", "fp8-block", "nf4"),
            *("nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16", "gpt-oss-mxfp4"),
        ),
        note="CPU build, `dtype=bfloat16`, `enforce_eager`, `VLLM_CPU_INT4_W4A8=0`. The last matters on CPUs with AMX: "
        "by default vLLM's 4-bit kernels there also round activations to 8 bits, which is not what the files say.",
        notes=(
            (
                "fp8",
                "with `torch.backends.mkldnn.set_flags(False)`. On CPUs without float8 instructions vLLM leaves the "
                "product to `torch._scaled_mm`, which would take hours for these rows through oneDNN, and computes it "
                "in float32 without. The same for `fp8-cache`.",
            ),
            ("fp8-block", "vLLM needs AMX for it on a CPU."),
            (
                "*-cache",
                "its CPU build reads the scales, and cuts what it divides by them towards zero, where GPUs round to "
                "nearest: in a cache of 98,304 random keys every code was that of cutting, and half were not the "
                "nearest. It is compared with qconv's reading of the same files cut alike.",
            ),
            (
                "w4a8",
                "with `VLLM_CPU_INT4_W4A8=1`, on CPUs with AMX: only then do its 4-bit kernels round inputs as the "
                "files say, to 8 bits, symmetric, for each token (largest magnitude / 127; compressed-tensors: 127.5).",
            ),
        ),
        settings={"w4a8": {"VLLM_CPU_INT4_W4A8": "1"}},
        cuts=_CACHES,
        without_onednn=("fp8", "fp8-cache", "fp8-static"),
    ),
    Engine(
        key="gptqmodel",
        name="transformers + gptqmodel",
        reader="read_transformers.py",
        environment=".venv-gptqmodel",
        reads=("gptq", "gptq-v2", "gptq-desc-act", "gptq-asym", "awq"),
        note="`AutoModelForCausalLM.from_pretrained(OUT, dtype=torch.bfloat16)`, on a CPU.",
    ),
    Engine(
        key="transformers",
        name="transformers",
        reader="read_transformers.py",
        environment=None,
        reads=("bf16", *_IN_16_BITS, *_ROUNDING_INPUTS, "nf4", "gpt-oss-mxfp4", *_GGUF),
        tried=("w4a16-asym", "fp8-static"),
        stands_for=("transformers + compressed-tensors", "transformers + bitsandbytes"),
        note="the same with compressed-tensors, bitsandbytes and gguf in qconv's own environment; GGUF files with "
        "`gguf_file=` and in float32, as transformers decodes them while loading.",
        notes=(
            (
                "*-cache",
                "compressed-tensors rounds keys and values by the stored scales, and divides by them in the model's "
                "bfloat16; qconv divides in float32, as kernels do. Dividing in bfloat16, too, qconv's reading of "
                "`w4a16-cache` is the same to the last bit.",
            ),
        ),
        close=dict.fromkeys(_GGUF, _IN_FLOAT32),
    ),
    Engine(
        key="llama-cpp",
        name="llama.cpp",
        reader="read_llama_cpp.py",
        environment=".venv-llama-cpp",
        reads=(*_GGUF, *_VOCABULARIES),
        note="llama-cpp-python, built from its source distribution, on a CPU; keys and values in float16 (the "
        "default). Inputs of weights in blocks are rounded to 8 bits there, and not in qconv's reading.",
        close=dict.fromkeys(("gguf-f32", *_VOCABULARIES), 0.0),
    ),
    Engine(
        key="onnxruntime",
        name="ONNX Runtime",
        reader="read_onnxruntime.py",
        environment=None,
        reads=(*_ONNX, "onnx-fp16"),
        stands_for=("ONNX Runtime GenAI",),
        note="the CPU provider, fed tokens and an empty cache; the text is that of ONNX Runtime GenAI. With codes it "
        "rounds inputs of linears to 8 bits (`accuracy_level` 4), which is not in qconv's reading.",
        close={"onnx": _IN_FLOAT32, "onnx-fp16": 0.1, "onnx-int4": 0.5, "onnx-int8": 0.5},
    ),
    Engine(
        key="openvino",
        name="OpenVINO",
        reader="read_openvino.py",
        environment=".venv-openvino",
        reads=_ONNX,
        tried=("onnx-fp16",),
        note="its own reader of ONNX files, on a CPU, with `INFERENCE_PRECISION_HINT=f32` and "
        "`DYNAMIC_QUANTIZATION_GROUP_SIZE=0`: by default it computes in bfloat16 on CPUs with AMX, and rounds inputs "
        "of 4-bit and 8-bit weights.",
        close=dict.fromkeys(_ONNX, _IN_FLOAT32),
    ),
)

NOTES = {
    "fp8-block": "the tests' four-layer Llama, as blocks of 128 divide no layer of SmolLM2, and without an adapter.",
    "gpt-oss-mxfp4": "a small gpt-oss with random weights (`scripts/engines/gpt_oss.py`), the only family that has it.",
    "vocabulary-*": "the same Llama with small vocabularies that SentencePiece trained with the options of Llama 2, "
    "Mistral and Gemma (`scripts/engines/vocabularies.py`); the engine must make the tokens that transformers makes of "
    "some texts, too.",
}
"""What one has to know of an artifact."""

NOT_RUN = {
    "SGLang": "its packages are for GPUs.",
    "Ollama": "its program is in no package registry; it runs llama.cpp.",
    "LM Studio": "an application for desktops; it runs llama.cpp.",
    "vLLM on a GPU": "its kernels are others (Marlin); what they need of the files is checked by `make test`.",
}
"""Readers that this leaves out, and why: among them all that `Target.readers` names and `ENGINES` has not."""


NOT_MADE = {
    "hqq": "for bases of HQQ alone; transformers 4.57 with hqq makes the same weights of it, and 5 does not read HQQ.",
}
"""Targets that have no artifact, and why."""


def readers_of(target: Target) -> list[str]:
    """Names in `Target.readers`, without what is said of them in brackets."""
    return [name.strip() for name in re.sub(r"\([^)]*\)", "", target.readers).split(",")]
