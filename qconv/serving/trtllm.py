"""TensorRT-LLM with its PyTorch backend: 16-bit weights and float8. From its source, not run here.

https://github.com/NVIDIA/TensorRT-LLM: tensorrt_llm/_torch/model_config.py (``hf_quant_config.json`` counts before
config.json), tensorrt_llm/models/quant_config_utils.py (compressed-tensors: ``channel`` with ``token``, 8 bits),
tensorrt_llm/quantization/modelopt_config.py (the two shapes of ``hf_quant_config.json``),
tensorrt_llm/_torch/modules/linear.py (``weight_scale`` and ``input_scale`` of one number), docs/source/features/
quantization.md (GPUs), tensorrt_llm/commands/serve.py (flags). [out, 1] scales of rows load since pull request 15415.
Scales of keys and values: tensorrt_llm/_torch/modules/attention.py hands them on where the cache is NVFP4, and
tensorrt_llm/_torch/attention_backend/trtllm.py has ones for others.

4-bit weights load there in ModelOpt's own packing alone. Integer 8-bit weights must be refused here: its reader of
compressed-tensors looks at bits and strategy and not at the type, and would take them for float8.
"""

from __future__ import annotations

import json
from pathlib import PurePosixPath

from qconv import __version__
from qconv.serving.engine import Engine, Request, Served, ServedAdapter, instead, openai_request

QUANT_CONFIG = "hf_quant_config.json"


def refusal(served: Served) -> str | None:
    layout = served.layout
    if served.adapters:
        return "qconv writes no LoRA settings for it yet; merge the adapter, or serve it with vLLM"
    if layout == "int-quantized":
        return "its reader of compressed-tensors takes 8-bit integers for float8, silently; " + instead("fp8", served)
    if layout not in ("plain", "float-quantized", "fp8-block"):
        return (
            f"it loads 4-bit weights in ModelOpt's packing alone, which {layout} is not; "
            if layout in ("gptq", "gptq_v2", "awq", "pack-quantized")
            else f"it does not load {layout}; "
        ) + instead("fp8 (or fp8-block)", served)
    if len({s.static_activations for s in served.schemes}) > 1:
        return "it loads one scheme for all linears; " + instead("fp8", served)
    return None


def is_static(served: Served) -> bool:
    return any(scheme.static_activations for scheme in served.schemes)


def notes(served: Served) -> list[str]:
    found = ["not run by qconv's makers: what is said here is from its documentation and source"]
    if served.layout == "float-quantized" and is_static(served):
        found.append(f"one scale for a linear: Ada, Hopper and Blackwell GPUs; {QUANT_CONFIG} says so in its own words")
    elif served.layout == "float-quantized":
        found.append("scales of rows: Hopper GPUs, and a release with pull request 15415 (June 2026)")
    elif served.layout == "fp8-block":
        found.append("blocks: Hopper and Blackwell (sm100) GPUs; sm100 rounds scales to powers of two")
    if served.cache_dtype != "auto":
        found.append("float8 keys and values are set in serve.yaml")
    if served.has_cache_scales:
        found.append(
            "it takes 1 for scales of float8 keys and values, whatever a folder holds (it loads those of NVFP4 caches "
            "alone): what was validated has the stored ones"
        )
    return found


def files(served: Served) -> dict[str, str]:
    made = {}
    if is_static(served):
        # Per tensor: config.json's compressed-tensors is refused there, and ModelOpt's words for the same are read.
        cache = "FP8" if served.cache_dtype == "fp8" else None
        quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": cache, "exclude_modules": list(served.unquantized)}
        document = {"producer": {"name": "qconv", "version": __version__}, "quantization": quantization}
        made[f"model/{QUANT_CONFIG}"] = json.dumps(document, indent=2) + "\n"
    if served.cache_dtype != "auto":
        made["serve.yaml"] = "kv_cache_config:\n  dtype: fp8\n"
    return made


def command(served: Served) -> list[str]:
    model = "./model" if is_static(served) else served.path
    words = ["trtllm-serve", model, "--backend", "pytorch", "--host", served.host, "--port", str(served.port)]
    words += ["--tp_size", str(served.num_gpus), "--max_seq_len", str(served.context)]
    words += ["--max_batch_size", str(served.concurrency)]
    return [*words, *(["--extra_llm_api_options", "./serve.yaml"] if served.cache_dtype != "auto" else [])]


def request(served: Served, adapter: ServedAdapter | None, prompt: str, num_tokens: int) -> Request:
    model = "model" if is_static(served) else PurePosixPath(served.path).name  # it calls a model after its folder
    return openai_request(model, prompt, num_tokens)


TRTLLM = Engine(
    name="trtllm",
    title="TensorRT-LLM",
    port=8000,
    refusal=refusal,
    notes=notes,
    command=command,
    files=files,
    links_model=is_static,
    request=request,
    sources=(
        "https://nvidia.github.io/TensorRT-LLM/commands/trtllm-serve/trtllm-serve.html",
        "https://nvidia.github.io/TensorRT-LLM/features/quantization.html",
        "https://github.com/NVIDIA/TensorRT-LLM/blob/main/tensorrt_llm/models/quant_config_utils.py",
        "https://github.com/NVIDIA/TensorRT-LLM/pull/15415",
    ),
)
