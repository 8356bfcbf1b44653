"""TGI and LoRAX, which began as its fork: one launcher each, the same ``/generate``. From their sources, not run here.

https://github.com/huggingface/text-generation-inference (in maintenance since 2026, says its README):
launcher/src/main.rs, server/text_generation_server/utils/quantization.py and layers/compressed_tensors/loader.py
(what loads), models/custom_modeling/flash_llama_modeling.py (heads), docs/source/conceptual/lora.md. Neither reads
GPTQ's ``checkpoint_format`` (but for marlin) or ``dynamic``, nor lists of modules that AWQ leaves out.
https://github.com/predibase/lorax: launcher/src/main.rs, server/lorax_server/utils/weights.py,
server/lorax_server/utils/punica.py (``BGMV_MAX_RANK``), docs/models/adapters/index.md.
"""

from __future__ import annotations

from typing import Any

from qconv.serving.engine import Engine, Request, Served, ServedAdapter, instead

LORAX_MAX_RANK = 128
_TGI_METHODS = {
    "gptq": "gptq",
    "awq": "awq",
    "pack-quantized": "compressed-tensors",
    "float-quantized": "compressed-tensors",
    "int-quantized": "compressed-tensors",
    "fp8-block": "fp8",
}


def _old_layouts(served: Served) -> str | None:
    """What neither of the two reads."""
    if served.num_kv_heads % served.num_gpus:
        return (
            f"it splits key and value heads and copies none: {served.num_kv_heads} of them are no multiple of "
            f"{served.num_gpus} GPUs; take fewer GPUs, or vLLM"
        )
    if len(served.layouts) > 1:
        return "it loads one layout for all linears; " + instead("w4a16", served)
    if any(s.is_fp4 or (s.bits == 4 and s.rounds_activations) for s in served.schemes):
        return "it loads no 4-bit floats, and none of 4-bit weights beside rounded inputs; " + instead("w4a16", served)
    if served.layout.startswith("bnb-"):
        return "it quantizes 16-bit weights with bitsandbytes itself and reads none that are; decode with " + (
            "qconv convert --to bf16, or " + instead("awq", served)
        )
    if served.layout == "hqq":
        return "it reads no HQQ that is stored; " + instead("awq --algorithm zeros", served)
    if served.layout == "gpt-oss-mxfp4":
        return "nothing says that it loads MXFP4; serve it with vLLM or SGLang"
    if served.layout == "gptq_v2":
        return "it reads zero points of version 2 as those of version 1; " + instead(
            "gptq, which holds the same numbers when symmetric", served
        )
    if served.layout == "gptq" and served.quantization.get("dynamic"):
        return "it does not read GPTQ's rules for single linears (dynamic); " + instead(
            "gptq without --override and --ignore", served
        )
    if served.layout == "gptq" and any(s.bits not in (4, 8) for s in served.schemes):
        return "it loads GPTQ of 4 or 8 bits; " + instead("gptq", served)
    if served.layout == "awq" and set(served.quantization.get("modules_to_not_convert") or ()) - {"lm_head"}:
        return "it does not read which linears AWQ leaves out (modules_to_not_convert); " + instead(
            "awq without --ignore", served
        )
    return None


def _tgi_refusal(served: Served) -> str | None:
    reason = _old_layouts(served)
    if reason is None and served.layout == "pack-quantized" and served.odd_bits is not None:
        return f"it loads pack-quantized of 4 or 8 bits, and this has {served.odd_bits}; " + instead("w4a16", served)
    if reason is None and served.layout == "pack-quantized" and any(not s.symmetric for s in served.schemes):
        return "its loader of pack-quantized weights does not unpack their zero points; " + instead("awq", served)
    return reason


def _lorax_refusal(served: Served) -> str | None:
    reason = _old_layouts(served)
    if reason is not None:
        return reason
    if served.layout not in ("plain", "gptq", "awq"):
        return f"it loads 16-bit weights, GPTQ and AWQ, and this is {served.layout}; " + instead("awq", served)
    if served.max_rank > LORAX_MAX_RANK:
        return (
            f"its kernels for several adapters take ranks up to {LORAX_MAX_RANK}, and one here has {served.max_rank}; "
            "serve it with vLLM (up to 512), or merge it"
        )
    return None


def _tgi_notes(served: Served) -> list[str]:
    found = ["not run by qconv's makers; its own makers keep it in maintenance and point to vLLM and SGLang"]
    if served.layout == "gptq" and any(not s.symmetric for s in served.schemes):
        found.append("asymmetric GPTQ runs in its slower exllama kernels")
    if served.has_cache_scales:
        found.append("it reads the scales of keys and values beside this cache type alone (pull request 2628)")
    return found


def _lorax_notes(served: Served) -> list[str]:
    found = ["not run by qconv's makers: what is said here is from its documentation and source"]
    if served.cache_dtype != "auto":
        found.append("it keeps keys and values in 16 bits: twice the memory that is counted for them, and no rounding")
    if served.adapters:
        found.append("adapters are loaded when a request names them; adapter_source local reads them from its disk")
    return found


def _common(served: Served, binary: str) -> list[str]:
    words = [binary, "--model-id", served.path, "--hostname", served.host, "--port", str(served.port)]
    return [*words, "--num-shard", str(served.num_gpus), "--max-concurrent-requests", str(served.concurrency)]


def _tgi_command(served: Served) -> list[str]:
    words = _common(served, "text-generation-launcher")
    words += ["--max-total-tokens", str(served.context), "--max-input-tokens", str(served.context - 1)]
    if served.layout in _TGI_METHODS:
        words += ["--quantize", _TGI_METHODS[served.layout]]
    if served.cache_dtype != "auto":
        words += ["--kv-cache-dtype", "fp8_e4m3fn"]
    if served.adapters:
        words += ["--lora-adapters", ",".join(f"{adapter.name}={adapter.path}" for adapter in served.adapters)]
    return words


def _lorax_command(served: Served) -> list[str]:
    words = _common(served, "lorax-launcher")
    words += ["--max-total-tokens", str(served.context), "--max-input-length", str(served.context - 1)]
    if served.layout != "plain":
        words += ["--quantize", served.layout]
    if served.adapters:
        words += ["--max-active-adapters", str(len(served.adapters))]
    return words


def _generate(prompt: str, parameters: dict[str, Any]) -> Request:
    body = {"inputs": prompt, "parameters": {"do_sample": False, "return_full_text": False, **parameters}}
    return Request(path="/generate", body=body, answer=("generated_text",))


def _tgi_request(_: Served, adapter: ServedAdapter | None, prompt: str, num_tokens: int) -> Request:
    chosen = {} if adapter is None else {"adapter_id": adapter.name}
    return _generate(prompt, {"max_new_tokens": num_tokens, **chosen})


def _lorax_request(_: Served, adapter: ServedAdapter | None, prompt: str, num_tokens: int) -> Request:
    chosen = {} if adapter is None else {"adapter_id": adapter.path, "adapter_source": "local"}
    return _generate(prompt, {"max_new_tokens": num_tokens, **chosen})


TGI = Engine(
    name="tgi",
    title="Text Generation Inference",
    port=3000,
    refusal=_tgi_refusal,
    notes=_tgi_notes,
    command=_tgi_command,
    request=_tgi_request,
    sources=(
        "https://huggingface.co/docs/text-generation-inference/reference/launcher",
        "https://huggingface.co/docs/text-generation-inference/conceptual/lora",
        "https://github.com/huggingface/text-generation-inference",
    ),
)
LORAX = Engine(
    name="lorax",
    title="LoRAX",
    port=3000,
    refusal=_lorax_refusal,
    notes=_lorax_notes,
    command=_lorax_command,
    request=_lorax_request,
    sources=("https://loraexchange.ai/reference/launcher/", "https://github.com/predibase/lorax"),
)
