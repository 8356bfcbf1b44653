"""The keys of a GGUF file that hold the tokenizer.

Byte-level BPE: llama.cpp knows how to cut text before merging by a name, ``tokenizer.ggml.pre``. Its converter finds
the name by hashing what a tokenizer makes of a test text, which also depends on the vocabulary, so that it knows
published models alone. Here the name is found from the rule itself: the steps of the pre-tokenizer, with their regular
expressions, must be the ones that a name stands for, and so must be everything else that tokenization depends on.
Anything else is refused: a file whose text is cut otherwise answers worse, and says nothing.

BPE with byte fallback is SentencePiece's: see `sentencepiece`.

Left out: WordPiece, Unigram; byte-level BPE with a normalizer (but NFC, which llama.cpp leaves to the caller for
``qwen2``), with dropout, or with a prefix space.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qconv.errors import CheckpointError
from qconv.gguf.ollama import Turns, turns_of
from qconv.gguf.sentencepiece import BYTES, NotAlikeError, Pieces, pieces_of

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6
_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0  # as llama.cpp's converter has them; nothing is merged into these
_GPT2 = "gpt2"  # the expression that is built into ByteLevel
_DIGITS = "digits"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2 = _WORDS + r"\p{N}{1,3}" + _REST, _WORDS + r"\p{N}" + _REST


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """How text is cut before merging, and what else llama.cpp assumes with its name."""

    name: str
    steps: tuple[str, ...]
    ignores_merges: bool = False
    normalizers: tuple[str | None, ...] = (None,)


_CUTS = (
    _Cut(name="gpt-2", steps=(_GPT2,)),
    _Cut(name="smollm", steps=(_DIGITS, _GPT2)),
    _Cut(name="llama-bpe", steps=(_LLAMA3,), ignores_merges=True),
    _Cut(name="qwen2", steps=(_QWEN2,), normalizers=("NFC", None)),
)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What the keys say.

    Attributes:
        tokens: text of each token, in the byte alphabet of GPT-2 where it is no added one; SentencePiece's as it is.
        types: of each token, as ggml numbers them.
        merges: pairs with a blank between.
        cut: value of ``tokenizer.ggml.pre``.
        special: name -> token, for ``bos``, ``eos``, ``pad`` and ``unk`` where there are such.
        adds_bos, adds_eos: around a text.
        template: Jinja, or None.
        turns: what the template does, where it is as simple as that.
        scores: of SentencePiece's tokens, which have no merges; empty for others.
        adds_blank: before a text; of SentencePiece's alone.
        warning: what a user must know, or None.
    """

    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    cut: str
    special: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool
    template: str | None
    turns: Turns | None = None
    scores: Sequence[float] = field(default=())
    adds_blank: bool = False
    warning: str | None = None

    def add_to(self, writer: Any) -> None:
        """Puts the keys into a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model("llama" if self.scores else "gpt2")
        writer.add_tokenizer_pre(self.cut)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        if self.scores:
            writer.add_token_scores(list(self.scores))
            writer.add_add_space_prefix(self.adds_blank)
        else:
            writer.add_token_merges(list(self.merges))
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        if self.template is not None:
            writer.add_chat_template(self.template)


def vocabulary_of(tokenizer: Any, num_rows: int, location: str) -> Vocabulary:
    """The vocabulary of a tokenizer of transformers for an embedding with ``num_rows``.

    Raises:
        CheckpointError: llama.cpp would not tokenize alike, or that cannot be told.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal(location, "it has no tokenizer.json")
    content = json.loads(backend.to_str())
    model = content["model"]
    pieces = _pieces(content, model, location)
    cut = "default" if pieces is not None else _cut_of(content, model, location)
    tokens: dict[int, str] = {number: text for text, number in model["vocab"].items()}
    types = dict.fromkeys(tokens, NORMAL)
    if pieces is not None:
        types |= {model["vocab"][text]: BYTE for text in BYTES}
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if max(tokens) >= num_rows:
        raise CheckpointError(
            f"{location}: the tokenizer has token {max(tokens)}, the embedding {num_rows} rows; the tokenizer is from "
            "another model"
        )
    # Rows of the embedding without a token: the file has a text for each, as llama.cpp's converter writes it.
    texts = [tokens.get(number, f"[PAD{number}]") for number in range(num_rows)]
    if len(set(texts)) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise _refusal(location, f"two tokens have the text {twice!r}")
    adds_bos, adds_eos = _around(tokenizer, location)
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk")}
    return Vocabulary(
        tokens=texts,
        types=[types.get(number, UNUSED) for number in range(num_rows)],
        merges=[] if pieces is not None else _merges(model, location),
        cut=cut,
        special={name: int(number) for name, number in special.items() if number is not None},
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        template=_template(tokenizer),
        turns=None if _template(tokenizer) is None else turns_of(tokenizer, adds_bos),
        scores=() if pieces is None else [_score(types.get(number), text, pieces) for number, text in enumerate(texts)],
        adds_blank=pieces is not None and pieces.adds_blank,
        warning=None if pieces is None else pieces.warning,
    )


def _pieces(content: Mapping[str, Any], model: Mapping[str, Any], location: str) -> Pieces | None:
    """Of SentencePiece's tokenizers; None for others."""
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        return None
    try:
        return pieces_of(content, _merges(model, location))
    except NotAlikeError as error:
        raise _refusal(location, str(error)) from error


def _score(kind: int | None, text: str, pieces: Pieces) -> float:
    if kind is None:
        return _UNUSED_SCORE
    return _ADDED_SCORE if kind in (CONTROL, USER_DEFINED) else pieces.scores[text]


def _refusal(location: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{location}: its tokenizer is not written as GGUF: {why}. Written are byte-level BPE tokenizers that cut text "
        f"as {', '.join(cut.name for cut in _CUTS)}, and SentencePiece's BPE; llama.cpp's own "
        "convert_hf_to_gguf.py knows more"
    )


def _cut_of(content: Mapping[str, Any], model: Mapping[str, Any], location: str) -> str:
    """The name of the rule by which text is cut; refuses whatever llama.cpp does not do."""
    if model["type"] != "BPE":
        raise _refusal(location, f"it is {model['type']}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk"):
        if model.get(key):
            raise _refusal(location, f"its model has {key} {model[key]!r}")
    normalizer = content.get("normalizer")
    kind = None if normalizer is None else str(normalizer["type"])
    steps = tuple(step for part in _parts(content.get("pre_tokenizer")) for step in _steps(part, location))
    for cut in _CUTS:
        if cut.steps == steps and kind in cut.normalizers and cut.ignores_merges == bool(model.get("ignore_merges")):
            return cut.name
    more = f" with normalizer {kind}" if kind else ""
    more += " that takes whole words before merging" if model.get("ignore_merges") else ""
    raise _refusal(location, f"no known name stands for {' then '.join(steps) or 'no pre-tokenizer'}{more}")


def _parts(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [part for inner in pre_tokenizer["pretokenizers"] for part in _parts(inner)]
    return [pre_tokenizer]


def _steps(part: Mapping[str, Any], location: str) -> list[str]:
    """What one part cuts by; nothing where it only maps bytes to its alphabet."""
    match part["type"]:
        case "ByteLevel" if not part.get("add_prefix_space"):
            return [_GPT2] if part.get("use_regex", True) else []
        case "Digits" if part.get("individual_digits"):
            return [_DIGITS]
        case "Split" if part.get("behavior") == "Isolated" and not part.get("invert") and "Regex" in part["pattern"]:
            return [str(part["pattern"]["Regex"])]
    raise _refusal(location, f"its pre-tokenizer has the part {json.dumps(part)}")


def _merges(model: Mapping[str, Any], location: str) -> list[str]:
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    odd = next((pair for pair in pairs if len(pair) != 2 or any(" " in half for half in pair)), None)
    if odd is not None:
        raise _refusal(location, f"its merge {odd!r} is no pair of texts without blanks")
    return [" ".join(pair) for pair in pairs]


def _around(tokenizer: Any, location: str) -> tuple[bool, bool]:
    """Whether a text gets a token before and behind it."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for adds_bos, adds_eos in ((False, False), (True, False), (False, True), (True, True)):
        before = [tokenizer.bos_token_id] if adds_bos else []
        behind = [tokenizer.eos_token_id] if adds_eos else []
        if full == [*before, *bare, *behind]:
            return adds_bos, adds_eos
    raise _refusal(location, f"it makes {full} of a text that is {bare} by itself, which is not bos or eos around it")


def _template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None
