"""SGLang, from its documentation and source; nobody here has run it.

https://docs.sglang.ai/advanced_features/server_arguments.html, .../quantization.html, .../lora.html;
https://github.com/sgl-project/sglang, python/sglang/srt/layers/quantization/gptq.py: Marlin for 4 and 8 bits,
symmetric; nothing there reads ``checkpoint_format`` but for marlin, so version 2 would be read as version 1.
Its own parser took the launch lines, and its own choice of a scheme (compressed_tensors.py) was asked for every target
of that layout, both of the package 0.5.23 without a GPU.
"""

from __future__ import annotations

from qconv.serving.engine import Engine, Request, Served, ServedAdapter, instead, openai_request


def refusal(served: Served) -> str | None:
    for layout in served.layouts:
        if layout == "pack-quantized" and served.odd_bits is not None:
            return f"it loads pack-quantized of 4 or 8 bits, and this has {served.odd_bits}; " + instead(
                "w4a16", served
            )
        if layout == "hqq":
            return "it reads no HQQ; " + instead("awq --algorithm zeros", served)
        if layout == "gptq_v2":
            return "it reads no checkpoint_format, so zero points of version 2 as those of version 1; " + instead(
                "gptq, which holds the same numbers when symmetric", served
            )
        odd = next((s for s in served.schemes if not s.symmetric or s.bits not in (4, 8)), None)
        if layout == "gptq" and odd is not None:
            what = f"{odd.bits} bits, {'symmetric' if odd.symmetric else 'asymmetric'}"
            return f"its Marlin kernels take GPTQ of 4 or 8 bits, symmetric, and this is {what}; " + instead(
                "gptq --sym, or awq", served
            )
    is_compressed = served.layout != "gpt-oss-mxfp4"
    if is_compressed and any(s.scale_format == "e8m0" or (s.bits == 4 and s.kind == "int" and s.rounds_activations)
           for s in served.schemes):  # fmt: skip
        return "its reader of compressed-tensors has no kernel for such weights; " + instead("w4a16", served)
    return None


def notes(served: Served) -> list[str]:
    found = ["not run by qconv's makers: what is said here is from its documentation and source"]
    if served.layout.startswith("bnb-"):
        found.append("4-bit weights of bitsandbytes are loaded as they are, on one GPU")
    if any(s.kind == "int" and not s.symmetric and served.layout == "pack-quantized" for s in served.schemes):
        found.append("asymmetric pack-quantized weights load in vLLM; nobody measured them here")
    if any(s.has_global_scale for s in served.schemes):
        found.append(
            "release 0.5.23 reads NVFP4 (from its source); before Blackwell it leaves inputs in 16 bits, and some "
            "releases before refuse weights alone (nvfp4a16)"
        )
    if len(served.layouts) > 1:
        found.append("release 0.5.23 goes by the layout of each config group (from its source); earlier ones may not")
    if served.has_cache_scales:
        found.append(
            "it reads the scales of keys and values since pull request 35455; releases before take 1, silently"
        )
    return found


def command(served: Served) -> list[str]:
    words = ["python3", "-m", "sglang.launch_server", "--model-path", served.path]
    words += ["--served-model-name", served.name, "--host", served.host, "--port", str(served.port)]
    words += ["--tp-size", str(served.num_gpus), "--context-length", str(served.context)]
    words += ["--max-running-requests", str(served.concurrency)]
    if served.layout.startswith("bnb-"):
        words += ["--quantization", "bitsandbytes", "--load-format", "bitsandbytes"]
    if served.cache_dtype != "auto":
        words += ["--kv-cache-dtype", "fp8_e4m3"]
    if served.adapters:
        words += ["--enable-lora", "--max-lora-rank", str(served.max_rank)]
        words += ["--max-loras-per-batch", str(len(served.adapters) + 1)]  # the base alone takes a place, too
        words += ["--lora-paths", *(f"{adapter.name}={adapter.path}" for adapter in served.adapters)]
    return words


def request(served: Served, adapter: ServedAdapter | None, prompt: str, num_tokens: int) -> Request:
    model = served.name if adapter is None else f"{served.name}:{adapter.name}"
    return openai_request(model, prompt, num_tokens)


SGLANG = Engine(
    name="sglang",
    title="SGLang",
    port=30000,
    refusal=refusal,
    notes=notes,
    command=command,
    request=request,
    sources=(
        "https://docs.sglang.ai/advanced_features/server_arguments.html",
        "https://docs.sglang.ai/advanced_features/quantization.html",
        "https://docs.sglang.ai/advanced_features/lora.html",
    ),
)
