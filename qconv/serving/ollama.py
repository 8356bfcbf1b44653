"""Ollama: a GGUF file, the Modelfile that names it, and the lines that make a model of both. Not run here.

Sources: https://docs.ollama.com/modelfile (FROM, PARAMETER), https://docs.ollama.com/import,
https://docs.ollama.com/api (``raw``, ``options``), https://docs.ollama.com/faq (environment variables of the server).
Its default repetition penalty changes greedy answers, so the smoke test turns it off.

A server runs beside its models: ``launch.sh`` makes one of the file, which the server copies.
"""

from __future__ import annotations

import shlex

from qconv.serving.engine import Engine, Request, Served, ServedAdapter

PORT = 11434
MODEL_FILE = "Modelfile"


def refusal(served: Served) -> str | None:
    if not served.is_gguf:
        return (
            f"its Modelfile names a GGUF file, and {served.path} holds safetensors ({served.layout}); --requant "
            "gguf-q4_0, or convert --to gguf-q8_0, makes one"
        )
    if served.num_gpus > 1:
        return "it spreads layers over the GPUs that it finds, by itself; drop --tp"
    if served.cache_dtype != "auto":
        return (
            "it has no float8 for keys and values: float16, or what its server is told by OLLAMA_KV_CACHE_TYPE (q8_0, "
            "q4_0); drop --kv-dtype"
        )
    if served.adapters:
        return "its adapters are GGUF files of their own, which are not written here; merge the adapter, with --requant"
    return None


def notes(served: Served) -> list[str]:
    found = [
        "not run by qconv's makers: what is said here is from its documentation",
        "ollama create copies the file into the server's own store: have the room twice",
        f"num_ctx {served.context} is in the Modelfile; sequences at a time are the server's, OLLAMA_NUM_PARALLEL",
    ]
    if "TEMPLATE" not in served.model_file:
        found.append(
            "no TEMPLATE was at hand: Ollama goes by the chat template inside the file, by its rule (docs/formats.md)"
        )
    return found


def files(served: Served) -> dict[str, str]:
    return {MODEL_FILE: f"FROM {served.path}\n{_rest(served.model_file)}PARAMETER num_ctx {served.context}\n"}


def _rest(text: str) -> str:
    """A Modelfile without the line that names the file."""
    _, _, rest = text.partition("\n")
    return rest


def command(served: Served) -> list[str]:
    return [
        *(["env", *_host(served)] if _host(served) else []),
        "ollama",
        "create",
        served.name,
        "-f",
        f"./{MODEL_FILE}",
    ]


def steps(served: Served) -> list[str]:
    parallel = [f"OLLAMA_NUM_PARALLEL={served.concurrency}"] if served.concurrency > 1 else []
    return [
        f"{shlex.join([*_host(served), *parallel, 'ollama', 'serve'])}    # where no server runs yet",
        "./launch.sh",
        shlex.join([*_host(served), "ollama", "run", served.name]),
    ]


def _host(served: Served) -> list[str]:
    """What client and server are told where the port is not the usual one."""
    return [] if served.port == PORT else [f"OLLAMA_HOST=127.0.0.1:{served.port}"]


def request(served: Served, adapter: ServedAdapter | None, prompt: str, num_tokens: int) -> Request:
    options = {"temperature": 0, "repeat_penalty": 1.0, "num_predict": num_tokens}
    body = {"model": served.name, "prompt": prompt, "raw": True, "stream": False, "options": options}
    return Request(path="/api/generate", body=body, answer=("response",))


OLLAMA = Engine(
    name="ollama",
    title="Ollama",
    port=PORT,
    refusal=refusal,
    notes=notes,
    command=command,
    files=files,
    steps=steps,
    request=request,
    ready="/api/version",
    usual_at_a_time=1,
    takes_the_gpu=False,
    sources=(
        "https://docs.ollama.com/modelfile",
        "https://docs.ollama.com/import",
        "https://docs.ollama.com/api",
        "https://docs.ollama.com/faq",
    ),
)
