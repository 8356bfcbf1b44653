"""Models that SentencePiece itself trained, with the options of Llama 2, Mistral and Gemma, in GGUF files.

Oracle: SentencePiece's own tokens and scores. What is compared is what the file holds, by llama.cpp's rule.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import sentencepiece
from gguf import GGUFReader

from qconv import corpus, pipeline
from qconv.config import MergeJob, OutputConfig
from qconv.quantization_config import QuantizationConfig
from scripts.engines.vocabularies import STYLES, TEXTS, build
from tests.conftest import TINY_LLAMA
from tests.test_gguf import file_in

BLANK = "\u2581"
NORMAL, BYTE = 1, 6  # kinds of tokens


@pytest.fixture(scope="module", params=STYLES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    base = tmp_path_factory.mktemp(request.param) / "base"
    build(request.param, TINY_LLAMA, base)
    return request.param, base


def merged(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """llama.cpp's rule: merge the neighbours whose union has the highest score, the leftmost first; else bytes."""
    number = {token: place for place, token in enumerate(tokens)}
    symbols = list(text.replace(" ", BLANK))
    while True:
        unions = [left + right for left, right in itertools.pairwise(symbols)]
        ranked = [(scores[number[union]], -place) for place, union in enumerate(unions) if union in number]
        if not ranked:
            break
        place = -max(ranked)[1]
        symbols[place : place + 2] = [unions[place]]
    known = [
        [number[symbol]] if symbol in number else [number[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        for symbol in symbols
    ]
    return list(itertools.chain.from_iterable(known))


def test_the_file_makes_the_tokens_that_sentencepiece_makes(trained: tuple[str, Path], tmp_path: Path) -> None:
    style, base = trained
    output = OutputConfig(out=tmp_path / "out", quantization=QuantizationConfig(target="gguf-f16"))
    pipeline.run(MergeJob(base=str(base), outputs=(output,), validation=None, device="cpu"))
    fields = GGUFReader(file_in(tmp_path / "out")).fields
    model = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    size = model.get_piece_size()

    tokens, scores = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "scores"))
    types = fields["tokenizer.ggml.token_type"].contents()
    assert tokens[:size] == [model.id_to_piece(number) for number in range(size)]
    assert fields["tokenizer.ggml.bos_token_id"].contents() == model.bos_id()
    assert fields["tokenizer.ggml.eos_token_id"].contents() == model.eos_id()
    for number in range(size):
        assert (types[number] == BYTE) == model.is_byte(number)
        assert (types[number] == NORMAL) == (
            not (model.is_byte(number) or model.is_control(number) or number == model.unk_id())
        )
    pieces = [number for number in range(size) if types[number] == NORMAL and len(tokens[number]) > 1]
    by_score = sorted(pieces, key=lambda number: -model.get_score(number))
    assert [scores[number] for number in by_score] == sorted((scores[number] for number in pieces), reverse=True)

    adds_blank = fields["tokenizer.ggml.add_space_prefix"].contents()
    assert adds_blank == (style != "gemma")
    documents = corpus.load_documents("default-prose-eval")[0][:3000].split("\n\n")
    for text in (*TEXTS, *filter(None, documents)):
        assert merged(" " * adds_blank + text, tokens, scores) == model.encode(text), text
