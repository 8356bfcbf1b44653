"""Rows of data sets, as they are published for training, and the text that each is of.

Six shapes, each with the columns that make it; where a row has several, the first of the list counts:

* ``messages``: objects with ``role`` and ``content``. Rendered by the tokenizer's own chat template.
* ``conversations``: the same with ``from`` and ``value`` (ShareGPT).
* ``prompt`` and ``completion`` as lists of messages: one conversation, rendered.
* ``prompt`` and ``completion`` as strings: the one directly after the other (TRL documentation, "Dataset formats").
* ``text``: as it stands.
* ``instruction``, ``output`` and perhaps ``input``: the prompt of Stanford Alpaca (Taori et al. 2023,
  github.com/tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT), the output directly after it, as that training has it.

The order is TRL's where it has one: conversations before prompts before text. Data that has both
``text`` and Alpaca's columns has the finished prompt under ``text``.

Left out: columns beside these (LLaMA-Factory's ``system`` and ``history``, for one), content that is not a
string (images), and a template that writes today's date is not held still: the digest of the text then
differs from day to day.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MESSAGES = "messages"
SHAREGPT = "conversations"
CHAT_COMPLETION = "prompt and completion (messages)"
COMPLETION = "prompt and completion"
TEXT = "text"
ALPACA = "instruction and output"
_COLUMNS: dict[str, tuple[str, ...]] = {
    MESSAGES: ("messages",),
    SHAREGPT: ("conversations",),
    CHAT_COMPLETION: ("prompt", "completion"),
    COMPLETION: ("prompt", "completion"),
    TEXT: ("text",),
    ALPACA: ("instruction", "output"),
}
CHATS = (MESSAGES, SHAREGPT, CHAT_COMPLETION)
"""Shapes that need a chat template."""
COLUMNS = ("messages", "conversations", "prompt", "completion", "text", "instruction", "input", "output", "tools")
"""All that is ever read of a row."""
EXPECTED = "text; messages; conversations; prompt and completion; or instruction, input and output"

_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
}


class BadRowError(Exception):
    """A row that cannot be used.

    Attributes:
        reason: one of few, to count by.
        detail: what was found, and where in the row.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Document:
    """The text of one row.

    Attributes:
        text: what the model is shown.
        body: the row's own words, without those of a template, a fixed prompt or a system message. Rows of
            different data share those, which does not make them the same data.
    """

    text: str
    body: str


def common_shape(rows: Iterable[Any]) -> str | None:
    """The shape that most rows have (the first met of equally many); None when no row has one."""
    counts = Counter(shape for row in rows if (shape := _shape_of(row)) is not None)
    return counts.most_common(1)[0][0] if counts else None


def read_row(row: Any, shape: str | None, tokenizer: PreTrainedTokenizerBase | None) -> Document:
    """The text of a row.

    Args:
        row: an object as JSON has them; other values are bad rows, and so is an exception `BadRowError` in its place.
        shape: of the file, as `common_shape` finds it.
        tokenizer: with a chat template; used by `CHATS` alone.

    Raises:
        BadRowError: not an object, or columns that are missing, empty or of another type.
    """
    if isinstance(row, BadRowError):
        raise row
    if not isinstance(row, dict):
        raise BadRowError("not an object", f"expected an object, found {_name(row)}")
    if shape is None:
        found = ", ".join(map(str, row)) or "none"
        raise BadRowError("missing field", f"expected columns {EXPECTED}, found {found}")
    if shape in CHATS:
        document = _read_chat(row, shape, tokenizer)
    elif shape == COMPLETION:
        text = _string(row, "prompt") + _string(row, "completion")
        document = Document(text, text)
    elif shape == ALPACA:
        document = _read_alpaca(row)
    else:
        text = _string(row, "text")
        document = Document(text, text)
    try:
        document.text.encode()
        document.body.encode()
    except UnicodeEncodeError:
        detail = "the text has half of a surrogate pair, which no tokenizer takes"
        raise BadRowError("half of a surrogate pair", detail) from None
    return document


def one_line(error: BaseException) -> str:
    """What an error says, for use within a message."""
    return " ".join(str(error).split())


def _shape_of(row: Any) -> str | None:
    if not isinstance(row, dict):
        return None
    for shape, columns in _COLUMNS.items():
        if any(row.get(column) is None for column in columns):
            continue
        if shape != CHAT_COMPLETION or isinstance(row["prompt"], list):
            return shape
    return None


def _read_alpaca(row: dict[str, Any]) -> Document:
    instruction, output = _string(row, "instruction"), _string(row, "output")
    extra = "" if row.get("input") is None else _string(row, "input", may_be_empty=True)
    # Not by format strings: the columns may have braces.
    wording = _ALPACA_WITH_INPUT if extra.strip() else _ALPACA_WITHOUT_INPUT
    before, after = wording.split("{instruction}")
    prompt = before + instruction + after.replace("{input}", extra, 1)
    return Document(prompt + output, "\n\n".join(part for part in (instruction, extra, output) if part.strip()))


def _read_chat(row: dict[str, Any], shape: str, tokenizer: PreTrainedTokenizerBase | None) -> Document:
    if shape == CHAT_COMPLETION:
        messages = _messages(row, "prompt") + _messages(row, "completion")
    else:
        messages = _messages(row, "messages" if shape == MESSAGES else "conversations")
    tools = row.get("tools") or None
    if isinstance(tools, str):  # data sets store schemas as JSON, because a column has one type
        try:
            tools = json.loads(tools) or None
        except (ValueError, RecursionError) as error:
            raise BadRowError(
                "wrong type", f"tools: expected a list of objects, found broken JSON ({error})"
            ) from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRowError("wrong type", f"tools: expected a list of objects, found {_name(tools)}")
    assert tokenizer is not None  # the reader of the source has seen to it
    try:
        text = tokenizer.apply_chat_template(messages, tools=_without_nulls(tools), tokenize=False)
    except Exception as error:  # templates raise errors of their own, and whatever a missing field leads to
        raise BadRowError(
            "refused by the chat template", f"the chat template refuses the conversation ({error})"
        ) from error
    own = [message["content"] for message in messages if message["role"] != "system" and message["content"]]
    return Document(str(text), "\n\n".join(own))


def _messages(row: dict[str, Any], column: str) -> list[dict[str, Any]]:
    """Messages with ``role`` and ``content``, other fields as they are; ``from`` and ``value`` are renamed."""
    value = row.get(column)
    if value is None:
        raise BadRowError("missing field", f"{column}: expected a list of messages, found none")
    if not isinstance(value, list):
        reason = "NaN" if _is_nan(value) else "wrong type"
        raise BadRowError(reason, f"{column}: expected a list of messages, found {_name(value)}")
    if not value:
        raise BadRowError("empty field", f"{column}: expected messages, found an empty list")
    return [_message(message, f"{column}[{index}]") for index, message in enumerate(value)]


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRowError("wrong type", f"{where}: expected an object, found {_name(value)}")
    message = {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if "role" not in message and "from" in message:
        spoken = _string(message, "from", where)
        if spoken.lower() not in _ROLES:
            raise BadRowError("unknown role", f"{where}.from: expected {', '.join(_ROLES)}, found {spoken}")
        text = _string(message, "value", where, may_be_empty=_ROLES[spoken.lower()] == "system")
        return {"role": _ROLES[spoken.lower()], "content": text}
    role = _string(message, "role", where)
    if message.get("tool_calls") and message.get("content") is None:
        return {**message, "content": None}  # a call has no words; templates ask for the field
    _string(message, "content", where, may_be_empty=role == "system" or bool(message.get("tool_calls")))
    return message


def _string(row: dict[str, Any], column: str, where: str = "", may_be_empty: bool = False) -> str:
    name = f"{where}.{column}" if where else column
    value = row.get(column)
    if value is None:
        found = "null" if column in row else "none"
        raise BadRowError("missing field", f'expected a string under "{name}", found {found}')
    if not isinstance(value, str):
        reason = "NaN" if _is_nan(value) else "wrong type"
        raise BadRowError(reason, f'expected a string under "{name}", found {_name(value)}')
    if not may_be_empty and not value.strip():
        raise BadRowError("empty field", f'expected text under "{name}", found only white space')
    return value


def _without_nulls(value: Any) -> Any:
    """Without the nulls that tables fill absent fields of nested objects with."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _name(value: Any) -> str:
    return "NaN" if _is_nan(value) else type(value).__name__
