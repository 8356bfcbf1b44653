"""The packages of ONNX: its files, the runtime, and the model builder of ONNX Runtime GenAI; an optional dependency."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from qconv.errors import UsageError

_NEEDED = ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai")


def check_packages() -> None:
    """Raises `UsageError` where one that building and running a folder needs is not installed; imports none."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise _missing(", ".join(missing))


def onnx_package() -> ModuleType:
    """The package that reads model files; raises `UsageError` where it is not installed."""
    return _package("onnx")


def runtime_package() -> ModuleType:
    """ONNX Runtime; raises `UsageError` where it is not installed."""
    return _package("onnxruntime")


def genai_package() -> ModuleType:
    """ONNX Runtime GenAI; raises `UsageError` where it is not installed."""
    return _package("onnxruntime_genai")


def _package(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise _missing(f"{name} ({error})") from error


def _missing(what: str) -> UsageError:
    return UsageError(f"ONNX folders need packages that are not installed: {what}; pip install 'qconv[onnx]'")
