"""Triton with its vLLM backend: a model repository whose ``1/model.json`` holds vLLM's engine arguments.

Source: https://github.com/triton-inference-server/vllm_backend, README.md, docs/llama_multi_lora_tutorial.md,
src/model.py (``auto_complete_config``: decoupled, no batching by Triton; ``_setup_lora``: ``multi_lora.json``),
src/utils/request.py (inputs of a request); fields of config.pbtxt: ``ModelConfig`` of
https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto.
"""

from __future__ import annotations

import json

from qconv.serving import vllm
from qconv.serving.engine import Engine, Request, Served, ServedAdapter

REPOSITORY = "model_repository"
# Both are what the backend itself sets when it completes a config; they stand here for servers that are told not to.
CONFIG = """\
name: {name}
backend: "vllm"
max_batch_size: 0
model_transaction_policy {{
  decoupled: true
}}
instance_group [
  {{
    count: 1
    kind: KIND_MODEL
  }}
]
"""


def notes(served: Served) -> list[str]:
    return [
        *vllm.notes(served),
        "the container's vLLM decides what loads: tritonserver:YY.MM-vllm-python-py3; docs/targets.md measured 0.32",
        f"model.json names {served.path}: mount the model there, or pack again with another --model-path",
    ]


def files(served: Served) -> dict[str, str]:
    """The model repository, by path."""
    arguments = {"model": served.path, "served_model_name": served.name, **vllm.arguments(served)}
    folder = f"{REPOSITORY}/{served.name}"
    made = {
        f"{folder}/config.pbtxt": CONFIG.format(name=json.dumps(served.name)),
        f"{folder}/1/model.json": json.dumps(arguments, indent=2) + "\n",
    }
    if served.adapters:
        paths = {adapter.name: adapter.path for adapter in served.adapters}
        made[f"{folder}/1/multi_lora.json"] = json.dumps(paths, indent=2) + "\n"
    return made


def command(served: Served) -> list[str]:
    return ["tritonserver", "--model-repository", f"./{REPOSITORY}", "--http-port", str(served.port)]


def request(served: Served, adapter: ServedAdapter | None, prompt: str, num_tokens: int) -> Request:
    parameters = {"temperature": 0, "max_tokens": num_tokens} | ({} if adapter is None else {"lora_name": adapter.name})
    body = {"text_input": prompt, "stream": False, "exclude_input_in_output": True, "parameters": parameters}
    return Request(path=f"/v2/models/{served.name}/generate", body=body, answer=("text_output",))


TRITON = Engine(
    name="triton",
    title="Triton Inference Server (vLLM backend)",
    port=8000,
    refusal=vllm.refusal,
    notes=notes,
    command=command,
    files=files,
    request=request,
    ready="/v2/health/ready",
    sources=(
        "https://github.com/triton-inference-server/vllm_backend",
        "https://github.com/triton-inference-server/vllm_backend/blob/main/docs/llama_multi_lora_tutorial.md",
        "https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_generate.md",
    ),
)
