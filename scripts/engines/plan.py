"""Which artifacts are made, and which engine reads which."""

from __future__ import annotations

_MERGE = "merge {base} {adapter}"
_CALIBRATED = "--calibration default-prose --samples 8"

TARGETS = {
    "bf16": _MERGE,
    "gptq": f"{_MERGE} --requant gptq {_CALIBRATED}",
    "gptq-desc-act": f"{_MERGE} --requant gptq --desc-act {_CALIBRATED}",
    "gptq-asym": f"{_MERGE} --requant gptq --asym {_CALIBRATED}",
    "gptq-v2": f"{_MERGE} --requant gptq_v2 {_CALIBRATED}",
    "awq": f"{_MERGE} --requant awq {_CALIBRATED}",
    "w4a16": f"{_MERGE} --requant w4a16 {_CALIBRATED}",
    "w4a16-asym": f"{_MERGE} --requant w4a16 --asym {_CALIBRATED}",
    "w8a16": f"{_MERGE} --requant w8a16 {_CALIBRATED}",
    "w4a16-partly": f"{_MERGE} --requant w4a16 --algorithm awq+gptq --ignore '*.layers.0.*' {_CALIBRATED}",
    "int8": f"{_MERGE} --requant int8 --algorithm int8",
    "int8-smoothed": f"{_MERGE} --requant int8 {_CALIBRATED}",
    "fp8": f"{_MERGE} --requant fp8",
    "fp8-static": f"{_MERGE} --requant fp8 --activations static {_CALIBRATED}",
    # Blocks of 128 divide no layer of SmolLM2, whose width is 576.
    "fp8-block": "quantize tests/data/tiny-llama --to fp8-block",
    "nf4": f"{_MERGE} --requant nf4",
    "gguf-f32": f"{_MERGE} --requant gguf-f32",
    "gguf-f16": f"{_MERGE} --requant gguf-f16",
    "gguf-bf16": f"{_MERGE} --requant gguf-bf16",
    "gguf-q8_0": f"{_MERGE} --requant gguf-q8_0 {_CALIBRATED}",
    "gguf-q4_0": f"{_MERGE} --requant gguf-q4_0 {_CALIBRATED}",
    "gguf-q4_1": f"{_MERGE} --requant gguf-q4_1 {_CALIBRATED}",
    "gguf-q5_0": f"{_MERGE} --requant gguf-q5_0",
    "gguf-q5_1": f"{_MERGE} --requant gguf-q5_1",
}
"""Arguments of qconv by target; the name is that of the artifact's folder, too."""

ROWS_ELSE = 8
ROWS = {"int8": 48, "int8-smoothed": 48, "fp8": 16, "fp8-static": 16}
"""Rows of 512 tokens to score by target: more where single tokens differ more."""

VLLM, TRANSFORMERS, LLAMA_CPP = "vLLM", "transformers + gptqmodel", "llama.cpp"

READERS = {VLLM: "read_vllm.py", TRANSFORMERS: "read_transformers.py", LLAMA_CPP: "read_llama_cpp.py"}

GGUF = tuple(target for target in TARGETS if target.startswith("gguf-"))
SAME_TEXT = ("gguf-f32",)
"""Where engine and qconv compute in float32: the greedy continuation must be the same, too."""

REQUIRED = {
    VLLM: ("bf16", "gptq", "gptq-v2", "awq", "w4a16", "w4a16-asym", "w4a16-partly", "int8", "int8-smoothed", "fp8"),
    TRANSFORMERS: ("gptq", "gptq-v2", "gptq-desc-act", "gptq-asym", "awq"),
    LLAMA_CPP: GGUF,
}
"""What must be read, and agree."""

TRIED = {
    VLLM: ("w8a16", "fp8-static", "gptq-desc-act", "gptq-asym", "fp8-block", "nf4"),
    TRANSFORMERS: (),
    LLAMA_CPP: (),
}
"""What may be refused; what is read all the same must agree."""

WITHOUT_ONEDNN = ((VLLM, "fp8"), (VLLM, "fp8-static"))

_VLLM_NOTE = (
    "CPU build, `dtype=bfloat16`, `enforce_eager`, `VLLM_CPU_INT4_W4A8=0`. The last matters on CPUs with AMX: "
    "by default vLLM's 4-bit kernels there also round activations to 8 bits, which is not what the files say."
)
_FP8_NOTE = (
    "with `torch.backends.mkldnn.set_flags(False)`. On CPUs without float8 instructions vLLM leaves the product to "
    "`torch._scaled_mm`, which would take hours for these rows through oneDNN, and computes it in float32 without."
)
_BLOCK_NOTE = (
    "the tests' four-layer Llama, as blocks of 128 divide no layer of SmolLM2; vLLM needs AMX for it on a CPU."
)
_LLAMA_CPP_NOTE = (
    "llama-cpp-python, built from its source distribution, on a CPU; keys and values in float16 (the default). Inputs "
    "of weights in blocks are rounded to 8 bits there, and not in qconv's reading."
)
_TRANSFORMERS_NOTE = "`AutoModelForCausalLM.from_pretrained(OUT, dtype=torch.bfloat16)`, on a CPU."

NOTES = {
    (VLLM, ""): _VLLM_NOTE,
    (VLLM, "fp8"): _FP8_NOTE,
    (VLLM, "fp8-block"): _BLOCK_NOTE,
    (TRANSFORMERS, ""): _TRANSFORMERS_NOTE,
    (LLAMA_CPP, ""): _LLAMA_CPP_NOTE,
}
"""What one has to know to repeat a reading, by engine and target (empty: all of them)."""

NOT_RUN = {
    "SGLang": "its packages are for GPUs; not tried.",
    "vLLM on a GPU": "its kernels are others (Marlin); what they need of the files is checked by `make test`.",
    "transformers alone": "`make test` loads `w4a16`, `fp8`, `fp8-block`, `int8` and `nf4` there, of a smaller model.",
}
"""Readers that this leaves out, and why."""
