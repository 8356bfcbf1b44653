"""What serving engines load, how they are started and asked. Knows engines; reads no model and imports no torch.

One module for each engine, each with its sources; `ENGINES` is the table. Nothing here runs an engine: what is said of
one is from its documentation or source at the address in the module, or measured (docs/targets.md).
"""

from qconv.serving.engine import Engine, Request, Served, ServedAdapter
from qconv.serving.launcher import LORAX, TGI
from qconv.serving.ollama import OLLAMA
from qconv.serving.ort_genai import ORT_GENAI
from qconv.serving.sglang import SGLANG
from qconv.serving.triton import TRITON
from qconv.serving.trtllm import TRTLLM
from qconv.serving.vllm import VLLM

ENGINES = {engine.name: engine for engine in (VLLM, SGLANG, TGI, TRITON, TRTLLM, LORAX, ORT_GENAI, OLLAMA)}

__all__ = ["ENGINES", "Engine", "Request", "Served", "ServedAdapter"]
