"""What `qconv doctor` says, against packaging (bounds), huggingface_hub (its cache) and torch (its GPU).

Other versions are put before the installed ones as metadata on the import path, so `importlib.metadata` itself finds
them, in processes of their own.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from qconv import doctor
from qconv.cli import cli

ROOT = Path(__file__).parents[1]
REQUIRES = ["torch>=2.8", "transformers>=5.0", 'peft>=0.18; extra == "train"', 'lm_eval<0.5,>=0.4.13; extra == "eval"']


def installed(folder: Path, **versions: str) -> Path:
    """Metadata of packages, as an installer leaves it, and of a qconv with `REQUIRES`."""
    for name, version in {"qconv": "1.0", **versions}.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {line}" for line in REQUIRES] if name == "qconv" else []
        (info / "METADATA").write_text("\n".join(lines) + "\n")
    return folder


def examined(*arguments: str, **environment: str) -> tuple[int, str]:
    command = [sys.executable, "-P", "-m", "qconv", "doctor", *arguments]  # -P: what is asked for comes first
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), str(ROOT)]))
    done = subprocess.run(command, capture_output=True, text=True, env=variables | environment, timeout=120)
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_this_machine_can_run_qconv(tmp_path: Path) -> None:
    """The tests run here, so qconv does."""
    code, stdout = examined("--json", CUDA_VISIBLE_DEVICES="")
    facts = json.loads(stdout)
    assert (code, facts["exit_code"], facts["problems"]) == (0, 0, [])
    assert facts["packages"]["torch"]["version"] == metadata.version("torch")
    assert facts["packages"]["torch"]["required"]
    assert not facts["packages"]["peft"]["required"]
    assert not facts["packages"]["vllm"]["required"]
    for package in facts["packages"].values():
        assert package["status"] in ("ok", "missing", "wrong version")
        assert package["enables"]
    assert not facts["cuda"]["available"]
    assert facts["machine"]["cpu_cores"] == len(os.sched_getaffinity(0))
    assert facts["machine"]["memory_total"] == pytest.approx(
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), rel=1e-3
    )
    assert facts["machine"]["memory_total"] > facts["machine"]["memory_available"] > 0


def test_required_package_that_is_too_old(tmp_path: Path) -> None:
    path = installed(tmp_path, torch="2.7.1+cu126")
    code, stdout = examined("--json", PYTHONPATH=str(path))
    facts = json.loads(stdout)
    assert (code, facts["exit_code"]) == (3, 3)
    (problem,) = facts["problems"]
    assert problem.startswith("torch is 2.7.1+cu126, and qconv needs >=2.8: pip install ")
    assert facts["packages"]["torch"]["status"] == "wrong version"
    code, stdout = examined(PYTHONPATH=str(path))
    assert code == 3
    assert "needs >=2.8" in stdout
    assert stdout.splitlines()[-1].split(maxsplit=1) == ["verdict", "qconv cannot run"]


def test_optional_package_that_does_not_fit_is_a_warning(tmp_path: Path) -> None:
    path = installed(tmp_path, peft="0.17.0", lm_eval="0.5.0")
    code, stdout = examined("--json", PYTHONPATH=str(path))
    facts = json.loads(stdout)
    assert (code, facts["problems"]) == (0, [])
    warnings = "\n".join(facts["warnings"])
    assert 'peft is 0.17.0, and qconv needs >=0.18: pip install --upgrade "qconv[train]"' in warnings
    assert "lm_eval is 0.5.0" in warnings
    assert 'pip install --upgrade "qconv[eval]"' in warnings


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def without(name: str) -> str:
        if name in ("transformers", "peft"):
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without)
    result = CliRunner().invoke(cli, ["doctor", "--json"])
    facts = json.loads(result.stdout)
    assert (result.exit_code, facts["exit_code"]) == (3, 3)
    assert [text.split(":")[0] for text in facts["problems"]] == ["transformers is not installed"]
    assert (facts["packages"]["peft"]["status"], facts["packages"]["peft"]["version"]) == ("missing", None)
    assert not any(text.startswith("peft") for text in facts["warnings"])  # it is a choice


def test_extras_that_are_named_exist_and_bring_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {f"qconv[{name}]": lines for name, lines in project["optional-dependencies"].items()}
    facts = doctor.examine()
    found = {name: package["extra"] for name, package in facts["packages"].items() if package["extra"]}
    assert {"datasets", "pyarrow", "peft", "lm_eval"} <= found.keys()
    for name, extra in found.items():
        assert name in [Requirement(line).name for line in extras[extra]]
    facts["packages"]["pyarrow"] |= {"version": None, "status": "missing"}
    lines = [line for line in doctor.as_text(facts).splitlines() if line.startswith("pyarrow")]
    assert len(lines) == 1
    assert lines[0].endswith('.parquet files; --tasks: pip install "qconv[datasets]"')


def test_what_extras_need_is_pinned_within_their_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        line
        for name in ("constraints.txt", "constraints-test.txt")
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    wanted = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    requirements = [item for item in map(Requirement, wanted) if item.name not in ("qconv", "torch")]
    assert {"gguf", "onnx-ir", "onnxruntime-genai", "lm_eval"} <= {item.name for item in requirements}
    for item in requirements:
        assert item.specifier.contains(pinned[canonicalize_name(item.name)]), item


def test_torch_is_not_imported_where_it_is_missing() -> None:
    script = (
        "import sys\n"
        "from importlib import metadata\n"
        "version = metadata.version\n"
        "def without(name):\n"
        "    if name == 'torch':\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return version(name)\n"
        "metadata.version = without\n"
        "from qconv.doctor import as_text, examine\n"
        "facts = examine()\n"
        "assert 'no torch' in as_text(facts)\n"
        "print(facts['problems'], sorted({'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("['torch is not installed: pip install --upgrade \"torch>=2.")
    assert done.stdout.rstrip().endswith("[]")


def test_torch_that_cannot_be_imported_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    facts = doctor.examine()
    assert any(text.startswith("torch cannot be imported (ModuleNotFoundError") for text in facts["problems"])


def test_qconv_that_was_never_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", unknown)
    facts = doctor.examine()
    assert facts["problems"] == []
    assert any("qconv is not installed as a package" in text for text in facts["warnings"])


def test_needs_are_those_of_the_metadata() -> None:
    """As packaging reads them."""
    found = doctor.needs()
    for line in metadata.requires("qconv") or ():
        requirement = Requirement(line)
        need = found[doctor.normalized(requirement.name)]
        if "extra" not in str(requirement.marker):
            assert need.required, line
        if requirement.specifier:
            assert SpecifierSet(need.bounds) == requirement.specifier, line
    assert {name for name, need in found.items() if need.required} >= {"torch", "transformers", "safetensors"}


def test_bounds_are_judged_as_packaging_judges_them() -> None:
    draw = random.Random(0)
    judged = set()
    for _ in range(2000):
        version = ".".join(str(draw.randint(0, 3)) for _ in range(draw.randint(1, 3)))
        limits = [".".join(str(draw.randint(0, 3)) for _ in range(draw.randint(1, 3))) for _ in range(2)]
        bounds = f"{draw.choice(['>=', '>', '==', '!='])}{limits[0]},{draw.choice(['<', '<='])}{limits[1]}"
        expected = SpecifierSet(bounds).contains(version)
        assert doctor.meets(version, bounds) == expected, (version, bounds)
        judged.add(expected)
    assert judged == {True, False}
    assert doctor.meets("2.13.0+cpu", ">=2.8")
    assert doctor.meets("2.8.0.dev20250601", ">=2.8")  # a nightly build has what the release will have
    assert not doctor.meets("2.7.9", ">=2.8")
    assert doctor.meets("unknown", "")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"HF_HOME": "/somewhere/hf"},
        {"HF_HUB_CACHE": "/somewhere/hub", "HF_HOME": "/somewhere/hf"},
        {"HUGGINGFACE_HUB_CACHE": "/somewhere/old"},
        {"XDG_CACHE_HOME": "/somewhere/xdg"},
        {"HF_HUB_OFFLINE": "yes"},
        {"HF_HUB_OFFLINE": "0"},
        {"TRANSFORMERS_OFFLINE": "1"},
        {"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": ""},
    ],
    ids=lambda environment: ",".join(environment) or "none",
)
def test_cache_and_offline_are_those_of_huggingface_hub(environment: dict[str, str]) -> None:
    script = (
        "import json\nfrom qconv.doctor import _hub\nfrom huggingface_hub import constants\n"
        "found = _hub()\n"
        "print(json.dumps([found['cache'], found['offline'], constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE]))\n"
    )
    names = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HF_HUB_OFFLINE")
    variables = {k: v for k, v in os.environ.items() if k not in (*names, "TRANSFORMERS_OFFLINE")} | environment
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=variables, check=True)
    cache, offline, expected_cache, expected_offline = json.loads(done.stdout)
    assert (cache, offline) == (expected_cache, expected_offline)


def test_environment_that_costs_time() -> None:
    _, stdout = examined(PYTHONDONTWRITEBYTECODE="1", OMP_WAIT_POLICY="active", OMP_NUM_THREADS="4096")
    warnings = [line.split(maxsplit=1)[1] for line in stdout.splitlines() if line.startswith("warning ")]
    for words in ("PYTHONDONTWRITEBYTECODE", "OMP_WAIT_POLICY=ACTIVE", "OMP_NUM_THREADS=4096"):
        assert any(text.startswith(words) and "unset it" in text for text in warnings), warnings
    _, stdout = examined(OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS="1")
    assert not any(words in stdout for words in ("PYTHONDONTWRITEBYTECODE", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"))


def test_little_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=3 << 30))
    facts = doctor.examine()
    assert facts["machine"]["disk_free"] == 3 << 30
    assert any("3.2 GB free" in text for text in facts["warnings"])


# The GPU


class FakeCuda:
    """The part of ``torch.cuda`` that is asked, for one device."""

    capability = (9, 0)

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def mem_get_info(self, _: int) -> tuple[int, int]:
        return 70 * 10**9, 80 * 10**9

    def get_device_capability(self, _: object) -> tuple[int, int]:
        return self.capability

    def get_device_name(self, _: int) -> str:
        return "Some GPU"


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    cuda = FakeCuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch, "empty", lambda *_, **__: SimpleNamespace(is_cuda=True, device="cuda:0"))
    monkeypatch.setattr(doctor, "_driver", lambda: "570.1")
    monkeypatch.setenv("CC", "gcc")
    monkeypatch.setitem(
        sys.modules, "bitsandbytes.cextension", SimpleNamespace(lib=SimpleNamespace(compiled_with_cuda=True))
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
    return cuda


def gpu_facts() -> tuple[dict[str, Any], str, str]:
    facts = doctor.examine()
    return facts["cuda"], "\n".join(facts["warnings"]), doctor.as_text(facts)


def test_gpu_that_has_everything(fake_gpu: FakeCuda) -> None:
    pytest.importorskip("triton")
    cuda, warnings, text = gpu_facts()
    assert (cuda["available"], cuda["driver"], cuda["built_for"]) == (True, "570.1", "12.8")
    assert (cuda["triton_kernels"], cuda["bitsandbytes"]) == (True, "loads")
    assert cuda["devices"] == [
        {"name": "Some GPU", "capability": "9.0", "memory_total": 80 * 10**9, "memory_free": 70 * 10**9}
    ]
    assert "Some GPU, capability 9.0, 70.0 GB free of 80.0 GB" in text
    assert not any(word in warnings for word in ("triton", "bitsandbytes", "GPU"))


def test_gpu_without_kernels_or_bitsandbytes(fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu.capability = (7, 5)
    mock = SimpleNamespace(error_msg="libnvJitLink.so.13: cannot open shared object file")
    monkeypatch.setitem(sys.modules, "bitsandbytes.cextension", SimpleNamespace(lib=mock))
    cuda, warnings, text = gpu_facts()
    assert not cuda["triton_kernels"]
    assert cuda["bitsandbytes"].startswith("does not load: libnvJitLink")
    assert "fused kernels need triton and a GPU since Ampere" in warnings
    assert "bitsandbytes does not load its CUDA library (libnvJitLink" in warnings
    assert "plain PyTorch" in text


def test_triton_without_a_compiler(fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    cuda, warnings, _ = gpu_facts()
    assert not cuda["triton_kernels"]
    assert "there is none: install gcc" in warnings


def test_gpu_that_does_not_answer(fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: int) -> tuple[int, int]:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(fake_gpu, "mem_get_info", broken)
    facts = doctor.examine()
    assert not facts["cuda"]["available"]
    assert facts["problems"] == []  # a CPU is enough
    assert any("does not answer (RuntimeError: CUDA error: out of memory)" in text for text in facts["warnings"])


def test_driver_without_a_torch_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A real `nvidia-smi` on the path, as a script."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 570.172.08\necho 570.172.08\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    facts = doctor.examine()
    assert facts["cuda"]["driver"] == "570.172.08"
    assert any("NVIDIA driver (570.172.08)" in text and "without CUDA" in text for text in facts["warnings"])
    command.write_text("#!/bin/sh\necho failed >&2\nexit 9\n")
    assert doctor.examine()["cuda"]["driver"] is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_real_gpu() -> None:
    code, stdout = examined("--json")
    cuda = json.loads(stdout)["cuda"]
    assert (code, cuda["available"]) == (0, True)
    assert [device["name"] for device in cuda["devices"]] == [
        torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())
    ]
    assert cuda["devices"][0]["memory_total"] == torch.cuda.get_device_properties(0).total_memory
    assert 0 < cuda["devices"][0]["memory_free"] <= cuda["devices"][0]["memory_total"]
    assert cuda["driver"]
