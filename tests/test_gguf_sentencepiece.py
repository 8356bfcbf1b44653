"""SentencePiece's tokenizers in GGUF files: what transformers' reader of such files makes of texts; refusals."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qconv import corpus, pipeline
from qconv.config import MergeJob, OutputConfig
from qconv.errors import CheckpointError
from qconv.gguf import vocabulary_of
from qconv.quantization_config import QuantizationConfig
from tests.conftest import TINY_LLAMA
from tests.test_gguf import file_in

BLANK = "\u2581"
TEXTS = (
    "It's 2024, isn't it?  Two blanks, and\n\nnew\tlines.",
    "def f(x):\n    return x+1  # 3.14159 — Ünïcödé 漢字 🙂",
    " a blank before",
    "The the THE theatre of otherness",
    "",
)


@pytest.fixture(scope="module")
def pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary and its merges, as transformers makes them of a SentencePiece model: for each token, from the
    highest score down, all pairs that make it."""
    text = "\n".join(corpus.load_documents("default-prose")[:4])[:200_000]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", BLANK)
    trained.pre_tokenizer = pre_tokenizers.Split(BLANK, behavior="merged_with_next")
    trained.train_from_iterator([text], trainers.BpeTrainer(vocab_size=900, show_progress=False))
    tokens = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    known = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{number:02X}>": 3 + number for number in range(256)}
    made = [token for token in tokens if len(token) > 1]
    for token in [*made, *(token for token in tokens if len(token) == 1)]:
        known.setdefault(token, len(known))
    cuts = [(token[:cut], token[cut:]) for token in made for cut in range(1, len(token))]
    return known, [pair for pair in cuts if pair[0] in known and pair[1] in known]


Make = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture
def make(pieces: tuple[dict[str, int], list[tuple[str, str]]]) -> Make:
    def tokenizer(style: str = "prepend", merges: list[tuple[str, str]] | None = None, **model: Any) -> Any:
        known, all_merges = pieces
        options: dict[str, Any] = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True} | model
        backend = Tokenizer(models.BPE(known, all_merges if merges is None else merges, **options))
        replace = normalizers.Replace(" ", BLANK)
        if style == "prepend":
            backend.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), replace])
        elif style == "gemma":
            backend.normalizer = replace
            backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(BLANK, prepend_scheme=style, split=False)
        backend.decoder = decoders.Sequence([decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()])
        backend.add_special_tokens(["<unk>", "<s>", "</s>"])
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=False
        )

    return tokenizer


def written(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    base = Path(shutil.copytree(TINY_LLAMA, tmp_path / "base"))
    for file in base.glob("tokenizer*"):
        file.unlink()
    tokenizer.save_pretrained(base)
    output = OutputConfig(out=tmp_path / "out", quantization=QuantizationConfig(target="gguf-f16"))
    pipeline.run(MergeJob(base=str(base), outputs=(output,), validation=None, device="cpu"))
    return tmp_path / "out"


@pytest.mark.parametrize("style", ["prepend", "gemma"])
def test_tokens_of_texts_are_the_same_from_the_file(make: Make, tmp_path: Path, style: str) -> None:
    own = make(style)
    out = written(own, tmp_path)
    fields = GGUFReader(file_in(out)).fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"].contents() == (style == "prepend")
    types = fields["tokenizer.ggml.token_type"].contents()
    assert (types[:3], set(types[3:259]), types[300], types[-1]) == ([3, 3, 3], {6}, 1, 5)
    scores = fields["tokenizer.ggml.scores"].contents()
    assert all(one > other for one, other in itertools.pairwise(scores[259:400]))
    theirs = AutoTokenizer.from_pretrained(out, gguf_file=file_in(out).name)
    for text in TEXTS:
        # Their reader puts blanks before texts by a rule of its own: only what follows is compared.
        expected = own(f"x{text}", add_special_tokens=False)["input_ids"]
        found = theirs(f"x{text}", add_special_tokens=False)["input_ids"]
        assert found[len(found) - len(expected) + 1 :] == expected[1:], text


def test_one_rule_makes_the_tokens_that_the_pairs_make(make: Make) -> None:
    """llama.cpp's rule, written down once more: merge the neighbours whose union has the highest score."""
    own = make()
    vocabulary = vocabulary_of(own, 2048, "here")
    number = {text: place for place, text in enumerate(vocabulary.tokens)}

    def merged(text: str) -> list[int]:
        symbols = list((" " + text).replace(" ", BLANK))
        while True:
            unions = [left + right for left, right in itertools.pairwise(symbols)]
            ranked = [
                (vocabulary.scores[number[union]], -place) for place, union in enumerate(unions) if union in number
            ]
            if not ranked:
                break
            place = -max(ranked)[1]
            symbols[place : place + 2] = [unions[place]]
        known = [[number[symbol]] if symbol in number else [3 + byte for byte in symbol.encode()] for symbol in symbols]
        return [token for some in known for token in some]

    for text in (*TEXTS[:-1], *corpus.load_documents("default-prose-eval")[0][:2000].split("\n\n")):
        if text:
            assert merged(text) == own(text, add_special_tokens=False)["input_ids"], text


@pytest.mark.parametrize(
    ("style", "blank", "words"), [("first", True, "only before a whole text"), ("never", False, None)]
)
def test_what_differs_by_a_blank_is_said(make: Make, style: str, blank: bool, words: str | None) -> None:
    vocabulary = vocabulary_of(make(style), 2048, "here")
    assert vocabulary.adds_blank == blank
    assert (vocabulary.warning is None) if words is None else (words in str(vocabulary.warning))


def test_tokenizers_that_scores_do_not_describe_are_refused(
    make: Make, pieces: tuple[dict[str, int], list[tuple[str, str]]]
) -> None:
    _, merges = pieces
    several = next(place for place, pair in enumerate(merges[:-1]) if "".join(pair) == "".join(merges[place + 1]))
    with pytest.raises(CheckpointError, match=r"though .* is a token"):
        vocabulary_of(make(merges=merges[:several] + merges[several + 1 :]), 2048, "here")
    apart = [*merges[:several], *merges[several + 1 :], merges[several]]
    with pytest.raises(CheckpointError, match="do not stand together"):
        vocabulary_of(make(merges=apart), 2048, "here")
    with pytest.raises(CheckpointError, match=r"the tokenizer has token .* the embedding 300 rows"):
        vocabulary_of(make(), 300, "here")
    with pytest.raises(CheckpointError, match="its model has dropout"):
        vocabulary_of(make(dropout=0.5), 2048, "here")
    content = json.loads(make("gemma").backend_tokenizer.to_str())
    content["normalizer"] = {"type": "NFKC"}
    odd = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token="<s>")
    with pytest.raises(CheckpointError, match=r"its normalizer is .*NFKC"):
        vocabulary_of(odd, 2048, "here")
