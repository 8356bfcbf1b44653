"""Running tests of Triton kernels: whether Triton interprets is settled when it is first imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest


def run_checks(file: str, interpreted: bool) -> None:
    """Runs the functions named ``check_*`` of a test file in a process of their own."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    environment["TRITON_INTERPRET"] = "1" if interpreted else "0"
    options = ["-o", "python_functions=check_*", "-p", "no:cacheprovider", "-p", "no:randomly"]
    if not interpreted:
        options += ["-m", "gpu or not slow"]  # conftest.py hides the GPU from everything else
    command = [sys.executable, "-m", "pytest", *options, file]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout
