"""Settings for a process that is qconv's own, and not that of a program which uses qconv as a library.

A command lasts from the moment that it is typed until the prompt is back, so starting and ending count:

- `transformers` imports scikit-learn (which imports scipy and pandas) for one metric of assisted generation, and scipy
  for one loss of object detection: seconds at every start, for nothing that is used here (`leave_out_unused`).
- Importing makes objects that stay. Looking through all of them for garbage, again and again, is a sixth of the time
  that torch and transformers take to import (`without_collections`).
- Reading files from the disk and waking a GPU need no interpreter, and importing needs nothing else (`begin`).
- Importing `transformers` is waiting for thousands of small files, too, while the job's own files can be looked at
  (`begin`); but two threads that import parts of it at a time may meet half a module, so nobody else imports it
  meanwhile (`importing_libraries`).
- `bitsandbytes` hands a few fallbacks for CPUs to `torch.compile` when it is imported, which imports the whole
  compiler; on a GPU they are never called, and uncompiled they compute the same (`import_uncompiled`). `transformers`
  tells the compiler of functions that it shall leave alone, which imports it too; nothing is compiled here (`begin`).
- `transformers` 5.17 asks at its import which package every installed module is of (5.23 no longer does), and Python
  looks for every file of every package to answer; here their lists of files are believed (`packages_distributions`).
- The allocator of torch holds twice the GPU memory that blocks of changing sizes need, unless its segments may grow
  (`expand_segments`).
- glibc gives large blocks of memory back to the system when they are freed, and gets them back page by page, zeroed. A
  forward pass on a CPU frees and allocates the same large blocks all the time (`keep_freed_memory`).
- Taking apart thousands of modules and a GPU context, object by object, takes seconds in the end; the system does it at
  once when a process is gone (`leave`).
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import importlib.metadata
import os
import platform
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

_UNUSED = ("sklearn", "scipy")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc
_MANY_MODULES = 50
_FETCHED_SHARE = 0.5  # of the memory that is available
_FETCHED_AT_ONCE = 8 << 20


_is_own = False
_importing: threading.Thread | None = None


def leave_out_unused() -> None:
    """Makes imports of these libraries fail as if they were not installed."""
    global _is_own
    _is_own = True
    for name in _UNUSED:
        if name not in sys.modules:
            sys.modules[name] = None  # type: ignore[assignment]
    importlib.metadata.packages_distributions = packages_distributions


def packages_distributions() -> dict[str, list[str]]:
    """What the function of this name in `importlib.metadata` gives, of files whether they are still there or not."""
    owners: dict[str, list[str]] = {}
    for distribution in importlib.metadata.distributions():
        declared = (distribution.read_text("top_level.txt") or "").split()
        for name in declared or _top_level(distribution.read_text("RECORD") or ""):
            owners.setdefault(name, []).append(distribution.metadata["Name"])
    return owners


def _top_level(record: str) -> set[str]:
    """Importable names in a package's list of files, which has a path and a comma in each line."""
    import inspect

    heads = {line.partition(",")[0].strip('"').partition("/") for line in record.splitlines()}
    names = {head if slash else inspect.getmodulename(head) or head for head, slash, _ in heads}
    return {name for name in names if name and "." not in name} - {"__pycache__"}


def allow_again() -> None:
    """Undoes `leave_out_unused`, for a library that needs them."""
    for name in _UNUSED:
        if name in sys.modules and sys.modules[name] is None:
            del sys.modules[name]


@contextmanager
def without_collections(stays: bool = True) -> Iterator[None]:
    """For imports: no garbage is looked for inside, and what they made is never looked through again.

    Does nothing in somebody else's process.

    Args:
        stays: whether what is made inside stays; if not, garbage is found in it afterwards, as ever.
    """
    if not _is_own or not gc.isenabled():
        yield
        return
    num_modules = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if stays and len(sys.modules) - num_modules > _MANY_MODULES:
            gc.freeze()
        gc.enable()


def begin(
    device: str,
    folders: Iterable[str | os.PathLike[str] | None] = (),
    solves: bool = False,
    runs: bool = False,
    unmerged: bool = False,
) -> None:
    """Imports torch, and starts beside it what the job will wait for; call it before anything that imports torch.

    Does nothing in somebody else's process.

    Args:
        device: what the job will run on: ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or ``"auto"``.
        folders: models and adapters that it will read; what is not a folder here (a hub id) is passed over.
        solves: the job will use solvers of linear algebra, which torch loads when the first one is called.
        runs: it will run a model of transformers.
        unmerged: on a GPU, one with an adapter of peft over weights of bitsandbytes.
    """
    global _importing
    if not _is_own:
        return
    found = [Path(folder) for folder in folders if folder is not None and Path(folder).is_dir()]
    _in_background("qconv-fetch", _fetch, found)
    with without_collections():
        import torch
    torch.compiler.disable = _not_compiled  # type: ignore[assignment]
    if device != "cpu":
        _in_background("qconv-wake-gpu", _wake_gpu, device, solves)
    if runs:
        _importing = _in_background("qconv-import", _import_libraries, unmerged and device != "cpu")


def is_importing() -> bool:
    """Whether libraries are on their way that `importing_libraries` would wait for."""
    return _importing is not None and _importing.is_alive()


@contextmanager
def importing_libraries() -> Iterator[None]:
    """For imports of `transformers` and what builds on it: waits for those of `begin`, then `without_collections`."""
    if _importing is not None:
        _importing.join()
    with without_collections():
        yield


def _in_background(name: str, function: object, *arguments: object) -> threading.Thread:
    # Daemons: an error elsewhere does not wait for them.
    thread = threading.Thread(target=function, args=arguments, name=name, daemon=True)  # type: ignore[arg-type]
    thread.start()
    return thread


def _import_libraries(with_adapters: bool) -> None:
    with suppress(Exception), without_collections():  # what cannot be imported is told where it is used
        import torch

        importlib.import_module("transformers.models.auto.modeling_auto")
        importlib.import_module("transformers.models.auto.tokenization_auto")
        importlib.import_module("transformers.modeling_utils")
        if with_adapters and torch.cuda.is_available():
            import_uncompiled("bitsandbytes")
            importlib.import_module("peft")


def _fetch(folders: Iterable[Path]) -> None:
    """Has the system read weights into its page cache, as far as memory is free for them.

    By reading them: of what it is advised to read (``POSIX_FADV_WILLNEED``) Linux takes the first pieces only.
    """
    buffer = memoryview(bytearray(_FETCHED_AT_ONCE))
    with suppress(OSError, AttributeError, ValueError):  # no Linux, a file that is gone: it is read later, or not
        left = int(_FETCHED_SHARE * _available_bytes())
        files = [file for folder in folders for file in folder.glob("*.safetensors")]
        # Some folders hold the weights twice; only files of these names are opened.
        for file in sorted(files, key=lambda file: (not file.name.startswith(("model", "adapter_model")), file)):
            size = min(left, file.stat().st_size)
            left -= size
            if size <= 0:
                return
            handle = os.open(file, os.O_RDONLY)
            try:
                for offset in range(0, size, _FETCHED_AT_ONCE):
                    os.preadv(handle, [buffer], offset)
            finally:
                os.close(handle)


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def _wake_gpu(device: str, solves: bool) -> None:
    """Creates the context of the GPU and what its libraries need once; the main thread finds all of it there."""
    with suppress(Exception):  # whatever is wrong with the GPU is told where it is used
        import torch

        if not torch.cuda.is_available():
            return
        ones = torch.eye(16, device="cuda" if device == "auto" else device)
        ones = ones @ ones  # a cuBLAS handle; it goes back to the pool of handles when this thread ends
        if solves:
            torch.linalg.cholesky(ones)
        torch.cuda.synchronize(ones.device)
        from qconv.triton_support import available

        if available(ones):
            from qconv.first_kernel import launch_first

            launch_first(ones)


def import_uncompiled(name: str) -> None:
    """Imports a module without the functions that it would compile; does nothing in somebody else's process."""
    if not _is_own or name in sys.modules:
        return
    from unittest import mock

    import torch

    with mock.patch.object(torch, "compile", _not_compiled), without_collections():
        importlib.import_module(name)


def _not_compiled(function: Any = None, *_: object, **__: object) -> Any:
    """In the place of a decorator that concerns the compiler, with or without options."""
    return function if function is not None else (lambda later: later)


def expand_segments() -> None:
    """Has torch's allocator map GPU memory page by page, where that works and nobody has set it; before torch loads.

    Under WSL drivers before R615 refuse such mappings on some GPUs, as if memory were out (pytorch issue 192330);
    elsewhere than on Linux torch warns that it cannot.
    """
    is_native = sys.platform == "linux" and "microsoft" not in platform.release().lower()
    # torch reads the older name first: setting it would undo what the newer one says.
    if is_native and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def keep_freed_memory() -> None:
    """Lets the process reuse the memory that it freed; does nothing where the C library is not glibc."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def leave(code: int) -> NoReturn:
    """Ends the process with ``code`` as the interpreter would, without taking apart what is in its memory.

    In the interpreter's own order: threads that are no daemons are waited for, exit functions run, standard streams
    are flushed. Where one of that fails, or somebody watches (a debugger, a profiler, ``python -i``), the interpreter
    ends the process itself, with its own messages and code.
    """
    if not (_is_watched() or sys.flags.inspect or sys.flags.interactive):
        # What is missing in another implementation, a reader of ours that is gone, or ctrl-C.
        with suppress(Exception, KeyboardInterrupt):
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
            ctypes.CDLL(None).fflush(None)  # what C libraries have printed
            os._exit(code)
    sys.exit(code)


def _is_watched() -> bool:
    monitoring = getattr(sys, "monitoring", None)  # Python 3.12
    has_tool = monitoring is not None and any(monitoring.get_tool(number) is not None for number in range(6))
    return has_tool or sys.gettrace() is not None or sys.getprofile() is not None
