"""ONNX model folders as ONNX Runtime GenAI loads them: building one, what lies in its files, and running it."""

from qconv.onnx.builder import GENAI_CONFIG, MODEL_FILE, build, check_family, take_over
from qconv.onnx.genai import TOKENIZER_FILE, genai_greedy, genai_tokens
from qconv.onnx.package import check_packages
from qconv.onnx.plan import OnnxPlan, plan_onnx, without_window
from qconv.onnx.reader import LAYERS_NAME, OnnxCheckpoint, is_onnx_folder, open_onnx
from qconv.onnx.session import OnnxSession

__all__ = [
    "GENAI_CONFIG",
    "LAYERS_NAME",
    "MODEL_FILE",
    "TOKENIZER_FILE",
    "OnnxCheckpoint",
    "OnnxPlan",
    "OnnxSession",
    "build",
    "check_family",
    "check_packages",
    "genai_greedy",
    "genai_tokens",
    "is_onnx_folder",
    "open_onnx",
    "plan_onnx",
    "take_over",
    "without_window",
]
