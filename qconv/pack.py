"""What an engine needs beside the weights: its launch line, further files, memory, a smoke test, a page to read.

Nothing is copied: an engine is given the model's own folder, or, where it wants a file more in it, a folder of links.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from qconv import __version__
from qconv.errors import CapacityError, QconvError, SchemeError, UsageError
from qconv.expected_answers import ExpectedAnswer, expected_answers, why_not_whole
from qconv.inputs import resolve_device
from qconv.pack_place import PACK_FORMAT, Packed, place_of_pack
from qconv.progress import QUIET, Progress
from qconv.runners import Candidate
from qconv.served_model import ServedModel, open_served
from qconv.serving import ENGINES, Engine, Request, Served, ServedAdapter
from qconv.serving.memory import ServingMemory, serving_memory
from qconv.serving.page import launch_script, read_me
from qconv.serving_config import DEFAULT_CONCURRENCY, PackConfig
from qconv.side_files import tokenizer_files
from qconv.tensor_parallel import check_parallel
from qconv.work_folder import PACK_SIGN, publishing

ORT_GENAI = "ort-genai"
OLLAMA = "ollama"
_GGUF = (
    f"{{folder}} holds a GGUF file ({{layout}}), which Ollama takes: --for {OLLAMA}; llama.cpp serves it as it is "
    "(llama-server -m FILE). For other engines make another target, such as --requant w4a16"
)
_ONNX = f"{{folder}} holds an ONNX graph ({{layout}}), which ONNX Runtime GenAI runs: --for {ORT_GENAI}"
UNRECORDED_TOKENS = 16
_PROMPT_ALONE = "The capital of France is"
_ITEMSIZE = {"float32": 4}


def pack(config: PackConfig, progress: Progress = QUIET) -> Packed:
    """Writes the folder, complete or not at all.

    Raises:
        SchemeError: the engine does not load the model, or it does not divide by the GPUs; says what would do.
        CapacityError: not one sequence fits on the GPUs that were named.
        CheckpointError, AdapterError, UsageError: see `open_served`; ``out`` cannot be written.
    """
    engine = ENGINES[config.engine]
    model = open_served(config, config.port or engine.port, _concurrency(engine, config))
    inputs: list[str | Path] = [model.source.folder, *(adapter.source for adapter in config.adapters)]
    out = place_of_pack(config.out, config.model, engine.name, config.overwrite, inputs)
    served = model.served
    reason = engine.refusal(served)
    if served.is_onnx and engine.name != ORT_GENAI:
        reason = _ONNX.format(folder=config.model, layout=served.layout)
    if served.is_gguf and engine.name != OLLAMA:
        reason = _GGUF.format(folder=config.model, layout=served.layout)
    if reason is not None:
        raise SchemeError(f"{engine.title} does not load {config.model}: {reason}")
    warnings = check_parallel(model.shape, model.linears(), served.num_gpus, config.model)
    memory = _memory(model, config)
    warnings += _capacity(memory) + _cautions(model)
    if config.model_path is not None and served.adapters:
        warnings.append("--model-path is of the model alone: adapters are named by where they lie now")
    for line in warnings:
        progress.say(f"warning: {line}")
    cases, why = _cases(engine, model, config, progress)
    document = {
        "format": PACK_FORMAT,
        "tool": f"qconv {__version__}",
        "command": "pack",
        "engine": engine.name,
        "model": served.path,
        "name": served.name,
        "layout": served.layout,
        "verdict": model.verdict,
        "launch": engine.command(served),
        "gpus": served.num_gpus,
        "memory": memory.as_dict(),
        "adapters": [{"name": a.name, "path": a.path, "rank": a.rank} for a in served.adapters],
        "answers": sum(bool(case["expected"]) for case in cases),
        "no answers because": why,
        "notes": engine.notes(served),
        "warnings": warnings,
        "sources": list(engine.sources),
    }
    with publishing(out, config.overwrite) as partial:
        _write(partial, engine, model, document, memory, cases)
    return Packed(out=out, document=document)


def _concurrency(engine: Engine, config: PackConfig) -> int:
    """Raises `UsageError` for more sequences than the engine runs at a time."""
    most = engine.most_at_a_time
    if config.concurrency is not None and most is not None and config.concurrency > most:
        raise UsageError(f"--concurrency {config.concurrency}: the server for {engine.title} runs {most} at a time")
    return config.concurrency or most or engine.usual_at_a_time or DEFAULT_CONCURRENCY


def _memory(model: ServedModel, config: PackConfig) -> ServingMemory:
    served = model.served
    return serving_memory(
        model.shape,
        model.source.specs().values(),
        model.view.specs(),
        num_gpus=served.num_gpus,
        cache_itemsize=1 if served.cache_dtype == "fp8" else 2 if served.is_gguf else _ITEMSIZE.get(served.dtype, 2),
        context=served.context,
        concurrency=served.concurrency,
        adapters=model.adapter_bytes,
        gpu=config.gpu_memory,
    )


def _capacity(memory: ServingMemory) -> list[str]:
    """Raises `CapacityError` where not one sequence fits; fewer than asked for is a warning."""
    fitting = memory.fitting_sequences
    if memory.gpu is None or fitting is None:
        return []
    if fitting < 1:
        raise CapacityError(
            f"a GPU of {memory.gpu / 1e9:.2f} GB: weights take {(memory.weights + memory.adapters) / 1e9:.2f} GB "
            f"of each, a sequence of {memory.context} tokens {memory.per_sequence / 1e9:.2f} GB, and engines use 90%; "
            "take more GPUs (--tp), a shorter --context, --kv-dtype fp8, or a target of fewer bits"
        )
    if fitting < memory.concurrency:
        return [
            f"{fitting} sequences of {memory.context} tokens fit on each GPU, not {memory.concurrency}; engines let "
            "the others wait"
        ]
    return []


def _cautions(model: ServedModel) -> list[str]:
    """What is true of the model whatever serves it."""
    found = []
    if not model.served.is_gguf and not tokenizer_files(model.source.folder):
        found.append("no tokenizer lies beside the weights, and engines look for one there: copy the base's files")
    if model.verdict in ("fail", "inconclusive"):
        found.append(f"the report in this folder ends with '{model.verdict}': it did not pass its gates")
    if model.shape.uncounted:
        found.append(f"layers of kind {', '.join(model.shape.uncounted)} keep a state that is not counted as memory")
    for adapter in model.served.adapters:
        if adapter.trained_on not in (None, "16bit") and model.served.layout != f"bnb-{adapter.trained_on}":
            found.append(
                f"adapter {adapter.name} corrects a base that was rounded to {adapter.trained_on}: it belongs on those "
                "values (qconv convert BASE --to bf16 decodes them); qconv validate --candidate MODEL "
                "--candidate-adapter ADAPTER measures this pair"
            )
    return found


def _cases(
    engine: Engine, model: ServedModel, config: PackConfig, progress: Progress
) -> tuple[list[dict[str, Any]], str | None]:
    """Questions of the smoke test, for the model and each adapter; and why no answers were recorded."""
    served = model.served
    device = resolve_device(config.device)
    why = "--no-answers" if not config.answers else why_not_whole(model.candidates[0], device)
    if why is None and model.source.folder.is_file():
        why = "no tokenizer lies beside a GGUF file alone"
    if why is not None:
        progress.say(f"note: no answers are recorded ({why}); the smoke test takes any that is not empty")
    cases = []
    for adapter, candidate in zip((None, *served.adapters), model.candidates, strict=True):
        name = served.name if adapter is None else adapter.name
        answers: Sequence[ExpectedAnswer] = [ExpectedAnswer(prompt=_PROMPT_ALONE, text="", num_tokens=0)]
        if why is None:
            progress.say(f"answering with {name}, for the smoke test")
            answers = _recorded(candidate, config.prompts, device)
        cases += [_case(engine, served, adapter, name, answer) for answer in answers]
    return cases, why


def _recorded(candidate: Candidate, prompts: str | None, device: str) -> list[ExpectedAnswer]:
    """Raises what `expected_answers` raises, with the way on: a model may be served that cannot be run here."""
    try:
        return expected_answers(candidate, prompts, device)
    except QconvError as error:
        raise type(error)(f"{error}\n(--no-answers packs it without recorded answers)") from error


def _case(
    engine: Engine, served: Served, adapter: ServedAdapter | None, name: str, answer: ExpectedAnswer
) -> dict[str, Any]:
    request: Request = engine.request(served, adapter, answer.prompt, max(answer.num_tokens, UNRECORDED_TOKENS))
    return {
        "model": name,
        "prompt": answer.prompt,
        "expected": answer.text,
        "path": request.path,
        "body": dict(request.body),
        "answer": list(request.answer),
    }


def _write(
    folder: Path,
    engine: Engine,
    model: ServedModel,
    document: dict[str, Any],
    memory: ServingMemory,
    cases: list[dict[str, Any]],
) -> None:
    served = model.served
    if engine.links_model(served):
        (folder / "model").mkdir()
        for file in sorted(model.source.folder.iterdir()):
            if file.is_file():
                os.symlink(f"{served.path.rstrip('/')}/{file.name}", folder / "model" / file.name)
    for name, text in engine.files(served).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    _write_program(folder / "launch.sh", launch_script(engine, served))
    with as_file(files("qconv.serving") / "smoke_test.py") as script:
        shutil.copyfile(script, folder / "smoke_test.py")
    (folder / "smoke_test.py").chmod(0o755)
    smoke = {"url": f"http://127.0.0.1:{served.port}", "ready": engine.ready, "cases": cases}
    (folder / "smoke.json").write_text(_json(smoke), encoding="utf-8")
    (folder / PACK_SIGN).write_text(_json(document), encoding="utf-8")
    (folder / "README.md").write_text(read_me(engine, served, document, memory), encoding="utf-8")


def _write_program(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    file.chmod(0o755)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
