"""The Modelfile for ``ollama create``: the chat template of a tokenizer in Ollama's own language, where it can be told.

Sources: Ollama's `docs/modelfile.mdx`, `server/model.go` (`detectChatTemplate`) and `template/template.go`. Without a
TEMPLATE, Ollama compares the file's Jinja template with those that it knows and takes the nearest of less than 100
edits, which may be another one; where there is none, releases before 2026 send the bare prompt, and later ones let
llama.cpp run the file's own. So a template is written where a conversation is a row of turns, each some text, the
message and some text: found by rendering conversations, and taken only if the parts give further ones again.

Left out: tools, thinking, templates that treat a turn by its place; white space around a message, which some remove.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_S, _U, _V, _A, _B = "one system text", "a first question", "a second question", "an answer", "a second answer"
Messages = Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Turns:
    """A conversation as text.

    Attributes:
        head: before the first turn, where no system text is given.
        around: role -> what stands before and behind a message.
        answer: before what the model writes.
        stop: ends what the model writes, or empty.
    """

    head: str
    around: dict[str, tuple[str, str]]
    answer: str

    @property
    def stop(self) -> str:
        return self.around["assistant"][1].strip()

    def text(self, messages: Messages, asks: bool) -> str:
        has_system = any(role == "system" for role, _ in messages)
        turns = [self.around[role][0] + content + self.around[role][1] for role, content in messages]
        return ("" if has_system else self.head) + "".join(turns) + (self.answer if asks else "")


def turns_of(tokenizer: Any, adds_bos: bool) -> Turns | None:
    """Of a tokenizer of transformers; None where there is no template, or it is no row of turns.

    Args:
        adds_bos: whether llama.cpp puts the token before the text itself, so that a template must not.
    """
    bos = str(tokenizer.bos_token) if adds_bos and tokenizer.bos_token else ""

    def render(messages: Messages, asks: bool) -> str:
        rows = [{"role": role, "content": content} for role, content in messages]
        text = str(tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=asks))
        return text.removeprefix(bos)

    try:
        found = _parts(render)
        checks = [
            [("user", _V)],
            [("system", _S), ("user", _V), ("assistant", _B), ("user", _U)],
            [("user", _U), ("assistant", _A), ("user", _V), ("assistant", _B), ("user", _U)],
        ]
        alike = all(found.text(check, asks) == render(check, asks) for check in checks for asks in (True, False))
    except Exception:  # what a template raises for a conversation that it does not take has no common kind
        return None
    return found if alike and not _cannot_be_written(found) else None


def _parts(render: Callable[[Messages, bool], str]) -> Turns:
    """Raises `ValueError` where a message does not stand in the text as it is."""
    first, behind_user = _cut(render([("user", _U)], False), _U)
    _, to_answer, behind_answer = _cut(render([("user", _U), ("assistant", _A)], False), _U, _A)
    *_, back, _ = _cut(render([("user", _U), ("assistant", _A), ("user", _V)], False), _U, _A, _V)
    before_system, to_user, _ = _cut(render([("system", _S), ("user", _U)], False), _S, _U)
    _, asked = _cut(render([("user", _U)], True), _U)
    before_user = back.removeprefix(behind_answer)
    return Turns(
        head=first.removesuffix(before_user),
        around={
            "system": (before_system, to_user.removesuffix(before_user)),
            "user": (before_user, behind_user),
            "assistant": (to_answer.removeprefix(behind_user), behind_answer),
        },
        answer=asked.removeprefix(behind_user),
    )


def _cut(text: str, *marks: str) -> list[str]:
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise ValueError(f"{mark!r} is not in the text")
        parts.append(before)
    return [*parts, text]


def _cannot_be_written(turns: Turns) -> bool:
    texts = [turns.head, turns.answer, *(text for pair in turns.around.values() for text in pair)]
    return any(mark in text for text in texts for mark in ("{{", "}}", '"""')) or '"' in turns.stop


def model_file(file_name: str, turns: Turns | None) -> str:
    """The Modelfile of a GGUF file beside it."""
    lines = [f"FROM ./{file_name}"]
    if turns is not None:
        head = f"{{{{ if not .System }}}}{turns.head}{{{{ end }}}}" if turns.head else ""
        cases = "{{ else ".join(
            f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{behind}'
            for role, (before, behind) in turns.around.items()
        )
        body = f"{{{{ range .Messages }}}}{{{{ {cases}{{{{ end }}}}{{{{ end }}}}"
        lines.append(f'TEMPLATE """{head}{body}{turns.answer}"""')
        if turns.stop:
            lines.append(f'PARAMETER stop "{turns.stop}"')
    return "\n".join(lines) + "\n"
