"""ONNX Runtime GenAI: a library, and here a small server over it, which a pack has as ``serve.py``.

Sources: https://onnxruntime.ai/docs/genai/api/python.html (``Config``, ``Model``, ``Generator``; providers by
``Config.append_provider``), https://onnxruntime.ai/docs/genai/reference/config.html (``genai_config.json``). Measured
here on CPUs (docs/onnx.md); no GPU provider was tried.
"""

from __future__ import annotations

from importlib.resources import files as resources

from qconv.serving.engine import Engine, Request, Served, ServedAdapter, openai_request

SERVER = "serve.py"


def refusal(served: Served) -> str | None:
    if not served.is_onnx:
        return (
            f"it takes an ONNX model, and this one is stored as safetensors ({served.layout}); make another output "
            "with --requant onnx-int4, or qconv convert MODEL --to onnx"
        )
    if served.num_gpus > 1:
        return "it runs a model on one device; drop --tp"
    if served.cache_dtype != "auto":
        return "keys and values have the dtype that the graph was built with; drop --kv-dtype"
    if served.adapters:
        return "its adapters are ONNX files of their own, which are not written here; merge the adapter, with --requant"
    return None


def notes(served: Served) -> list[str]:
    found = [f"{SERVER} answers one request after another and is for trying a model; programs call the library"]
    if served.dtype == "bfloat16":
        found.append("ONNX Runtime has no bfloat16 for CPUs: this graph needs a GPU (--provider cuda)")
    if served.dtype != "float32":
        found.append("./launch.sh --provider cuda runs it on a GPU, with onnxruntime-genai-cuda; not tried here")
    return found


def files(served: Served) -> dict[str, str]:
    return {SERVER: (resources("qconv.serving") / "ort_genai_server.py").read_text(encoding="utf-8")}


def command(served: Served) -> list[str]:
    words = ["python3", f"./{SERVER}", "--model", served.path, "--name", served.name]
    words += ["--host", served.host, "--port", str(served.port), "--context", str(served.context)]
    return [*words, *(["--special-tokens"] if served.adds_special_tokens else [])]


def request(served: Served, adapter: ServedAdapter | None, prompt: str, num_tokens: int) -> Request:
    return openai_request(served.name, prompt, num_tokens)


ORT_GENAI = Engine(
    name="ort-genai",
    title="ONNX Runtime GenAI",
    port=8000,
    refusal=refusal,
    notes=notes,
    command=command,
    files=files,
    request=request,
    most_at_a_time=1,
    takes_the_gpu=False,
    sources=(
        "https://onnxruntime.ai/docs/genai/api/python.html",
        "https://onnxruntime.ai/docs/genai/reference/config.html",
    ),
)
