"""Settings of qconv's own process, each in a process of its own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qconv import own_process
from qconv.checkpoint import open_checkpoint


def ended(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process, its output buffered as it is by default."""
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run([sys.executable, *arguments], env=settings, capture_output=True, text=True, check=False)


def run(script: str, *arguments: str) -> str:
    done = ended("-c", script, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bitsandbytes_without_the_compiler_computes_the_same(tiny_nf4: Path) -> None:
    script = """
import sys, torch
from qconv import own_process
if sys.argv[2] == "own":
    own_process.leave_out_unused()
own_process.import_uncompiled("bitsandbytes")
assert ("bitsandbytes" in sys.modules) == (sys.argv[2] == "own")
from transformers import AutoModelForCausalLM
assert ("torch._inductor.compile_fx" in sys.modules) is False
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).train()
with torch.no_grad():
    print(model(torch.arange(64)[None]).logits.double().sum().item())
"""
    assert run(script, str(tiny_nf4), "own") == run(script, str(tiny_nf4), "library")


def test_left_out_libraries_come_back() -> None:
    script = """
import sys
from qconv import own_process
own_process.leave_out_unused()
try:
    import scipy
    raise SystemExit("scipy was imported")
except ImportError:
    pass
import transformers.utils
assert not transformers.utils.is_sklearn_available()
own_process.allow_again()
assert "scipy" not in sys.modules
own_process.keep_freed_memory()
"""
    run(script)


def test_collections_pause_while_libraries_are_imported_and_then_go_on() -> None:
    script = """
import gc, sys
from qconv import own_process
with own_process.without_collections():
    assert gc.isenabled(), "somebody else's process"
own_process.leave_out_unused()
assert gc.get_freeze_count() == 0
with own_process.without_collections():
    with own_process.without_collections():
        assert not gc.isenabled()
        import torch
    assert not gc.isenabled()
assert gc.isenabled()
assert gc.get_freeze_count() > 10_000
class Ring: pass
import weakref
ring = Ring()
ring.itself, seen = ring, weakref.ref(ring)
del ring
gc.collect()
assert seen() is None, "garbage is still found"
try:
    with own_process.without_collections():
        raise KeyError
except KeyError:
    assert gc.isenabled()
"""
    run(script)


def test_begin_imports_torch_in_a_process_of_its_own_only(tiny_llama: Path) -> None:
    script = """
import sys, threading
from qconv import own_process
if sys.argv[2] == "own":
    own_process.leave_out_unused()
own_process.begin("auto", [sys.argv[1], None, "somebody/on-the-hub"], solves=True)
assert ("torch" in sys.modules) == (sys.argv[2] == "own")
for thread in threading.enumerate():
    assert thread is threading.main_thread() or thread.daemon
    if thread.name.startswith("qconv"):
        thread.join()
"""
    run(script, str(tiny_llama), "own")
    run(script, str(tiny_llama), "library")


def test_libraries_are_imported_beside_the_job_and_waited_for() -> None:
    script = """
import sys, threading
from qconv import own_process
own_process.leave_out_unused()
own_process.begin("cpu", runs=True)
[importing] = [thread for thread in threading.enumerate() if thread.name == "qconv-import"]
with own_process.importing_libraries():
    assert not importing.is_alive()
    assert "transformers.modeling_utils" in sys.modules
    assert "peft" not in sys.modules and "bitsandbytes" not in sys.modules
"""
    run(script)


def test_an_adapter_that_asks_peft_waits_for_the_imports() -> None:
    script = """
from types import SimpleNamespace
from qconv import own_process
own_process.leave_out_unused()
own_process.begin("cpu", runs=True)
from qconv.merge.kinds import wavelets
config = {"wavelet_family": "db2"}
assert len(wavelets._taps(SimpleNamespace(read=SimpleNamespace(config=config), refuse=print))) == 4
"""
    run(script)


def test_the_first_kernel_leaves_its_tensor_as_it_is() -> None:
    script = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from qconv.first_kernel import launch_first
tensor = torch.arange(1.0, 5.0)
launch_first(tensor)
assert torch.equal(tensor, torch.arange(1.0, 5.0))
"""
    run(script)


@pytest.mark.gpu
def test_begin_wakes_the_gpu() -> None:
    script = """
import threading
from qconv import own_process
own_process.leave_out_unused()
own_process.begin("auto", solves=True)
import torch
for thread in threading.enumerate():
    if thread.name == "qconv-wake-gpu":
        thread.join()
assert torch.cuda.is_initialized()
assert torch.cuda.memory_allocated() < 100e6
x = torch.eye(64, device="cuda") * 2
assert torch.equal(torch.linalg.cholesky(x @ x).cpu(), torch.eye(64) * 2)
"""
    run(script)


# Of a job in qconv's own process: which of these it imported.
_MERGE = """
import sys
from qconv import own_process
own_process.leave_out_unused()
from qconv.cli import cli
cli.main(args=sys.argv[1:], standalone_mode=False)
print([n for n in ("transformers", "accelerate", "peft", "bitsandbytes", "huggingface_hub") if n in sys.modules])
"""


def imported_by(*arguments: str | Path) -> list[str]:
    line = run(_MERGE, *map(str, arguments)).splitlines()[-1]
    names: list[str] = json.loads(line.replace("'", '"'))
    return names


def test_a_plain_merge_needs_torch_alone(tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert imported_by("merge", tiny_nf4, tiny_adapter, "--no-validate", "--quiet", "-o", out) == []
    assert open_checkpoint(out).config["model_type"] == "llama"


@pytest.mark.parametrize("options", [["fp8"], ["awq", "--algorithm", "rtn", "--group-size", "64"]], ids=["fp8", "rtn"])
def test_weights_of_a_known_family_are_rounded_without_its_code(
    tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path, options: list[str]
) -> None:
    out = tmp_path / "out"
    job = ["merge", tiny_nf4, tiny_adapter, "--requant", *options, "--no-validate", "--quiet", "-o", out]
    assert imported_by(*job) == []
    assert open_checkpoint(out).config["quantization_config"]


_LEAVE = """
import atexit, sys, threading, time
from qconv import own_process
def late():
    time.sleep(0.2)
    print("thread")
atexit.register(lambda: print("exit function"))
threading.Thread(target=late).start()
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
from concurrent.futures import ThreadPoolExecutor
pool = ThreadPoolExecutor(2)  # its idle threads wait for more work
pool.submit(int)
class Taken:
    def __del__(self): print("taken apart")
kept = Taken()
print("x" * 1_000_000)
print("problem", file=sys.stderr, end="")
"""


@pytest.mark.parametrize("code", [0, 4, 130])
def test_leaving_does_all_that_the_interpreter_does_but_take_objects_apart(code: int) -> None:
    lines = ["x" * 1_000_000, "thread", "exit function"]
    usual = ended("-c", _LEAVE + f"sys.exit({code})")
    assert (usual.returncode, usual.stdout.splitlines(), usual.stderr) == (code, [*lines, "taken apart"], "problem")
    left = ended("-c", _LEAVE + f"own_process.leave({code})")
    assert (left.returncode, left.stdout.splitlines(), left.stderr) == (code, lines, "problem")


def test_leaving_is_up_to_the_interpreter_where_nobody_reads() -> None:
    script = "import os, sys; from qconv import own_process; print('lost'); os.close(1); "
    usual, left = (ended("-c", script + how) for how in ("sys.exit(3)", "own_process.leave(3)"))
    assert left.returncode == usual.returncode == 120
    assert left.stderr == usual.stderr
    assert "Bad file descriptor" in left.stderr


def test_leaving_lets_a_profiler_finish() -> None:
    done = ended("-c", "import cProfile; from qconv import own_process; cProfile.run('own_process.leave(0)')")
    assert "function calls" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--version"], 0, "qconv"),
        (["inspect", "no-such-folder"], 3, "error: "),
        (["merge"], 2, "Usage"),
        (["inspect", "{model}"], 0, "llama"),
    ],
)
def test_exit_codes_of_the_process(tiny_llama: Path, arguments: list[str], code: int, said: str) -> None:
    done = ended("-m", "qconv", *(argument.format(model=tiny_llama) for argument in arguments))
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("system", "release", "variables", "is_set"),
    [
        ("linux", "6.8.0-49-generic", {}, True),
        ("linux", "6.8.0-49-generic", {"PYTORCH_ALLOC_CONF": "backend:native"}, False),
        ("linux", "6.8.0-49-generic", {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, False),
        ("linux", "6.6.87.2-microsoft-standard-WSL2", {}, False),
        ("win32", "11", {}, False),
    ],
)
def test_segments_expand_where_they_can_and_nobody_said_otherwise(
    system: str, release: str, variables: dict[str, str], is_set: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr("platform.release", lambda: release)
    before = dict(os.environ)
    own_process.expand_segments()
    added = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} if is_set else {}
    assert dict(os.environ) == before | added
    if is_set:  # it is this test's
        del os.environ["PYTORCH_CUDA_ALLOC_CONF"]


def test_modules_are_of_the_packages_that_python_finds() -> None:
    expected = importlib.metadata.packages_distributions()
    found = own_process.packages_distributions()
    assert {name: set(found[name]) for name in expected} == {name: set(of) for name, of in expected.items()}
