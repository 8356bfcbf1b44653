"""Settings of qconv's own process, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
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
