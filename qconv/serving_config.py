"""What `qconv pack` can be asked for: frozen, keyword-only, checked once when built. Imports no torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qconv.errors import UsageError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
DEFAULT_CONTEXT = 8192
DEFAULT_CONCURRENCY = 16


@dataclass(frozen=True, kw_only=True)
class AdapterSource:
    """An adapter to serve beside the model: folder or hub id, and the name that requests call it."""

    name: str
    source: str

    def __post_init__(self) -> None:
        if NAME.fullmatch(self.name) is None:
            raise UsageError(f"--adapter {self.name}={self.source}: a name has letters, digits, '.', '_' and '-' alone")


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """A model, and what is going to serve it.

    Attributes:
        model: folder or hub id.
        engine: a key of `serving.ENGINES`.
        out: folder for what is written; None = beside the model, called after it and the engine.
        adapters: plain LoRAs to serve beside the model.
        num_gpus: that the engine splits the model among.
        context: tokens of a sequence at most; None = the model's, at most `DEFAULT_CONTEXT`.
        concurrency: sequences at a time; None = `DEFAULT_CONCURRENCY`, or as many as the engine takes.
        cache_dtype: of keys and values; float8 of a model that holds scales for it, too.
        gpu_memory: bytes of each GPU; None = not compared.
        name: that requests call the model; None = its folder's.
        port: that the engine listens on; None = its own.
        model_path: where the engine finds the folder, or the GGUF file, if not where it lies now (in a container).
        answers: record what the model is sure to answer, for the smoke test.
        prompts: for these answers; None = embedded ones.
        device: that computes them.
        overwrite: an existing pack is replaced.
    """

    model: str
    engine: str
    out: Path | None = None
    adapters: tuple[AdapterSource, ...] = ()
    num_gpus: int = 1
    context: int | None = None
    concurrency: int | None = None
    cache_dtype: Literal["auto", "fp8"] = "auto"
    gpu_memory: int | None = None
    name: str | None = None
    port: int | None = None
    model_path: str | None = None
    answers: bool = True
    prompts: str | None = None
    device: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        for flag, value in (("--tp", self.num_gpus), ("--context", self.context), ("--concurrency", self.concurrency)):
            if value is not None and value < 1:
                raise UsageError(f"{flag} is at least 1, got {value}")
        if self.port is not None and not 0 < self.port < 65536:
            raise UsageError(f"--port is between 1 and 65535, got {self.port}")
        check_name(self.name)
        if self.prompts is not None and not self.answers:
            raise UsageError("--prompts are for the answers that --no-answers leaves out; drop one of the two")
        names = [adapter.name for adapter in self.adapters]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"two adapters are called {twice}; give each a name: --adapter NAME=FOLDER")


@dataclass(frozen=True, kw_only=True)
class OciConfig:
    """A model, to be pushed to a registry of containers.

    Attributes:
        model: folder, GGUF file or hub id.
        out: folder for the image layout; None = beside the model, called after it.
        name: of the model, in the artifact; None = its folder's.
        overwrite: an existing pack is replaced.
    """

    model: str
    out: Path | None = None
    name: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_name(self.name)


def check_name(name: str | None) -> None:
    """Raises `UsageError` for one that requests or registries would not take."""
    if name is not None and NAME.fullmatch(name) is None:
        raise UsageError(f"--name has letters, digits, '.', '_' and '-' alone, got {name!r}")


def name_of_model(model: str) -> str:
    """What a model is called that nobody named: as its folder or file."""
    name = os.path.basename(os.path.abspath(model)).removesuffix(".gguf")
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "model"


def parse_adapter(text: str) -> AdapterSource:
    """``NAME=FOLDER``, or a folder or hub id, called after its last part.

    Raises:
        UsageError: not a name.
    """
    name, equals, source = text.partition("=")
    if not equals:
        source = text
        name = re.sub(r"[^\w.-]+", "-", Path(text).name, flags=re.ASCII).strip("-.")
    return AdapterSource(name=name, source=source)
