"""``--push-to-hub``: what is pushed, what is not, and what is said when it cannot be.

Most tests replace `huggingface_hub.HfApi` by a hub in memory; one lets the real client talk HTTP to a hub in this
process, in a process of its own, since tests forbid the network to themselves.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import errors as hub_errors

from qconv.cli import main
from qconv.cli_answers import Answer, together
from qconv.errors import GateError, GateInconclusiveError, HubAccessError, HubError, UsageError
from qconv.publish import PushConfig, check_hub
from tests.conftest import TINY_LLAMA, save_random_adapter

WHO = {"name": "ada", "orgs": [{"name": "acme", "roleInOrg": "write"}, {"name": "look", "roleInOrg": "read"}]}


def http_error(status: int, kind: type[Any] = hub_errors.HfHubHTTPError) -> Exception:
    request = SimpleNamespace(method="POST", url="https://hub/api")
    response = SimpleNamespace(status_code=status, headers={}, request=request)
    error: Exception = kind(f"{status} for url", response=response, server_message="the hub's own words")
    return error


@dataclass
class Hub:
    """What `HfApi` is asked, and a hub behind it."""

    who: dict[str, Any] = field(default_factory=lambda: dict(WHO))
    repos: dict[str, bool] = field(default_factory=dict)  # whether each is private
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    deletes: list[str] = field(default_factory=list)
    failing: dict[str, Exception] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    endpoint: str = "https://hub"

    def _ask(self, name: str) -> None:
        self.asked.append(name)
        if name in self.failing:
            raise self.failing[name]

    def whoami(self) -> dict[str, Any]:
        self._ask("whoami")
        return self.who

    def repo_info(self, repo_id: str) -> Any:
        self._ask("repo_info")
        if repo_id not in self.repos:
            raise http_error(404, hub_errors.RepositoryNotFoundError)
        return SimpleNamespace(private=self.repos[repo_id])

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self._ask("create_repo")
        assert exist_ok
        self.repos.setdefault(repo_id, private)

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str, delete_patterns: list[str]) -> Any:
        self._ask("upload_folder")
        self.deletes = delete_patterns
        self.files[repo_id] = {f.name: f.read_bytes() for f in Path(folder_path).iterdir()}
        return SimpleNamespace(oid="c0ffee")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    return made


@dataclass(frozen=True)
class Result:
    code: int
    document: dict[str, Any]
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def go(*words: str | Path) -> Result:
        capsys.readouterr()
        code: Any = 0
        try:
            main([*map(str, words), "--device", "cpu", "--json"])
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return Result(code, json.loads(said.out), said.err)

    return go


def convert(out: Path) -> list[str | Path]:
    return ["convert", TINY_LLAMA, "--to", "bf16", "-o", out, "--push-to-hub"]


def test_a_folder_goes_up_whole_and_private(hub: Hub, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(*convert(out), "acme/tiny")
    assert result.code == 0, result
    assert result.document["pushed"] == {
        "repo": "acme/tiny",
        "url": "https://hub/acme/tiny",
        "commit": "c0ffee",
        "private": True,
    }
    assert hub.repos == {"acme/tiny": True}
    assert hub.files["acme/tiny"] == {file.name: file.read_bytes() for file in out.iterdir()}
    assert "*.safetensors" in hub.deletes
    assert hub.asked[:2] == ["whoami", "repo_info"]  # before the work


def test_the_card_carries_lineage_and_fidelity(
    hub: Hub, run: Run, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    words = ["--eval-tokens", "512", "--eval-seq-len", "64", "--control-tokens", "512", "--no-default-gates"]
    result = run("merge", tiny_nf4, tiny_adapter, "-o", tmp_path / "out", "--push-to-hub", "ada/tiny", *words)
    assert result.code == 0, result
    card = hub.files["ada/tiny"]["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert "qconv" in front["tags"]
    assert str(tiny_adapter) in card
    kl = result.document["fidelity"]["total"]["kl"]["mean"]
    assert f"{kl:.2g}"[:4] in card
    assert "KL divergence, mean" in card
    assert "qconv-report.json" in hub.files["ada/tiny"]


def failing_merge(tiny_nf4: Path, tiny_adapter: Path, out: Path) -> list[str | Path]:
    gate = ["--eval-tokens", "512", "--eval-seq-len", "64", "--control-tokens", "512", "--gate", "kl_mean<=0"]
    return ["merge", tiny_nf4, tiny_adapter, "-o", out, "--no-default-gates", "--attribution", "never", *gate]


def test_what_missed_its_gate_is_not_pushed(
    hub: Hub, run: Run, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    words = [*failing_merge(tiny_nf4, tiny_adapter, tmp_path / "out"), "--push-to-hub", "ada/tiny"]
    result = run(*words)
    assert result.code == 4
    assert result.document["pushed"] is None
    assert hub.files == {}
    assert "upload_folder" not in hub.asked
    again = run(*words, "--push-rejected", "--overwrite")
    assert again.code == 4  # it did not pass all the same
    assert again.document["pushed"]["repo"] == "ada/tiny"
    assert "**FAIL" in hub.files["ada/tiny"]["README.md"].decode().upper()


def test_several_outputs_have_a_repository_each(hub: Hub, run: Run, tmp_path: Path) -> None:
    words = ["quantize", TINY_LLAMA, "--to", "w4a16", "--to", "fp8", "--no-validate", "-o", tmp_path / "out"]
    result = run(*words, "--algorithm", "rtn", "--push-to-hub", "ada/tiny", "--public")
    assert result.code == 0, result
    assert [part["pushed"]["repo"] for part in result.document["outputs"]] == ["ada/tiny-w4a16", "ada/tiny-fp8"]
    assert hub.repos == {"ada/tiny-w4a16": False, "ada/tiny-fp8": False}


def test_an_adapter_has_a_card_too(hub: Hub, run: Run, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    save_random_adapter(TINY_LLAMA, tmp_path / "lora", base_name="org/base")
    result = run("convert", tmp_path / "lora", "--to", "lora", "-o", tmp_path / "out", "--push-to-hub", "ada/lora")
    assert result.code == 0, result
    card = hub.files["ada/lora"]["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["library_name"], front["base_model"], front["base_model_relation"]) == (
        "peft",
        ["org/base"],
        "adapter",
    )
    assert "--max-lora-rank 8" in card


# Refused before the work

NO_TOKEN = hub_errors.LocalTokenNotFoundError("no token")


@pytest.mark.parametrize(
    ("repo", "change", "words"),
    [
        ("ada/x", {"failing": {"whoami": NO_TOKEN}}, ["no token", "hf auth login"]),
        ("ada/x", {"failing": {"whoami": http_error(401)}}, ["does not know the token", "the hub's own words"]),
        ("ada/x", {"who": {**WHO, "auth": {"accessToken": {"role": "read"}}}}, ["may only read", "write access"]),
        ("other/x", {}, ["may write to ada, acme, look, and not to other"]),
        ("look/x", {}, ["ada may only read in look"]),
        ("ada/x", {"repos": {"ada/x": False}}, ["exists and is public", "--public"]),
    ],
)
def test_pushes_that_could_only_fail_are_refused_before_the_work(
    repo: str, change: dict[str, Any], words: list[str], hub: Hub, run: Run, tmp_path: Path
) -> None:
    for name, value in change.items():
        setattr(hub, name, value)
    result = run(*convert(tmp_path / "out"), repo)
    assert result.code == 3
    assert result.document["error"]["kind"] == "HubAccessError"
    for word in words:
        assert word in result.document["error"]["message"], result.document
    assert not (tmp_path / "out").exists()
    assert "upload_folder" not in hub.asked


def test_a_public_repository_is_taken_when_it_is_meant(hub: Hub, run: Run, tmp_path: Path) -> None:
    hub.repos = {"ada/x": False}
    assert run(*convert(tmp_path / "out"), "ada/x", "--public").document["pushed"]["private"] is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--push-to-hub", "tiny"], "org/name"),
        (["--push-to-hub", "../x/y"], "org/name"),
        (["--public"], "--public belongs to --push-to-hub"),
        (["--push-rejected"], "--push-rejected belongs to --push-to-hub"),
    ],
)
def test_impossible_pushes(words: list[str], message: str, hub: Hub, run: Run, tmp_path: Path) -> None:
    result = run("convert", TINY_LLAMA, "--to", "bf16", "-o", tmp_path / "out", *words)
    assert result.code == 2
    assert message in result.document["error"]["message"]
    assert hub.asked == []


def test_what_was_only_unpickled_is_not_pushed(hub: Hub, run: Run, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    words = ["convert", tmp_path / "adapter", "--to", "safetensors", "-o", tmp_path / "out"]
    result = run(*words, "--push-to-hub", "ada/x")
    assert (result.code, hub.asked) == (2, [])
    assert "--push-to-hub is not for --to safetensors" in result.document["error"]["message"]


def no_network(_: Any) -> None:
    raise OSError("no route to host")


def test_offline_and_without_a_token_the_real_client_is_understood(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = PushConfig(repo="ada/x")
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: "hf_something")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        check_hub(config, ["ada/x"])
    with monkeypatch.context() as patched:
        patched.setattr(huggingface_hub.HfApi, "whoami", no_network)
        with pytest.raises(HubError, match=r"cannot be reached .*no route.*; nothing was done yet"):
            check_hub(config, ["ada/x"])
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    with pytest.raises(HubAccessError, match="there is no token"):
        check_hub(config, ["ada/x"])


def test_names_that_the_hub_does_not_take(hub: Hub) -> None:
    hub.failing["repo_info"] = hub_errors.HFValidationError("Repo id must not end in .git")
    with pytest.raises(UsageError, match=r"must not end in \.git"):
        check_hub(PushConfig(repo="ada/x.git"), ["ada/x.git"])


# What goes wrong after the work


@pytest.mark.parametrize(
    ("step", "error", "code", "kind"),
    [
        ("create_repo", http_error(403), 3, "may not write there"),
        ("upload_folder", http_error(403), 3, "may not write there"),
        ("upload_folder", http_error(503), 1, "answered 503"),
        ("upload_folder", ConnectionError("no route to host"), 1, "cannot be reached"),
        ("upload_folder", hub_errors.HfHubHTTPError.__mro__[1]("timed out"), 1, "timed out"),
        ("upload_folder", RuntimeError("Data processing error: CAS service error"), 1, "CAS service"),
    ],
)
def test_a_push_that_fails_leaves_the_folder_and_says_how_to_go_on(
    step: str, error: Exception, code: int, kind: str, hub: Hub, run: Run, tmp_path: Path
) -> None:
    hub.failing[step] = error
    out = tmp_path / "out"
    result = run(*convert(out), "ada/x")
    assert result.code == result.document["exit_code"] == code
    assert result.document["pushed"] is None
    assert result.document["folder"] == str(out)
    assert (out / "model.safetensors").is_file()
    assert kind in result.err
    assert f"hf upload ada/x {out} ." in result.err
    assert "Traceback" not in result.err


def test_a_missed_gate_counts_before_a_push_that_fails(
    hub: Hub, run: Run, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    hub.failing["upload_folder"] = http_error(503)
    words = failing_merge(tiny_nf4, tiny_adapter, tmp_path / "out")
    assert run(*words, "--push-to-hub", "ada/x", "--push-rejected").code == 4


def test_of_several_outputs_a_missed_gate_counts_before_a_push_that_fails() -> None:
    parts = [
        Answer(text="a", document={}, failure=HubError("down")),
        Answer(text="b", document={}, failure=GateInconclusiveError("unsure")),
        Answer(text="c", document={}, failure=GateError("missed")),
    ]
    assert isinstance(together(parts).failure, GateError)
    assert isinstance(together(parts[:2]).failure, GateInconclusiveError)
    assert isinstance(together(parts[:1] * 2).failure, HubError)


# The real client, over HTTP


@pytest.fixture
def http_hub() -> Iterator[tuple[str, dict[str, Any]]]:
    """As much of the hub's interface as a push needs, with the old way of large files (LFS)."""
    state: dict[str, Any] = {"files": {}, "objects": {}, "created": None, "seen": [], "deleted": []}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _say(self, status: int, body: Any, **headers: str) -> None:
            text = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self) -> None:
            state["seen"].append(f"GET {self.path}")
            if self.headers.get("Authorization") != "Bearer hf_fake":
                self._say(401, {"error": "Invalid username or password."})
            elif self.path.startswith("/api/whoami-v2"):
                self._say(200, {"name": "ada", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
            elif state["created"] is None:
                self._say(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            elif "/tree/" in self.path:
                self._say(200, [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in state["files"]])
            else:
                self._say(200, {"id": "ada/tiny", "private": is_private(state), "siblings": [], "sha": "0" * 40})

        def do_POST(self) -> None:
            state["seen"].append(f"POST {self.path}")
            data = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/api/repos/create":
                state["created"] = json.loads(data)
                self._say(200, {"url": f"{url}/ada/tiny"})
            elif "/preupload/" in self.path:
                files = json.loads(data)["files"]
                modes = {f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in files}
                found = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
                self._say(200, {"files": found})
            elif self.path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{url}/put/{o['oid']}"}}}
                    for o in json.loads(data)["objects"]
                ]
                self._say(200, {"transfer": "basic", "objects": objects})
            elif "/commit/" in self.path:
                for line in map(json.loads, data.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        state["files"][value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        state["files"][value["path"]] = state["objects"][value["oid"]]
                    elif line["key"] == "deletedFile":
                        state["deleted"].append(value["path"])
                        del state["files"][value["path"]]
                self._say(200, {"commitUrl": f"{url}/ada/tiny/commit/{'a' * 40}", "commitOid": "a" * 40})
            else:
                self._say(200, {"errors": [], "warnings": []})  # what it thinks of the card's front matter

        def do_PUT(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            assert hashlib.sha256(data).hexdigest() == self.path.rpartition("/")[2]
            state["objects"][hashlib.sha256(data).hexdigest()] = data
            self._say(200, {})

        def log_message(self, *_: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{running.server_port}"
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield url, state
    running.shutdown()
    running.server_close()


def is_private(state: dict[str, Any]) -> bool:
    """What `create_repo` asked for, in the words of older and newer releases of the client."""
    asked = state["created"]
    return bool(asked.get("private", asked.get("visibility") == "private"))


def push_for_real(url: str, out: Path, home: Path, token: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        "HF_ENDPOINT": url,
        "HF_TOKEN": token,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    words = ["convert", str(TINY_LLAMA), "--to", "bf16", "-o", str(out), "--device", "cpu", "--push-to-hub", "ada/tiny"]
    return subprocess.run(
        [sys.executable, "-m", "qconv", *words, "--json"], env=environment, capture_output=True, text=True, check=False
    )


EARLIER = [
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "model-Q4_0.gguf",
    "Modelfile",
    "model.onnx",
    "model.onnx.data",
    "genai_config.json",
    "adapter_config.json",
    "hf_quant_config.json",
]
"""Of models that were there before, in other formats: readers would take them for this one."""


def test_the_real_client_pushes_over_http(http_hub: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    url, state = http_hub
    state["files"] = dict.fromkeys([*EARLIER, "notes.txt"], b"earlier")
    done = push_for_real(url, tmp_path / "out", tmp_path / "home", "hf_fake")
    assert done.returncode == 0, done.stderr + "\n".join(state["seen"])
    assert json.loads(done.stdout)["pushed"] == {
        "repo": "ada/tiny",
        "url": f"{url}/ada/tiny",
        "commit": "a" * 40,
        "private": True,
    }
    assert is_private(state)
    here = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert state["files"] == here | {"notes.txt": b"earlier"}
    assert sum("/commit/" in line for line in state["seen"]) == 1  # all in one
    assert sorted(state["deleted"]) == sorted(EARLIER)
    refused = push_for_real(url, tmp_path / "other", tmp_path / "home", "hf_wrong")
    assert refused.returncode == 3
    assert "does not know the token" in refused.stderr
    assert not (tmp_path / "other").exists()
