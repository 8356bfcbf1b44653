"""Pushing a finished folder to the model hub: in one commit, so that nobody meets half of it; private unless asked.

What a push needs is checked before the work whose result it pushes: a token, the right to write, a repository that is
not public by surprise. Files of weights that a repository has and the folder has not are deleted in the same commit.
Source: https://huggingface.co/docs/huggingface_hub/guides/upload (``upload_folder``; what the hub has already is not
sent again).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconv import __version__
from qconv.config import HUB_ID
from qconv.errors import HubAccessError, HubError, UsageError

REPLACED = (
    *("*.safetensors", "*.safetensors.index.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json"),
    *("pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_config.json", "adapter_model.bin"),
    *("*.gguf", "*.imatrix", "Modelfile", "*.onnx", "*.onnx.data", "genai_config.json"),
)
"""What is left of an earlier model would be read together with the new one, or in its place."""
_TOKEN = "log in with `hf auth login`, or set HF_TOKEN to a token with write access"
_BEFORE = "nothing was done yet: try again when the hub can be reached, or without --push-to-hub and push later"
_AFTER = "nothing else is wrong with the folder: push it again when the hub can be reached"


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Where outputs go.

    Attributes:
        repo: ``org/name``; with several outputs each has its folder's name behind it.
        public: a new repository is public; without it a public one is refused.
        rejected: also what did not pass its gates.
    """

    repo: str
    public: bool = False
    rejected: bool = False

    def __post_init__(self) -> None:
        if HUB_ID.fullmatch(self.repo) is None:
            raise UsageError(f"--push-to-hub takes a repository such as org/name, got {self.repo!r}")

    def repo_of(self, folder: Path, num_outputs: int) -> str:
        return self.repo if num_outputs == 1 else f"{self.repo}-{folder.name}"


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """Attributes:
    url: of the repository.
    commit: that holds the folder.
    """

    repo: str
    url: str
    commit: str
    private: bool


def check_hub(config: PushConfig, repos: list[str]) -> None:
    """Refuses, before any work, a push that could only fail after it.

    Raises:
        HubAccessError: no token, one that cannot write there, or a public repository that nobody asked for.
        HubError: the hub cannot be reached.
    """
    with _explained(config.repo, _BEFORE):
        from huggingface_hub import HfApi

        api = HfApi()
        _check_rights(config.repo, api.whoami())
        for repo in repos:
            if not config.public and _is_public(api, repo):
                raise HubAccessError(
                    f"{repo}: exists and is public, and pushes are private unless --public says otherwise; pass it, or "
                    "name another repository"
                )


def push(folder: Path, repo: str, config: PushConfig) -> Pushed:
    """Uploads a complete folder as one commit; the repository is made where it does not exist.

    Raises:
        HubAccessError, HubError: as `check_hub`; nothing of the folder is in the repository then.
    """
    with _explained(repo, _AFTER):
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo, private=not config.public, exist_ok=True)
        private = bool(api.repo_info(repo).private)  # of one that was there already, as it is
        info = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=f"qconv {__version__}",
            delete_patterns=list(REPLACED),
        )
        return Pushed(repo=repo, url=f"{api.endpoint}/{repo}", commit=str(info.oid), private=private)


def _check_rights(repo: str, who: dict[str, Any]) -> None:
    """Goes by what the hub says of a token; what it does not say is left to the push."""
    owner = repo.partition("/")[0]
    if ((who.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise HubAccessError(f"{repo}: the token of {who.get('name')} may only read; {_TOKEN}")
    if owner == who.get("name"):
        return
    roles = {org.get("name"): org.get("roleInOrg") for org in who.get("orgs") or ()}
    if owner not in roles:
        known = ", ".join([str(who.get("name")), *map(str, roles)])
        raise HubAccessError(
            f"{repo}: the token of {who.get('name')} may write to {known}, and not to {owner}; {_TOKEN}"
        )
    if roles[owner] == "read":
        raise HubAccessError(f"{repo}: {who.get('name')} may only read in {owner}; ask its administrators for more")


def _is_public(api: Any, repo: str) -> bool:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return not api.repo_info(repo).private
    except RepositoryNotFoundError:
        return False


@contextmanager
def _explained(repo: str, when_unreached: str) -> Iterator[None]:
    """What goes wrong with the hub, as an error for users."""
    from huggingface_hub import errors

    transport: type[BaseException] = errors.HfHubHTTPError.__mro__[
        1
    ]  # of httpx, or of what has taken its place in newer releases
    try:
        yield
    except errors.LocalTokenNotFoundError as error:
        raise HubAccessError(f"{repo}: there is no token for the hub; {_TOKEN}") from error
    except errors.OfflineModeIsEnabled as error:
        raise HubError(f"{repo}: HF_HUB_OFFLINE is set, which forbids any push; unset it") from error
    except errors.HFValidationError as error:
        raise UsageError(f"--push-to-hub {repo}: {error}") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        said = error.server_message or str(error).splitlines()[0]
        if status == 401:
            raise HubAccessError(f"{repo}: the hub does not know the token ({said}); {_TOKEN}") from error
        if status in (403, 404):
            raise HubAccessError(f"{repo}: the token may not write there ({said}); {_TOKEN}") from error
        raise HubError(f"{repo}: the hub answered {status} ({said}); {when_unreached}") from error
    except (OSError, RuntimeError, transport) as error:
        raise HubError(
            f"{repo}: the hub cannot be reached ({type(error).__name__}: {error}); {when_unreached}"
        ) from error
