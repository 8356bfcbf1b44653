"""vLLM. Measured on a CPU, release 0.32 (docs/targets.md); for GPUs from its source at that release:
https://github.com/vllm-project/vllm, vllm/model_executor/layers/quantization/{auto_gptq,auto_awq}.py,
vllm/model_executor/layers/quantization/utils/marlin_utils.py, vllm/config/lora.py (ranks), vllm/engine/arg_utils.py.
"""

from __future__ import annotations

from qconv.serving.engine import Engine, Request, Served, ServedAdapter, instead, openai_request

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` takes (vllm/config/lora.py)."""


def refusal(served: Served) -> str | None:
    odd_groups = {s.group_size for s in served.schemes if s.float8_activations and s.group_size != 128}
    if odd_groups:
        return f"it takes 4-bit weights beside float8 inputs in groups of 128, not {min(odd_groups)}; " + instead(
            "w4a8, or w4a16", served
        )
    for layout in served.layouts:
        if layout.startswith("bnb-"):
            return (
                "its releases since 0.32 know no bitsandbytes (measured: 'Unknown quantization method'); "
                + instead("w4a16", served)
                + ", or decode a base exactly with qconv convert --to bf16"
            )
        if layout == "hqq":
            return "its releases since 0.15 read no HQQ (pull request 32681); " + instead(
                "awq --algorithm zeros", served
            )
        if layout in ("gptq", "gptq_v2"):
            if served.has_group_index:
                return (
                    "it refuses GPTQ with a stored group index (desc_act, measured); "
                    + instead("gptq without --desc-act", served)
                    + ": columns are taken in the same order, and need no index"
                )
            odd = next((s for s in served.schemes if not s.symmetric or s.bits not in (4, 8)), None)
            if odd is not None:
                what = f"{odd.bits} bits, {'symmetric' if odd.symmetric else 'asymmetric'}"
                return f"it loads GPTQ of 4 or 8 bits, symmetric, and this is {what} (measured); " + instead(
                    "gptq --sym, or awq --algorithm gptq for zero points", served
                )
    if served.max_rank > RANKS[-1]:
        return f"it loads LoRA up to rank {RANKS[-1]}, and one here has {served.max_rank}; merge it instead"
    return None


def notes(served: Served) -> list[str]:
    found = []
    if any(s.kind == "int" and s.bits == 8 and not s.symmetric for s in served.schemes):
        found.append("its Marlin kernels take zero points with 4 bits only; 8-bit ones need another kernel")
    if any(s.is_fp4 or s.float8_activations for s in served.schemes):
        found.append("its CPU build has no kernel for these weights; nobody ran its GPU kernels here")
    if any(s.kind == "int" and s.bits == 4 and s.rounds_activations and not s.float8_activations
           for s in served.schemes):  # fmt: skip
        found.append(
            "its CPU build rounds inputs with VLLM_CPU_INT4_W4A8=1 and AMX alone (measured), and leaves them in 16 "
            "bits without; nobody ran its GPU kernels here"
        )
    if any(s.kind == "float" and s.bits == 8 for s in served.schemes):
        found.append("GPUs before Ada (compute capability 8.9) have no float8: weights are then decoded to 16 bits")
    if "pack-quantized" in served.layouts and served.odd_bits is not None:
        found.append(
            f"{served.odd_bits} bits run on a GPU with the humming package alone, since summer 2026 (from its source)"
        )
    if served.layout == "gptq_v2":
        found.append("releases before autumn 2025 do not know gptq_v2, and add 1 to every zero point")
    if served.cache_dtype == "fp8" and not served.has_cache_scales:
        found.append(
            "the folder holds no scales of keys and values, and it takes 1 for them; --kv-cache fp8 beside --requant "
            "w4a16, for one, calibrates them"
        )
    if served.cache_dtype == "fp8":
        found.append(
            "its CPU build (0.32, measured) cuts float8 keys and values towards zero, where GPUs round to nearest"
        )
    if served.dtype == "float32":
        found.append("float32 weights are rounded to float16 as they are loaded (--dtype auto)")
    return found


def arguments(served: Served) -> dict[str, str | int | bool]:
    """Engine arguments, by the names of ``EngineArgs``."""
    found: dict[str, str | int | bool] = {
        "tensor_parallel_size": served.num_gpus,
        "max_model_len": served.context,
        "max_num_seqs": served.concurrency,
    }
    if served.cache_dtype != "auto":
        found["kv_cache_dtype"] = served.cache_dtype
    if served.adapters:
        rank = next(rank for rank in RANKS if rank >= served.max_rank)
        found |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": len(served.adapters)}
    return found


def command(served: Served) -> list[str]:
    words = ["vllm", "serve", served.path, "--served-model-name", served.name]
    words += ["--host", served.host, "--port", str(served.port)]
    for name, value in arguments(served).items():
        words.append("--" + name.replace("_", "-"))
        words += [] if value is True else [str(value)]
    if served.adapters:
        words += ["--lora-modules", *(f"{adapter.name}={adapter.path}" for adapter in served.adapters)]
    return words


def request(served: Served, adapter: ServedAdapter | None, prompt: str, num_tokens: int) -> Request:
    return openai_request(served.name if adapter is None else adapter.name, prompt, num_tokens)


VLLM = Engine(
    name="vllm",
    title="vLLM",
    port=8000,
    refusal=refusal,
    notes=notes,
    command=command,
    request=request,
    sources=(
        "https://docs.vllm.ai/en/latest/cli/serve/",
        "https://docs.vllm.ai/en/latest/features/lora/",
        "https://github.com/vllm-project/vllm/blob/main/vllm/config/lora.py",
    ),
)
