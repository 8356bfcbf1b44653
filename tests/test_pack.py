"""`qconv pack`: what is written for each engine, run as far as it runs without the engine.

The launch script runs with a program of the engine's name that only says what it was called with; the smoke test asks
a server of this file, whose answers are in the form that each engine documents.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from qconv.cli import main
from qconv.expected_answers import MARGIN, PLAIN_PROMPTS
from qconv.serving import ENGINES
from tests.cli_cases import Variant, made, set_config
from tests.conftest import TINY_LLAMA, save_random_adapter

OF_SAFETENSORS = [name for name in ENGINES if name not in ("ort-genai", "ollama")]  # the first: tests/test_onnx.py
Pack = Callable[..., dict[str, Any]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY_LLAMA, tmp_path / "my model"))  # a path with a space has to survive


@pytest.fixture
def pack(capsys: pytest.CaptureFixture[str]) -> Pack:
    """Runs the command and gives its document."""

    def run(model: Path, engine: str, *words: str) -> dict[str, Any]:
        capsys.readouterr()
        main(["pack", str(model), "--for", engine, "--device", "cpu", "--json", *words])
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["pack", *map(str, words), "--device", "cpu"])
    return int(str(caught.value.code)), capsys.readouterr().err


@pytest.mark.parametrize("engine", OF_SAFETENSORS)
def test_launch_script_calls_the_engine_with_its_arguments(
    engine: str, model: Path, tmp_path: Path, pack: Pack
) -> None:
    out = tmp_path / "packed for it"
    document = pack(model, engine, "-o", str(out), "--no-answers", "--name", "tiny", "--context", "512")
    assert document["folder"] == str(out)
    script = out / "launch.sh"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)
    binary = tmp_path / "bin" / document["launch"][0]
    binary.parent.mkdir()
    binary.write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"\n')
    binary.chmod(0o755)
    environment = {**os.environ, "PATH": f"{binary.parent}:{os.environ['PATH']}"}
    said = subprocess.run([script, "--more", "a b"], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.splitlines() == [str(out), *document["launch"][1:], "--more", "a b"]
    everything = "".join(file.read_text() for file in out.rglob("*") if file.is_file())
    assert str(model) in everything
    assert sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) < 60_000  # no weights were copied


def test_default_folder_lies_beside_the_model(model: Path, pack: Pack) -> None:
    before = sorted(model.iterdir())
    document = pack(model, "vllm", "--no-answers")
    assert document["folder"] == f"{model}-vllm"
    assert sorted(file.name for file in Path(document["folder"]).iterdir()) == [
        "README.md",
        "launch.sh",
        "qconv-pack.json",
        "smoke.json",
        "smoke_test.py",
    ]
    assert sorted(model.iterdir()) == before
    assert document["name"] == "my-model"


def test_memory_is_of_the_files_and_the_config(model: Path, pack: Pack) -> None:
    from safetensors.torch import load_file

    tensors = load_file(model / "model.safetensors")
    num_bytes = sum(t.nbytes for t in tensors.values())
    memory = pack(model, "vllm", "--no-answers", "--concurrency", "3", "--context", "500")["memory"]
    assert memory["weights_bytes"] == num_bytes
    assert memory["cache_bytes_per_token"] == 2 * 4 * 2 * 64 * 2  # keys and values, layers, heads, features, bytes
    assert memory["cache_bytes_per_sequence"] == 2048 * 512  # whole pages
    assert memory["total_bytes"] == num_bytes + 3 * 2048 * 512
    two = pack(model, "vllm", "--no-answers", "--tp", "2", "--kv-dtype", "fp8", "--overwrite")["memory"]
    norms = sum(t.nbytes for name, t in tensors.items() if t.ndim == 1)
    assert two["weights_bytes"] == (num_bytes - norms) // 2 + norms
    assert two["cache_bytes_per_token"] == 2048 // 4


def test_gpu_that_is_too_small(model: Path, pack: Pack, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = refused(capsys, model, "--for", "vllm", "--no-answers", "--gpu-memory", "8MB")
    assert code == 3
    assert "weights take 0.01 GB" in message
    assert not Path(f"{model}-vllm").exists()
    document = pack(model, "vllm", "--no-answers", "--gpu-memory", "20MB", "--concurrency", "1000")
    fits = document["memory"]["fitting_sequences"]
    assert 0 < fits < 1000
    assert any(f"{fits} sequences of 1024 tokens fit" in warning for warning in document["warnings"])


def test_answers_are_a_sure_beginning_of_what_transformers_generates(model: Path, pack: Pack, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join([*PLAIN_PROMPTS[:3], "He went into the"]) + "\n")
    document = pack(model, "vllm", "--prompts", str(prompts))
    cases = json.loads((Path(document["folder"]) / "smoke.json").read_text())["cases"]
    assert document["answers"] == sum(bool(case["expected"]) for case in cases) > 0
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    for case in cases:
        ids = tokenizer(case["prompt"], return_tensors="pt").input_ids
        made = reference.generate(
            ids, max_new_tokens=16, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        new = made.sequences[0, ids.shape[1] :]
        sure = 0
        for logits in made.logits:
            best = torch.log_softmax(logits[0].float(), -1).topk(2).values
            if best[0] - best[1] < MARGIN:
                break
            sure += 1
        assert tokenizer.decode(new[:sure]) == case["expected"]


def test_expected_text_of_rounded_inputs_is_of_the_rounded_model(
    pack: Pack, tmp_path_factory: pytest.TempPathFactory, tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    folder = made(tmp_path_factory, tiny_nf4, tiny_adapter, Variant("int8", "int8", 8))
    document = pack(folder, "vllm", "-o", str(tmp_path / "out"))
    assert document["layout"] == "int-quantized"
    assert document["verdict"] == "not gated"


# The smoke test

FORMS: dict[str, Callable[[str], Any]] = {
    "/v1/completions": lambda text: {"id": "x", "choices": [{"index": 0, "text": text}]},
    "/generate": lambda text: {"generated_text": text},
    "/api/generate": lambda text: {"model": "tiny", "response": text, "done": True},
    "/v2/models/tiny/generate": lambda text: {"model_name": "tiny", "model_version": "1", "text_output": text},
}


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, Any]]]:
    """A server that answers with what it is told to, and keeps what it was asked."""
    state: dict[str, Any] = {"answers": {}, "asked": [], "ready": "/health"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == state["ready"] else 404)
            self.end_headers()

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state["asked"].append((self.path, body))
            prompt = body.get("prompt") or body.get("inputs") or body.get("text_input")
            text = state["answers"].get(prompt)
            self.send_response(500 if text is None else 200)
            self.end_headers()
            self.wfile.write(b"broken" if text is None else json.dumps(FORMS[self.path](text)).encode())

        def log_message(self, *_: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}", state
    running.shutdown()
    thread.join()
    running.server_close()


def smoke(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """As an operator runs it: with the bare interpreter, without this project or its packages."""
    return subprocess.run(
        [sys.executable, "-I", "-S", str(folder / "smoke_test.py"), *words], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("engine", OF_SAFETENSORS)
def test_smoke_test_tells_right_from_wrong(
    engine: str, model: Path, pack: Pack, server: tuple[str, dict[str, Any]]
) -> None:
    url, state = server
    state["ready"] = ENGINES[engine].ready
    document = pack(model, engine, "--name", "tiny")
    folder = Path(document["folder"])
    cases = json.loads((folder / "smoke.json").read_text())["cases"]
    assert document["answers"] > 0
    state["answers"] = {case["prompt"]: case["expected"] + " and more" for case in cases}
    passed = smoke(folder, "--url", url)
    assert passed.returncode == 0, passed.stdout + passed.stderr
    assert passed.stdout.count(": ok") == len(cases)
    for _, body in state["asked"]:
        text = json.dumps(body)
        assert '"temperature": 0' in text or '"do_sample": false' in text
    # A server that repeats the question, or drops the space before the first word, is right as well.
    state["answers"] = {case["prompt"]: case["prompt"] + case["expected"].lstrip() for case in cases}
    assert smoke(folder, "--url", url).returncode == 0
    state["answers"][cases[0]["prompt"]] = "xyzzy"
    wrong = smoke(folder, "--url", url)
    assert wrong.returncode == 1
    assert "WRONG: expected it to begin with" in wrong.stdout
    state["answers"][cases[0]["prompt"]] = ""
    assert "the answer is empty" in smoke(folder, "--url", url).stdout
    state["answers"][cases[0]["prompt"]] = None
    broken = smoke(folder, "--url", url)
    assert broken.returncode == 1
    assert "500" in broken.stdout
    assert "broken" in broken.stdout


def test_smoke_test_without_a_server(model: Path, pack: Pack) -> None:
    folder = Path(pack(model, "vllm", "--no-answers", "--port", "9")["folder"])
    down = smoke(folder)
    assert down.returncode == 2
    assert "http://127.0.0.1:9/health: no answer" in down.stdout
    assert "Traceback" not in down.stderr


def test_unrecorded_answers_pass_when_there_is_one(model: Path, pack: Pack, server: tuple[str, dict[str, Any]]) -> None:
    url, state = server
    folder = Path(pack(model, "vllm", "--no-answers")["folder"])
    (case,) = json.loads((folder / "smoke.json").read_text())["cases"]
    state["answers"] = {case["prompt"]: "anything"}
    assert smoke(folder, "--url", url).returncode == 0
    state["answers"] = {case["prompt"]: " "}
    assert smoke(folder, "--url", url).returncode == 1


# Adapters


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    pytest.importorskip("peft")
    save_random_adapter(TINY_LLAMA, tmp_path / "lora", base_name="base")
    return tmp_path / "lora"


def test_adapters_are_served_beside_the_model(
    model: Path, lora: Path, pack: Pack, server: tuple[str, dict[str, Any]]
) -> None:
    url, state = server
    document = pack(model, "vllm", "--adapter", str(lora), "--adapter", f"other={lora}")
    assert [adapter["name"] for adapter in document["adapters"]] == ["lora", "other"]
    assert [adapter["rank"] for adapter in document["adapters"]] == [8, 8]
    size = sum(file.stat().st_size for file in lora.glob("*.safetensors"))
    assert 2 * size * 0.9 < document["memory"]["adapters_bytes"] < 2 * size
    cases = json.loads((Path(document["folder"]) / "smoke.json").read_text())["cases"]
    assert {case["model"] for case in cases} == {"my-model", "lora", "other"}
    state["answers"] = {case["prompt"]: case["expected"] or "anything" for case in cases}
    smoke(Path(document["folder"]), "--url", url)
    assert {body["model"] for _, body in state["asked"]} == {"my-model", "lora", "other"}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"use_rslora": True}, "use_rslora"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"bias": "all"}, "bias"),
        ({"use_dora": True}, "use_dora"),
    ],
)
def test_adapters_that_engines_misread_are_refused(
    change: dict[str, Any], word: str, model: Path, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_config(lora, **change)
    code, message = refused(capsys, model, "--for", "vllm", "--adapter", lora, "--no-answers")
    assert code == 3
    assert word in message
    assert "--to lora" in message


def test_adapter_of_another_rounding_is_told(model: Path, lora: Path, pack: Pack) -> None:
    record = {"format": 1, "trained_on": "nf4-dq", "base": "org/base", "backend": "cpu"}
    (lora / "qconv-train.json").write_text(json.dumps(record))
    document = pack(model, "vllm", "--adapter", str(lora), "--no-answers")
    assert any("corrects a base that was rounded to nf4-dq" in warning for warning in document["warnings"])


def test_adapter_in_the_models_place(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = refused(capsys, lora, "--for", "lorax")
    assert code == 2
    assert f"--adapter {lora}" in message


# Refusals


@pytest.mark.parametrize(("engine", "word"), [("ollama", "GGUF"), ("ort-genai", "--requant onnx-int4")])
def test_engines_of_other_containers(engine: str, word: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = refused(capsys, model, "--for", engine)
    assert code == 3
    assert word in message
    assert "safetensors (plain)" in message


# GGUF files


@pytest.fixture
def gguf(model: Path, tmp_path: Path) -> Path:
    main(["convert", str(model), "--to", "gguf-q8_0", "-q", "-o", str(tmp_path / "as gguf")])
    return tmp_path / "as gguf"


def test_ollama_gets_a_modelfile_and_the_lines(
    gguf: Path, tmp_path: Path, pack: Pack, server: tuple[str, dict[str, Any]]
) -> None:
    document = pack(gguf, "ollama", "--context", "512", "--concurrency", "2", "--name", "tiny")
    folder, file = Path(document["folder"]), gguf / "model-Q8_0.gguf"
    beside = (gguf / "Modelfile").read_text().splitlines()
    assert (folder / "Modelfile").read_text().splitlines() == [
        f"FROM {file}", *beside[1:], "PARAMETER num_ctx 512"
    ]  # fmt: skip
    assert document["launch"] == ["ollama", "create", "tiny", "-f", "./Modelfile"]
    binary = tmp_path / "bin" / "ollama"
    binary.parent.mkdir()
    binary.write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"\n')
    binary.chmod(0o755)
    environment = {**os.environ, "PATH": f"{binary.parent}:{os.environ['PATH']}"}
    said = subprocess.run([folder / "launch.sh"], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.splitlines() == [str(folder), *document["launch"][1:]]
    page = (folder / "README.md").read_text()
    assert (
        "    OLLAMA_NUM_PARALLEL=2 ollama serve    # where no server runs yet\n    ./launch.sh\n    ollama run tiny"
        in page
    )
    assert "of a GPU by itself" not in page
    memory = document["memory"]
    assert memory["cache_bytes_per_token"] == 2 * 4 * 2 * 64 * 2  # keys and values, layers, heads, features, float16
    assert memory["cache_bytes"] == 2 * 512 * memory["cache_bytes_per_token"]
    assert 0 < file.stat().st_size - memory["weights_bytes"] < 200_000  # the rest is tokenizer and names
    url, state = server
    state["ready"] = "/api/version"
    cases = json.loads((folder / "smoke.json").read_text())["cases"]
    assert document["answers"] > 0
    state["answers"] = {case["prompt"]: case["expected"] for case in cases}
    assert smoke(folder, "--url", url).returncode == 0
    assert state["asked"][0] == (
        "/api/generate",
        {
            "model": "tiny",
            "prompt": cases[0]["prompt"],
            "raw": True,
            "stream": False,
            "options": {"temperature": 0, "repeat_penalty": 1.0, "num_predict": 16},
        },
    )
    state["answers"][cases[0]["prompt"]] = "xyzzy"
    assert smoke(folder, "--url", url).returncode == 1


def test_a_gguf_file_alone(gguf: Path, tmp_path: Path, pack: Pack) -> None:
    """No tokenizer and no Modelfile lie beside it: nothing to record answers with, and Ollama goes by the file."""
    file = Path(shutil.copy(gguf / "model-Q8_0.gguf", tmp_path / "alone.gguf"))
    document = pack(file, "ollama", "--port", "12000")
    folder = Path(document["folder"])
    assert folder == tmp_path / "alone.gguf-ollama"
    assert document["name"] == "alone"
    assert document["no answers because"] == "no tokenizer lies beside a GGUF file alone"
    assert (folder / "Modelfile").read_text() == f"FROM {file}\nPARAMETER num_ctx 1024\n"
    assert document["launch"][:3] == ["env", "OLLAMA_HOST=127.0.0.1:12000", "ollama"]
    assert "OLLAMA_HOST=127.0.0.1:12000 ollama serve" in (folder / "README.md").read_text()
    assert any("no TEMPLATE was at hand" in note for note in document["notes"])
    path = pack(gguf, "ollama", "--model-path", "/models/m.gguf", "--no-answers")
    assert (Path(path["folder"]) / "Modelfile").read_text().startswith("FROM /models/m.gguf\n")


@pytest.mark.parametrize(
    ("engine", "words", "message"),
    [
        ("vllm", (), "which Ollama takes: --for ollama"),
        ("ollama", ("--tp", "2"), "drop --tp"),
        ("ollama", ("--kv-dtype", "fp8"), "drop --kv-dtype"),
    ],
)
def test_what_gguf_files_are_not_packed_for(
    engine: str, words: tuple[str, ...], message: str, gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = refused(capsys, gguf, "--for", engine, *words)
    assert code == 3
    assert message in said


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--for", "vllm", "--context", "2000"], 2, "positions for 1024 tokens"),
        (["--for", "vllm", "--name", "a/b"], 2, "--name"),
        (["--for", "vllm", "--port", "70000"], 2, "--port"),
        (["--for", "vllm", "--concurrency", "0"], 2, "--concurrency"),
        (["--for", "vllm", "--tp", "3"], 3, "4 attention heads are no multiple of 3"),
        (["--for", "vllm", "--prompts", "x.txt", "--no-answers"], 2, "--prompts"),
        (["--for", "vllm", "--adapter", "a=./x", "--adapter", "a=./y"], 2, "two adapters are called a"),
        (["--for", "vlm"], 2, "did you mean vllm"),
    ],
)
def test_wrong_options(
    words: list[str], code: int, message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, said = refused(capsys, model, *words)
    assert (found, message in said) == (code, True), said


def test_only_a_pack_is_replaced(model: Path, pack: Pack, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(pack(model, "vllm", "--no-answers")["folder"])
    assert "exists already" in refused(capsys, model, "--for", "vllm", "--no-answers")[1]
    pack(model, "vllm", "--no-answers", "--overwrite")
    (folder / "qconv-pack.json").unlink()
    assert "has files but no config.json" in refused(capsys, model, "--for", "vllm", "--overwrite")[1]
    (folder / "config.json").write_text("{}")  # somebody's model, which merge would replace
    assert "holds no pack of qconv's" in refused(capsys, model, "--for", "vllm", "--overwrite")[1]
    assert (folder / "config.json").exists()
    assert refused(capsys, model, "--for", "vllm", "--no-answers", "-o", model, "--overwrite")[0] == 3


def test_a_folder_without_a_tokenizer_is_told(model: Path, pack: Pack, capsys: pytest.CaptureFixture[str]) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    code, message = refused(capsys, model, "--for", "vllm")
    assert (code, "has no tokenizer" in message, "--no-answers" in message) == (3, True, True)
    assert any("no tokenizer lies beside" in warning for warning in pack(model, "vllm", "--no-answers")["warnings"])


def test_folder_that_missed_its_gates_is_told(model: Path, pack: Pack) -> None:
    (model / "qconv-report.json").write_text('{"verdict": "fail"}')
    document = pack(model, "vllm", "--no-answers")
    assert document["verdict"] == "fail"
    assert any("did not pass its gates" in warning for warning in document["warnings"])
    assert "did not pass its gates" in (Path(document["folder"]) / "README.md").read_text()


def test_static_float8_for_tensorrt_llm_is_a_folder_of_links(
    pack: Pack, tmp_path_factory: pytest.TempPathFactory, tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    variant = Variant("fp8", "fp8", 8, activations="static")
    folder = made(tmp_path_factory, tiny_nf4, tiny_adapter, variant)
    document = pack(folder, "trtllm", "-o", str(tmp_path / "out"), "--no-answers")
    linked = Path(document["folder"]) / "model"
    names = {file.name for file in folder.iterdir() if file.is_file()}
    assert {file.name for file in linked.iterdir()} == {*names, "hf_quant_config.json"}
    assert all((linked / name).is_symlink() and (linked / name).samefile(folder / name) for name in names)
    # What ModelOpt calls FP8: one scale of the weight and one of the inputs, under these names.
    tensors = load_file(linked / "model.safetensors")
    excluded = json.loads((linked / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    scaled = {name.removesuffix(".input_scale") for name in tensors if name.endswith(".input_scale")}
    assert len(scaled) == 28
    assert all(tensors[f"{module}.weight_scale"].numel() == 1 for module in scaled)
    assert scaled.isdisjoint(excluded)
    assert "lm_head" in excluded


def test_a_model_of_the_hub_is_packed_here_and_called_by_its_name(
    model: Path, tmp_path: Path, pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub" / "snapshots" / "0123abcd"
    shutil.copytree(model, cache)
    monkeypatch.setattr("qconv.checkpoint.resolve_folder", lambda *_: cache)
    monkeypatch.chdir(tmp_path)
    document = pack(Path("org/tiny"), "vllm", "--no-answers")
    assert (document["folder"], document["name"]) == (str(tmp_path / "tiny-vllm"), "tiny")
    assert document["model"] == str(cache)
    assert sorted(cache.parent.iterdir()) == [cache]


@pytest.mark.parametrize(("variant", "loads"), [(Variant("fp8", "fp8", 8), True), (Variant("int8", "int8", 8), False)])
def test_tensorrt_llm_would_take_int8_for_float8(
    variant: Variant,
    loads: bool,
    pack: Pack,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_nf4: Path,
    tiny_adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its reader asks for what is asserted here, and not for the type: both look the same to it, and one is refused."""
    folder = made(tmp_path_factory, tiny_nf4, tiny_adapter, variant)
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    (group,) = quantization["config_groups"].values()
    assert group["weights"]["num_bits"] == 8
    assert (group["weights"]["strategy"], group["input_activations"]["strategy"]) == ("channel", "token")
    assert group["weights"]["type"] == ("float" if loads else "int")
    if loads:
        document = pack(folder, "trtllm", "-o", str(tmp_path / "out"), "--no-answers")
        assert document["launch"][1] == str(folder)
    else:
        code, message = refused(capsys, folder, "--for", "trtllm", "-o", tmp_path / "out")
        assert code == 3
        assert "8-bit integers for float8" in message


def test_a_model_that_cannot_be_run_is_packed_without_answers(
    model: Path, pack: Pack, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "tokenizer.json").unlink()
    code, message = refused(capsys, model, "--for", "vllm")
    assert code == 3
    assert "has no tokenizer" in message
    assert "--no-answers packs it without" in message
    assert not Path(f"{model}-vllm").exists()
    assert pack(model, "vllm", "--no-answers")["answers"] == 0
