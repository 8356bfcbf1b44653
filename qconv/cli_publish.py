"""``--push-to-hub``: what is checked before the work, and what an answer says of the push."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qconv.cli_answers import Answer
from qconv.errors import GateError, GateInconclusiveError, HubError, UsageError
from qconv.progress import Progress

if TYPE_CHECKING:
    from qconv.publish import PushConfig


def push_config(options: dict[str, Any], outs: Sequence[Path]) -> PushConfig | None:
    """What was asked for, checked with the hub; None where nothing was.

    Raises:
        UsageError: options without --push-to-hub, or no repository's name.
        HubError: the push could only fail.
    """
    if options["push_to_hub"] is None:
        given = [f"--{name.replace('_', '-')}" for name in ("public", "push_rejected") if options[name]]
        if given:
            raise UsageError(f"{', '.join(given)} belongs to --push-to-hub")
        return None
    from qconv.publish import PushConfig, check_hub

    config = PushConfig(repo=options["push_to_hub"], public=options["public"], rejected=options["push_rejected"])
    check_hub(config, [config.repo_of(out, len(outs)) for out in outs])
    return config


def refuse_push(options: dict[str, Any], what: str) -> None:
    """Raises `UsageError` where a push was asked for of what is not pushed."""
    names = ("push_to_hub", "public", "push_rejected")
    given = [f"--{name.replace('_', '-')}" for name in names if options[name]]
    if given:
        raise UsageError(f"{', '.join(given)} is not for {what}, which is no product yet; drop it")


def pushed(answer: Answer, config: PushConfig | None, out: Path, num_outputs: int, progress: Progress) -> Answer:
    """Pushes the folder that an answer is about, and says so in it; why it could not be is the answer's failure."""
    if config is None:
        return answer
    folder, repo = Path(answer.document["folder"]), config.repo_of(out, num_outputs)
    if isinstance(answer.failure, GateError | GateInconclusiveError) and not config.rejected:
        text = f"{answer.text}\n{'not pushed':<11} its gates did not pass; --push-rejected pushes it all the same"
        return replace(answer, text=text, document={**answer.document, "pushed": None})
    from qconv.publish import push

    progress.say(f"pushing {folder} to {repo}")
    try:
        found = push(folder, repo, config)
    except HubError as error:
        by_hand = shlex.join(["hf", "upload", repo, str(folder), "."])
        told = type(error)(f"{error}. {folder} is complete; {by_hand} pushes it")
        text = f"{answer.text}\n{'not pushed':<11} {repo}"
        return replace(answer, text=text, document={**answer.document, "pushed": None}, failure=answer.failure or told)
    document = {"repo": found.repo, "url": found.url, "commit": found.commit, "private": found.private}
    text = f"{answer.text}\n{'pushed':<11} {found.url} ({'private' if found.private else 'public'})"
    return replace(answer, text=text, document={**answer.document, "pushed": document})
