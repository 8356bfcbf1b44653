"""What a machine has of what qconv needs: packages, GPU, memory, disk, caches; and what to do about what is wrong.

Versions come from the installed metadata, and what they must be from qconv's own: no package is imported to be looked
at. torch is imported for the GPU alone, and bitsandbytes where there is one.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from qconv import __version__
from qconv.host_memory import total_bytes, usable_bytes

# Distribution -> what it is there for.
PACKAGES: Mapping[str, str] = {
    "torch": "everything",
    "transformers": "everything",
    "safetensors": "reading",
    "huggingface_hub": "hub ids",
    "accelerate": "loading whole models",
    "tokenizers": "text",
    "peft": "qconv train; the reference on a GPU, and of adapters that are no LoRA",
    "bitsandbytes": "qconv train; the reference on a GPU",
    "compressed-tensors": "transformers with w4a16, w8a16, w4a8, fp8, int8, nvfp4 and mxfp4 outputs",
    "gguf": "outputs and candidates for llama.cpp",
    "triton": "fused kernels on a GPU",
    "lm_eval": "--tasks",
    "datasets": "text from data sets of a hub; --tasks",
    "pyarrow": "text from .parquet files; --tasks",
    "onnxruntime-genai": "ONNX outputs",
    "onnxruntime": "ONNX outputs and candidates",
    "onnx": "ONNX outputs and candidates",
    "gptqmodel": "transformers with gptq and awq outputs",
    "vllm": "serving",
}
_EXTRAS = {
    "peft": "train",
    "bitsandbytes": "train",
    "compressed-tensors": "ct",
    "gguf": "gguf",
    "datasets": "datasets",
    "pyarrow": "datasets",
    "lm_eval": "eval",
    "onnxruntime-genai": "onnx",
    "onnxruntime": "onnx",
    "onnx": "onnx",
}
_REQUIREMENT = re.compile(r"\s*([\w.-]+)\s*(?:\[[^\]]*\])?\s*\(?([^;()]*)\)?\s*(?:;(.*))?")
_BOUND = re.compile(r"\s*(>=|<=|==|!=|>|<)\s*([\w.+]+)\s*")
_LITTLE_DISK = 20 << 30
_YES = ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads its variables


@dataclass(frozen=True)
class Need:
    """What qconv's metadata asks of a package: ``bounds`` as written there, and whether it runs without."""

    bounds: str = ""
    required: bool = False


def examine() -> dict[str, Any]:
    """Facts about this machine, ready for JSON.

    ``problems`` keep qconv from running; ``warnings`` say what is slow, or does not work, and what to do.
    """
    problems: list[str] = []
    warnings: list[str] = []
    packages = _packages(problems, warnings)
    cuda = _cuda(problems, warnings) if packages["torch"]["version"] else {"available": False, "why": "no torch"}
    machine = _machine()
    if machine["disk_free"] < _LITTLE_DISK:
        warnings.append(f"{machine['folder']} has {_gb(machine['disk_free'])} free: an 8B model in bf16 takes 16 GB")
    _look_at_environment(machine, warnings)
    return {
        "qconv": __version__,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "packages": packages,
        "cuda": cuda,
        "machine": machine,
        "hub": _hub(),
        "problems": problems,
        "warnings": warnings,
    }


def needs() -> dict[str, Need]:
    """By normalized name; what an extra asks for is not required.

    Raises:
        metadata.PackageNotFoundError: qconv runs from a folder that was never installed.
    """
    found: dict[str, Need] = {}
    for line in metadata.requires("qconv") or ():
        match = _REQUIREMENT.fullmatch(line)
        if match is None:
            continue
        name, bounds, marker = normalized(match[1]), match[2].strip(), match[3] or ""
        if "extra" not in marker:
            found[name] = Need(bounds, required=True)
        elif name not in found:
            found[name] = Need(bounds)
    return found


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def meets(version: str, bounds: str) -> bool:
    """Whether the release of ``version`` lies within bounds such as ``>=0.4.13,<0.5``; 2.8rc1 counts as 2.8."""
    release = _release(version)
    for part in filter(None, bounds.split(",")):
        match = _BOUND.fullmatch(part)
        if match is None:
            continue
        limit = _release(match[2])
        order = (release > limit) - (release < limit)
        if not {">=": order >= 0, "<=": order <= 0, "==": not order, "!=": bool(order), ">": order > 0, "<": order < 0}[
            match[1]
        ]:
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(number) for number in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _packages(problems: list[str], warnings: list[str]) -> dict[str, dict[str, Any]]:
    try:
        needed = needs()
    except metadata.PackageNotFoundError:
        needed = {name: Need(required=True) for name in ("torch", "transformers", "safetensors")}
        warnings.append("qconv is not installed as a package, so what it needs is not known: pip install -e .")
    names = {normalized(name): name for name in PACKAGES}
    names |= {name: name for name, need in needed.items() if need.required and name not in names}
    table = {}
    for key, name in names.items():
        need = needed.get(key, Need())
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = None
        status = "missing" if version is None else "ok" if meets(version, need.bounds) else "wrong version"
        table[name] = {
            "version": version,
            "needs": need.bounds,
            "required": need.required,
            "status": status,
            "enables": PACKAGES.get(name, "everything"),
            "extra": f"qconv[{_EXTRAS[name]}]" if name in _EXTRAS else None,
        }
        if status == "ok" or (status == "missing" and not need.required):
            continue
        extra = table[name]["extra"] or f"{name}{need.bounds}"
        found = "is not installed" if version is None else f"is {version}, and qconv needs {need.bounds}"
        (problems if need.required else warnings).append(f'{name} {found}: pip install --upgrade "{extra}"')
    return dict(sorted(table.items(), key=lambda item: not item[1]["required"]))


def _cuda(problems: list[str], warnings: list[str]) -> dict[str, Any]:
    driver = _driver()
    try:
        import torch
    except Exception as error:  # a broken library raises anything
        problems.append(f"torch cannot be imported ({type(error).__name__}: {error}): install it again")
        return {"available": False, "why": "torch cannot be imported", "driver": driver}
    facts: dict[str, Any] = {"available": torch.cuda.is_available(), "driver": driver, "built_for": torch.version.cuda}
    if not facts["available"]:
        facts["why"] = "torch is a build without CUDA" if torch.version.cuda is None else "torch finds no device"
        if driver is not None:
            warnings.append(
                f"there is an NVIDIA driver ({driver}), but {facts['why']}: install a build of torch for CUDA, "
                "or look at CUDA_VISIBLE_DEVICES"
            )
        return facts
    try:
        facts["devices"] = [_device(torch, number) for number in range(torch.cuda.device_count())]
        facts["triton_kernels"] = _has_triton_kernels(torch, warnings)
    except Exception as error:
        warnings.append(f"the GPU does not answer ({type(error).__name__}: {error}): qconv runs with --device cpu")
        return facts | {"available": False, "why": "the GPU does not answer"}
    facts["bitsandbytes"] = _bitsandbytes(warnings)
    return facts


def _device(torch: Any, number: int) -> dict[str, Any]:
    free, total = torch.cuda.mem_get_info(number)
    capability = "{}.{}".format(*torch.cuda.get_device_capability(number))
    name = torch.cuda.get_device_name(number)
    return {"name": name, "capability": capability, "memory_total": total, "memory_free": free}


def _has_triton_kernels(torch: Any, warnings: list[str]) -> bool:
    from qconv.triton_support import available

    if not available(torch.empty(0, device="cuda")):
        warnings.append("fused kernels need triton and a GPU since Ampere (capability 8.0): quantizing is slower")
        return False
    if not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        warnings.append("triton compiles its launcher with a C compiler, and there is none: install gcc, or set CC")
        return False
    return True


def _bitsandbytes(warnings: list[str]) -> str:
    """Whether its CUDA library loads; it says so itself only once something is called, and with a traceback."""
    disabled = logging.root.manager.disable
    logging.disable()
    try:
        from bitsandbytes.cextension import lib
    except ImportError:
        return "not installed"
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        if getattr(lib, "compiled_with_cuda", False):
            return "loads"
        reason = str(getattr(lib, "error_msg", "its library for CPUs was loaded"))
    finally:
        logging.disable(disabled)
    warnings.append(f"bitsandbytes does not load its CUDA library ({reason}): qconv train needs it on a GPU")
    return f"does not load: {reason}"


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError, IndexError):
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.split()[0]
    return None


def _machine() -> dict[str, Any]:
    has_affinity = hasattr(os, "sched_getaffinity")
    folder = Path.cwd()
    return {
        "system": platform.platform(),
        "cpu_cores": len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1,
        "memory_total": total_bytes(),
        "memory_available": usable_bytes(),  # to qconv, as its plans count it: a container may have less than is free
        "folder": str(folder),
        "disk_free": shutil.disk_usage(folder).free,
    }


def _hub() -> dict[str, Any]:
    """Where models from the hub lie, as huggingface_hub decides it."""
    read = os.environ.get
    caches = Path(read("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(read("HF_HOME") or caches / "huggingface").expanduser()
    cache = Path(read("HF_HUB_CACHE") or read("HUGGINGFACE_HUB_CACHE") or home / "hub").expanduser()
    offline = any(read(name, "").upper() in _YES for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return {"cache": str(cache), "exists": cache.is_dir(), "offline": offline}


def _look_at_environment(machine: Mapping[str, Any], warnings: list[str]) -> None:
    if sys.dont_write_bytecode:
        warnings.append(
            "PYTHONDONTWRITEBYTECODE is set (or python -B): every start compiles torch and transformers anew; unset it"
        )
    if os.environ.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE":
        warnings.append("OMP_WAIT_POLICY=ACTIVE: threads that wait keep the cores busy; unset it")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > machine["cpu_cores"]:
        warnings.append(f"OMP_NUM_THREADS={threads}, and there are {machine['cpu_cores']} cores: unset it")


def as_text(facts: Mapping[str, Any]) -> str:
    """The same for people."""
    rows = [("qconv", facts["qconv"]), ("python", "{version}  {executable}".format(**facts["python"]))]
    for name, package in facts["packages"].items():
        version = package["version"] or "not installed"
        wrong = f"  needs {package['needs']}" if package["status"] == "wrong version" else ""
        missing = package["status"] == "missing" and package["extra"]
        how = f': pip install "{package["extra"]}"' if missing else ""
        rows.append((name, f"{version:<16}{wrong}  {package['enables']}{how}"))
    rows += _cuda_rows(facts["cuda"])
    machine, hub = facts["machine"], facts["hub"]
    rows += [
        ("cpu", f"{machine['cpu_cores']} cores"),
        ("memory", f"{_gb(machine['memory_total'])}, {_gb(machine['memory_available'])} available"),
        ("disk", f"{_gb(machine['disk_free'])} free in {machine['folder']}"),
        ("hub cache", f"{hub['cache']}{'' if hub['exists'] else ' (not there yet)'}"),
        ("hub", "offline: only what is in the cache" if hub["offline"] else "online"),
    ]
    rows += [("warning", text) for text in facts["warnings"]] + [("problem", text) for text in facts["problems"]]
    rows.append(("verdict", "qconv cannot run" if facts["problems"] else "qconv can run"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in rows)


def _cuda_rows(cuda: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not cuda["available"]:
        return [("cuda", f"no: {cuda['why']}")]
    rows = [("cuda", f"{cuda['built_for']}, driver {cuda['driver'] or 'unknown'}")]
    for device in cuda["devices"]:
        free, total = _gb(device["memory_free"]), _gb(device["memory_total"])
        rows.append(("gpu", f"{device['name']}, capability {device['capability']}, {free} free of {total}"))
    rows.append(("kernels", "fused (triton)" if cuda["triton_kernels"] else "plain PyTorch"))
    rows.append(("bnb on gpu", cuda["bitsandbytes"].partition("\n")[0]))
    return rows


def _gb(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / 1e9:.1f} GB"
