#!/usr/bin/env python3
"""Serves a folder of ONNX Runtime GenAI over HTTP: greedy or sampled completions, one after another.

    python3 serve.py --model FOLDER [--host 127.0.0.1] [--port 8000] [--context TOKENS] [--provider cuda]

Needs onnxruntime-genai (for a GPU onnxruntime-genai-cuda and --provider cuda) and nothing else. GET /health answers
once the model is loaded; POST /v1/completions takes ``prompt``, ``max_tokens``, ``temperature`` (0 = greedy) and
``top_p`` in OpenAI's form. Anything else in a request is refused, not ignored.
"""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

DEFAULTS = {"max_tokens": 16, "temperature": 1.0, "top_p": 1.0}


class Model:
    """A loaded folder; ``context`` tokens of keys and values are allocated for each answer.

    ``special_tokens``: prompts get those that the tokenizer has for it, such as a BOS.
    """

    def __init__(self, folder: str, context: int, provider: str | None, special_tokens: bool):
        import onnxruntime_genai

        self._genai, self.context = onnxruntime_genai, context
        config = onnxruntime_genai.Config(folder)
        if provider is not None:
            config.clear_providers()
            config.append_provider(provider)
        self._model = onnxruntime_genai.Model(config)
        self._tokenizer = onnxruntime_genai.Tokenizer(self._model)
        self._tokenizer.update_options(add_special_tokens=str(special_tokens).lower())

    def answer(self, prompt: str, max_tokens: int, temperature: float, top_p: float) -> tuple[str, str, int]:
        """The text, why it ended, and its number of tokens.

        Raises:
            ValueError: prompt and answer are longer than the context.
        """
        ids = self._tokenizer.encode(prompt)
        if len(ids) + max_tokens > self.context:
            raise ValueError(f"{len(ids)} tokens and {max_tokens} more: the context is {self.context}")
        params = self._genai.GeneratorParams(self._model)
        options: dict[str, Any] = {"do_sample": temperature > 0, "max_length": len(ids) + max_tokens}
        if temperature > 0:
            options |= {"temperature": temperature, "top_p": top_p}
        params.set_search_options(**options)
        generator = self._genai.Generator(self._model, params)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        new = list(generator.get_sequence(0))[len(ids) :]
        return self._tokenizer.decode(new), "length" if len(new) >= max_tokens else "stop", len(new)


def checked(body: Any, name: str) -> dict[str, Any]:
    """The request with defaults; raises `ValueError` for what is not answered."""
    if not isinstance(body, dict) or not isinstance(body.get("prompt"), str):
        raise ValueError("expected an object with a text as prompt")
    if body.get("model", name) != name:
        raise ValueError(f"model {body['model']!r} is not here; {name!r} is")
    strange = sorted(body.keys() - {"model", "prompt", *DEFAULTS})
    if strange:
        raise ValueError(f"not answered here: {', '.join(strange)}")
    found = DEFAULTS | {key: value for key, value in body.items() if key != "model"}
    if type(found["max_tokens"]) is not int or found["max_tokens"] < 1:
        raise ValueError(f"max_tokens is a number from 1, got {found['max_tokens']!r}")
    for key in ("temperature", "top_p"):
        if isinstance(found[key], bool) or not isinstance(found[key], (int, float)) or found[key] < 0:
            raise ValueError(f"{key} is a number from 0, got {found[key]!r}")
    return found


def handler_of(model: Model, name: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._say(*((200, {"status": "ok"}) if self.path == "/health" else (404, {"error": "no such path"})))

        def do_POST(self) -> None:
            if self.path != "/v1/completions":
                self._say(404, {"error": "no such path; POST /v1/completions"})
                return
            try:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
                text, reason, count = model.answer(**checked(body, name))
            except ValueError as error:
                self._say(400, {"error": str(error)})
                return
            choice = {"index": 0, "text": text, "finish_reason": reason}
            usage = {"completion_tokens": count}
            self._say(200, {"object": "text_completion", "model": name, "choices": [choice], "usage": usage})

        def _say(self, status: int, document: dict[str, Any]) -> None:
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a folder of ONNX Runtime GenAI.")
    parser.add_argument("--model", required=True, help="the folder")
    parser.add_argument("--name", default="model", help="what requests call it [default: %(default)s]")
    parser.add_argument("--host", default="127.0.0.1", help="[default: %(default)s]")
    parser.add_argument("--port", type=int, default=8000, help="[default: %(default)s]")
    parser.add_argument("--context", type=int, default=8192, help="tokens of prompt and answer [default: %(default)s]")
    parser.add_argument("--provider", help="such as cuda [default: what genai_config.json says, else the CPU]")
    parser.add_argument("--special-tokens", action="store_true", help="put the tokenizer's own around a prompt (a BOS)")
    options = parser.parse_args()
    model = Model(options.model, options.context, options.provider, options.special_tokens)
    server = HTTPServer((options.host, options.port), handler_of(model, options.name))
    print(f"serving {options.name} at http://{options.host}:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
