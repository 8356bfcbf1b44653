"""What ONNX Runtime GenAI itself makes of a folder: tokens of texts, and the tokens that it generates.

Source: https://onnxruntime.ai/docs/genai/api/python.html. Its tokenizers are read from ``tokenizer.json`` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qconv.errors import CheckpointError
from qconv.onnx.package import genai_package

TOKENIZER_FILE = "tokenizer.json"


def genai_tokens(folder: Path, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    """Ids of each text.

    Args:
        add_special_tokens: which it does not do by itself, and for some classes of tokenizers whatever their files say.

    Raises:
        CheckpointError: it cannot read the tokenizer, or not a text; quotes the reason.
    """
    genai = genai_package()
    try:
        tokenizer = genai.Tokenizer(genai.Config(str(folder)))
        tokenizer.update_options(add_special_tokens=str(add_special_tokens).lower())
        return [[int(number) for number in tokenizer.encode(text)] for text in texts]
    except Exception as error:  # all that it raises is RuntimeError, and all that its binding raises is others
        raise CheckpointError(
            f"{folder}: ONNX Runtime GenAI cannot use the tokenizer ({type(error).__name__}: {error})"
        ) from error


def genai_greedy(folder: Path, ids: Sequence[int], count: int) -> list[int]:
    """At most so many tokens behind the ids, fewer where the model ends its text.

    Raises:
        CheckpointError: it cannot load the model, or fails; quotes the reason.
    """
    genai = genai_package()
    try:
        parameters = genai.GeneratorParams(model := genai.Model(str(folder)))
        parameters.set_search_options(do_sample=False, max_length=len(ids) + count)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(list(ids))
        while not generator.is_done():
            generator.generate_next_token()
        return [int(number) for number in generator.get_sequence(0)][len(ids) :]
    except Exception as error:  # as above
        raise CheckpointError(
            f"{folder}: ONNX Runtime GenAI cannot generate with it ({type(error).__name__}: {error})"
        ) from error
