"""What a model card says of running the folder: by which library, with which lines."""

from __future__ import annotations

from collections.abc import Iterator

from qconv.report.content import Document
from qconv.report.markdown_text import escape
from qconv.report.values import at

FORMATS = {
    "gptq": ("GPTQ (AutoGPTQ v1 layout)", "gptqmodel"),
    "gptq_v2": ("GPTQ (v2 layout)", "gptqmodel"),
    "awq": ("AWQ (AutoAWQ gemm layout)", "gptqmodel"),
    "w4a16": ("compressed-tensors pack-quantized", "compressed-tensors"),
    "w8a16": ("compressed-tensors pack-quantized (8-bit)", "compressed-tensors"),
    "fp8": ("compressed-tensors float-quantized (FP8)", "compressed-tensors"),
    "fp8-block": ("FP8 with 128 x 128 blocks (DeepSeek-V3 layout)", ""),
    "gpt-oss-mxfp4": ("MXFP4 experts, as gpt-oss is published", ""),
    "hqq": ("HQQ (as transformers 4 saves it)", '"transformers<5" hqq'),
    "nf4": ("bitsandbytes NF4 with double quantization", "bitsandbytes"),
    "w4a8": ("compressed-tensors pack-quantized (INT8 activations)", "compressed-tensors"),
    "w4a8-fp8": ("compressed-tensors pack-quantized (FP8 activations)", "compressed-tensors"),
    "nvfp4": ("compressed-tensors nvfp4-pack-quantized", "compressed-tensors"),
    "mxfp4": ("compressed-tensors mxfp4-pack-quantized", "compressed-tensors"),
    "nvfp4a16": ("compressed-tensors nvfp4-pack-quantized (weights)", "compressed-tensors"),
    "mxfp4a16": ("compressed-tensors mxfp4-pack-quantized (weights)", "compressed-tensors"),
    "int8": ("compressed-tensors int-quantized (W8A8 INT8)", "compressed-tensors"),
    "onnx": ("an ONNX graph", ""),
    "onnx-int4": ("an ONNX graph (4-bit MatMulNBits)", ""),
    "onnx-int8": ("an ONNX graph (8-bit MatMulNBits)", ""),
    **{f"gguf-{kind}": (f"a GGUF file ({kind.upper()})", "")
       for kind in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16", "bf16", "f32")},
}  # fmt: skip
"""Of a target: its layout in words, and the packages that transformers needs for it."""
_OF_GENAI = """\
# needs: pip install onnxruntime-genai
import onnxruntime_genai as og

model = og.Model("./this-folder")
tokenizer = og.Tokenizer(model)
params = og.GeneratorParams(model)
params.set_search_options(max_length=64)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode("The capital of France is"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))"""
_BEFORE = "params = "
_ADDING = 'tokenizer.update_options(add_special_tokens="true")  # a BOS in front, for example\n'
_OF_LLAMA_CPP = """\
# needs: pip install llama-cpp-python
from llama_cpp import Llama

model = Llama("./this-folder/{file}")
print(model("The capital of France is", max_tokens=64, temperature=0)["choices"][0]["text"])"""


def library(document: Document) -> str:
    """``library_name``, as hubs know it."""
    target = _target(document)
    return "onnx" if target.startswith("onnx") else "gguf" if target.startswith("gguf-") else "transformers"


def serving(document: Document, gguf_file: str | None, in_vllm: bool) -> Iterator[str]:
    """Lines of the section.

    Args:
        gguf_file: its name in a folder of llama.cpp; None for others.
        in_vllm: whether vLLM loads the folder.
    """
    yield "## Serve it"
    yield ""
    if library(document) == "onnx":
        adds = at(document, "stages", "onnx", "tokenizer adds special tokens")
        yield from _code("python", _OF_GENAI.replace(_BEFORE, _ADDING + _BEFORE) if adds else _OF_GENAI)
    elif gguf_file is not None:
        yield from _code(
            "sh",
            f"llama-server -m ./this-folder/{gguf_file}    # llama.cpp\n"
            "ollama create my-model -f ./this-folder/Modelfile && ollama run my-model",
        )
        yield ""
        yield from _code("python", _OF_LLAMA_CPP.format(file=gguf_file))
    else:
        yield from _of_transformers(document, in_vllm)
    notes = at(document, "stages", "quantization", "notes on readers")
    if isinstance(notes, list) and notes:
        yield ""
        yield from (f"- {escape(note)}" for note in notes)


def _of_transformers(document: Document, in_vllm: bool) -> Iterator[str]:
    target = _target(document)
    if in_vllm:
        cache = at(document, "stages", "key-value cache")
        yield from _code("sh", f"vllm serve ./this-folder{' --kv-cache-dtype fp8' if cache else ''}")
        yield ""
    yield "```python"
    if target in FORMATS:
        needs = FORMATS[target][1]
        packages = [*([] if "transformers<" in needs else ["transformers"]), "accelerate", *([needs] if needs else [])]
        yield f"# needs: pip install {' '.join(packages)}"
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
    yield ""
    yield 'model = AutoModelForCausalLM.from_pretrained("./this-folder", device_map="auto")'
    yield 'tokenizer = AutoTokenizer.from_pretrained("./this-folder")'
    yield "```"


def _code(language: str, text: str) -> Iterator[str]:
    yield from (f"```{language}", *text.splitlines(), "```")


def _target(document: Document) -> str:
    return str(at(document, "subject", "target"))
