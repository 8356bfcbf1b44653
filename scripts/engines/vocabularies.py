"""Small vocabularies that SentencePiece itself trains, with the options of Llama 2, Mistral and Gemma."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import AutoTokenizer

from qconv import corpus

COMMON: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}
LLAMA_2 = COMMON | {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
GEMMA = COMMON | {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "add_dummy_prefix": False}
GEMMA |= {"eos_piece": "<eos>", "bos_piece": "<bos>"}
STYLES = {
    "llama-2": ("LlamaTokenizer", LLAMA_2),
    "mistral": ("LlamaTokenizer", LLAMA_2 | {"control_symbols": ["[INST]", "[/INST]"]}),
    "gemma": ("GemmaTokenizer", GEMMA | {"control_symbols": ["<start_of_turn>", "<end_of_turn>"]}),
}
TEXTS = (
    "It's 2024, isn't it?  Two blanks, and\n\nnew\tlines.",
    "def f(x):\n    return x+1  # 3.14159 — Ünïcödé 漢字 🙂",
    "The the THE theatre of otherness",
    "x",
)
"""None begins with a blank: there the file of a Llama 2 says something else than release 5 of transformers."""


def build(style: str, model: Path, out: Path) -> None:
    """A model with another vocabulary: SentencePiece's file, as hubs have it, and what transformers makes of it.

    Args:
        model: a folder; its own tokenizer is left out.
    """
    class_name, options = STYLES[style]
    lines = [line for document in corpus.load_documents("default-prose")[:4] for line in document[:60_000].split("\n")]
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=trained, vocab_size=1500, num_threads=1, minloglevel=2, **options
    )
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("tokenizer*"))
    (out / "tokenizer.model").write_bytes(trained.getvalue())
    (out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": class_name}))
    AutoTokenizer.from_pretrained(out).save_pretrained(out)
