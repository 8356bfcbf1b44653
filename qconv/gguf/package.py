"""The gguf package of llama.cpp, which knows names of tensors and keys, and writes headers; an optional dependency."""

from __future__ import annotations

from types import ModuleType

from qconv.errors import UsageError


def gguf_package() -> ModuleType:
    """The package.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UsageError(
            f"GGUF files need the gguf package, which cannot be imported ({error}): pip install 'qconv[gguf]'"
        ) from error
    module: ModuleType = gguf
    return module
