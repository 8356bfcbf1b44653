"""Makes artifacts of SmolLM2-135M with a real adapter, has other engines read them, and compares perplexities.

    make test-engines
    .venv/bin/python -m scripts.engines.check --only gptq,fp8      # a part; writes no page
    .venv/bin/python -m scripts.engines.check --resume             # goes on after an interruption

Exit code 1 when an engine refuses what it is known to read, or reads anything differently.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.engines import importance
from scripts.engines.agreement import Check, Reading
from scripts.engines.importance import Weighed
from scripts.engines.page import Found, render
from scripts.engines.plan import ARTIFACTS, ENGINES, NOT_RUN, Engine

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TINY_LLAMA = ROOT / "tests" / "data" / "tiny-llama"
TOKENS = 512
PROMPT, NEW_TOKENS = "When the rain stopped, the old man opened the door and", 32
LIMIT_SECONDS = 1800
TRAINING = ("default-prose", "--steps", "30", "--batch-size", "4", "--seq-len", "256")


class Run:
    """Assets in one folder, and what was done to make them."""

    def __init__(self, out: Path, base: Path | None, adapter: Path | None, resume: bool):
        self.out, self.resume = out, resume
        self.base, self.adapter = base or out / "base-nf4", adapter or out / "adapter"
        self.vocabularies, self.gpt_oss = out / "vocabularies", out / "base-gpt-oss"
        self.commands: list[str] = []
        self.versions: dict[str, Mapping[str, str]] = {}
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:5.0f} s] {text}", flush=True)

    def prepare(self) -> None:
        """Bases, vocabularies and the adapter, unless they are there."""
        from qconv.demo_model import build_smollm2
        from qconv.progress import quiet_libraries
        from scripts.engines import gpt_oss
        from scripts.engines.vocabularies import STYLES, build

        self.out.mkdir(parents=True, exist_ok=True)
        if not self.base.exists():
            self.say(f"SmolLM2-135M-Instruct -> {self.base}")
            with quiet_libraries():
                build_smollm2(self.base, quantized=True)
        for style in STYLES:
            if not (folder := self.vocabularies / style).exists():
                build(style, TINY_LLAMA, folder)
        if not self.gpt_oss.exists():
            gpt_oss.build(TINY_LLAMA, self.gpt_oss)
        self.qconv("train", str(self.base), *TRAINING, "-o", str(self.adapter), made=self.adapter.exists())

    def artifact(self, name: str) -> Path:
        arguments = ARTIFACTS[name].arguments.format(
            base=self.base, adapter=self.adapter, vocabularies=self.vocabularies, gpt_oss=self.gpt_oss
        )
        folder = self.out / name
        made = self.resume and folder.exists()
        self.qconv(*shlex.split(arguments), "--no-validate", "-o", str(folder), made=made)
        return folder

    def qconv(self, *arguments: str, made: bool) -> None:
        command = shlex.join(["qconv", *arguments])
        self.commands.append(command)
        if made:
            return
        self.say(command)
        overwrite = [sys.executable, "-m", "qconv", *arguments, "--overwrite", "--quiet", "--device", "cpu"]
        subprocess.run(overwrite, check=True, stdout=subprocess.DEVNULL)

    def read(self, reader: str, key: str, script: str, python: Path, request: dict[str, Any]) -> Reading:
        """An artifact through one reader's process."""
        name = Path(request["folder"]).name
        answer = self.ask(reader, f"{name}-{key}", script, python, request)
        reading = Reading.of(answer)
        result = f"perplexity {reading.perplexity:.3f}" if reading.refusal is None else reading.refusal
        self.say(f"{name} in {reader}: {result} ({answer['seconds']:.0f} s)")
        return reading

    def ask(self, reader: str, name: str, script: str, python: Path, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request; the process' output goes to a file beside it."""
        stem = self.out / "readings" / name
        stem.parent.mkdir(exist_ok=True)
        asked, answered, log = (Path(f"{stem}.{ending}") for ending in ("request.json", "answer.json", "log"))
        content = json.dumps(request)
        if not (self.resume and answered.exists() and asked.read_text() == content):
            answered.unlink(missing_ok=True)
            asked.write_text(content)
            try:
                self.start(python, script, asked, answered, log)
            except subprocess.TimeoutExpired:
                return {"refusal": f"not finished after {LIMIT_SECONDS} s", "seconds": LIMIT_SECONDS}
        if not answered.exists():
            return {"refusal": f"the process ended without an answer, see {log}", "seconds": 0}
        answer: dict[str, Any] = json.loads(answered.read_text())
        self.versions[reader] = answer["versions"]
        return answer

    def start(self, python: Path, script: str, asked: Path, answered: Path, log: Path) -> None:
        # An engine's environment is its own: nothing of the one that this runs in.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment["PYTHONPATH"] = str(ROOT)  # this checkout, wherever the run was started
        command = [str(python), str(HERE / script), str(asked), str(answered)]
        with log.open("w") as stream:
            subprocess.run(command, stdout=stream, stderr=stream, timeout=LIMIT_SECONDS, env=environment)


def held_out_rows(folder: Path, num_rows: int) -> list[list[int]]:
    from qconv import corpus

    documents, tokenizer = corpus.load_documents("default-prose-eval"), corpus.load_tokenizer(folder)
    rows: list[list[int]] = corpus.pack_tokens(documents, tokenizer, num_rows, TOKENS, seed=0).tolist()
    return rows


def digest(folder: Path) -> str:
    """SHA-256 of the weights, file by file."""
    result = hashlib.sha256()
    weights = [
        path for pattern in ("*.safetensors", "*.gguf", "*.onnx", "*.onnx.data") for path in folder.glob(pattern)
    ]
    for path in sorted(weights):
        result.update(path.read_bytes())
    return result.hexdigest()


def check_all(run: Run, names: Sequence[str], pythons: Mapping[str, Path]) -> list[Check]:
    from scripts.engines.vocabularies import TEXTS

    run.prepare()
    checks = []
    for name in names:
        folder = run.artifact(name)
        rows = held_out_rows(folder, ARTIFACTS[name].rows)
        request: dict[str, Any] = {"rows": rows, "prompt": PROMPT, "new_tokens": NEW_TOKENS, "onednn": True}
        request |= {"folder": str(folder), "sha256": digest(folder)}
        if ARTIFACTS[name].texts:
            request["texts"] = TEXTS
        own_reader = "read_qconv.py", Path(sys.executable)
        ours = run.read("qconv", "qconv", *own_reader, request)
        for engine in ENGINES:
            if name not in engine.reads + engine.tried:
                continue
            request["onednn"] = name not in engine.without_onednn
            own = {"settings": engine.settings[name]} if name in engine.settings else {}
            theirs = run.read(engine.name, engine.key, engine.reader, pythons[engine.key], request | own)
            alike = ours
            if name in engine.cuts:
                alike = run.read("qconv", "qconv-cut", *own_reader, request | {"onednn": True, "cuts": True})
            checks.append(
                Check(
                    artifact=name,
                    engine=engine.name,
                    ours=alike,
                    theirs=theirs,
                    required=name in engine.reads,
                    close=engine.close.get(name),
                )
            )
    return checks


def check_importance(run: Run, python: Path) -> list[Weighed]:
    """llama.cpp quantizes with our importance matrix, and without."""
    folder = run.out / "imatrix"
    run.qconv(*importance.ARGUMENTS, "--no-validate", "-o", str(folder), made=run.resume and folder.exists())
    found = []
    for kind in importance.KINDS:
        request = importance.request_of(folder, kind, held_out_rows(folder, 8)) | {"sha256": digest(folder)}
        answer = run.ask("llama.cpp", f"imatrix-{kind}", "quantize_llama_cpp.py", python, request)
        names = ("plain", "weighed", "refusal")
        found.append(Weighed(kind=kind, **{name: answer[name] for name in names if name in answer}))
        run.say(f"{kind} with our importance matrix: {found[-1].failure or 'nearer'} ({answer['seconds']:.0f} s)")
    return found


def python_of(engine: Engine, environments: Path) -> Path:
    return Path(sys.executable) if engine.environment is None else environments / engine.environment / "bin" / "python"


def processor() -> str:
    """Architecture, and the instructions that decide which kernels run."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        flags = set()
    names = {"avx512f": "AVX-512", "avx512_bf16": "AVX-512 BF16", "amx_int8": "AMX"}
    found = [name for flag, name in names.items() if flag in flags]
    return " with ".join([platform.machine(), *([", ".join(found)] if found else [])])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/engines"))
    parser.add_argument("--base", type=Path, help="an NF4 SmolLM2 that is there already")
    parser.add_argument("--adapter", type=Path, help="one that was trained on it")
    parser.add_argument("--environments", type=Path, default=Path(), help="where the engines' .venv-* lie")
    parser.add_argument("--only", help=f"artifacts, separated by commas [default: all, {','.join(ARTIFACTS)}]")
    parser.add_argument(
        "--resume", action="store_true", help="keep artifacts that are there, and readings of the same bytes"
    )
    parser.add_argument("--page", type=Path, default=Path("docs/targets.md"))
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(ARTIFACTS)
    if unknown := [name for name in names if name not in ARTIFACTS]:
        parser.error(f"unknown artifacts {', '.join(unknown)}; there are {', '.join(ARTIFACTS)}")
    pythons = {engine.key: python_of(engine, arguments.environments) for engine in ENGINES}
    if missing := [str(path) for path in pythons.values() if not path.exists()]:
        parser.error(f"no {' and no '.join(missing)}; `make test-engines` sets the environments up")
    run = Run(arguments.out, arguments.base, arguments.adapter, arguments.resume)
    found = Found(
        checks=check_all(run, names, pythons),
        weighed=[] if arguments.only else check_importance(run, pythons["llama-cpp"]),
        machine=processor(),
        commands=run.commands,
        versions=run.versions,
        not_run=NOT_RUN,
        prompt=PROMPT,
    )
    page = render(found)
    if arguments.only:
        print(page)
    else:
        arguments.page.write_text(page)
        run.say(f"wrote {arguments.page}")
    for failure in found.failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
