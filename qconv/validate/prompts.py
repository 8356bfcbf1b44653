"""Greedy answers of both models to the same prompts, and where they first part.

Both generate with transformers' ``generate`` (greedy, no penalties), all prompts in one batch padded on the left,
so that the two see the same shapes. A first divergence is the number of new tokens that agree.
"""

from __future__ import annotations

import copy
import json
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qconv.errors import CalibrationError, UsageError
from qconv.progress import Progress
from qconv.streaming import BlockModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EXAMPLES = 8


def load_prompts(source: str) -> list[str]:
    """``"default"`` (sixteen embedded ones), a ``.txt`` file with one prompt a line, or a ``.jsonl`` with ``prompt``.

    Raises:
        CalibrationError: an unknown source, or a file that is missing, malformed or empty.
    """
    if source == "default":
        text = files("qconv").joinpath("data", "prompts.txt").read_text(encoding="utf-8")
        return text.splitlines()
    file = Path(source)
    if file.suffix not in (".txt", ".jsonl"):
        raise CalibrationError(f"{source}: unknown prompts; expected default, a .txt or a .jsonl file")
    try:
        lines = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        prompts = lines if file.suffix == ".txt" else [json.loads(line)["prompt"] for line in lines]
    except FileNotFoundError:
        raise CalibrationError(
            f"{source}: no such file; expected default, a .txt or a .jsonl file of prompts"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f"{source}: cannot be read as prompts ({type(error).__name__}: {error})") from error
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise CalibrationError(f"{source}: expected at least one prompt, each a string that is not empty")
    return prompts


def compare_prompts(
    reference: BlockModel,
    candidate: BlockModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    new_tokens: int,
    progress: Progress,
) -> dict[str, Any]:
    """The ``prompts`` part of a report.

    Raises:
        CalibrationError: see `load_prompts`.
        UsageError: a model does not fit in memory as a whole, which generating needs.
    """
    prompts = load_prompts(source)
    progress.say(f"answering {len(prompts)} prompts with both models")
    tokenizer = copy.deepcopy(tokenizer)  # padding and truncation are set on it
    texts, extra = prompts, {}
    if tokenizer.chat_template:
        texts = [_as_chat(tokenizer, prompt) for prompt in prompts]
        extra = {"add_special_tokens": False}
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    inputs = tokenizer(texts, return_tensors="pt", padding=True, **extra)
    answers = [_answers(model, inputs, tokenizer, new_tokens) for model in (reference, candidate)]
    parted = [_first_divergence(*pair) for pair in zip(*answers, strict=True)]
    examples = [
        {
            "prompt": prompt,
            "reference": tokenizer.decode(left, skip_special_tokens=True),
            "candidate": tokenizer.decode(right, skip_special_tokens=True),
            "first_divergence": where,
        }
        for prompt, left, right, where in zip(prompts, *answers, parted, strict=True)
    ]
    return {
        "num_prompts": len(prompts),
        "new_tokens": new_tokens,
        "identical": sum(where is None for where in parted),
        "identical_interval_95": list(_wilson(sum(where is None for where in parted), len(parted))),
        "median_first_divergence": float(median(new_tokens if where is None else where for where in parted)),
        "examples": examples[:_EXAMPLES],
    }


def _wilson(hits: int, num: int) -> tuple[float, float]:
    """95% score interval of a share (Wilson 1927)."""
    z = 1.959963984540054
    share = hits / num
    centre = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * (share * (1 - share) / num + z * z / (4 * num * num)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def _as_chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    chat = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return text


@torch.no_grad()
def _answers(model: BlockModel, inputs: Any, tokenizer: Any, new_tokens: int) -> list[list[int]]:
    from transformers import GenerationConfig

    greedy = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    try:
        whole: Any = model.whole()
        own = whole.generation_config
        # generate() fills what is not set here from the model's own: the penalties of a generation_config.json, which
        # only the models that transformers loads have.
        whole.generation_config = greedy
        try:
            ids_BS: Tensor = whole.generate(
                input_ids=inputs["input_ids"].to(model.device),
                attention_mask=inputs["attention_mask"].to(model.device),
                generation_config=greedy,
            )
        finally:
            whole.generation_config = own
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"--prompts: generating needs the whole model in memory, and it does not fit ({error})"
        ) from error
    new_BS = ids_BS[:, inputs["input_ids"].shape[1] :].tolist()
    return [_until_end(ids, tokenizer.eos_token_id) for ids in new_BS]


def _until_end(ids: list[int], end: int | None) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


def _first_divergence(left: list[int], right: list[int]) -> int | None:
    """How many new tokens agree before two answers part; None when they do not."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))
