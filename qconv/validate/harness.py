"""Runs lm-evaluation-harness on a loaded model and leaves the process as it was.

lm_eval prints, draws bars, logs, sets seeds and environment variables, changes the tokenizer it is given (padding)
and ties the model's weights anew. Here its output is dropped, its warnings are passed on as messages, it gets
a copy of the tokenizer, the weights stay as they are, and everything else is put back afterwards.

Rounding: log-probabilities of answers are taken in float32 from the model's logits. lm_eval's own default keeps the
model's dtype: in bfloat16 the log-likelihoods of two answers are then often equal, and the first one wins. Scores
can therefore differ a little from those of the lm_eval command.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from qconv.errors import NumericsError, UsageError
from qconv.own_process import allow_again
from qconv.progress import Progress

# What users must know; the rest of lm_eval's warnings is about defaults that were meant.
_TELLING = ("exceed", "truncat", "not in within range")


def run_harness(
    model: nn.Module,
    tokenizer: Any,
    loaded: dict[str, Any],
    *,
    name: str,
    limit: int | None,
    batch_size: int,
    chat_template: bool,
    seed: int,
) -> dict[str, Any]:
    """`lm_eval.evaluate` on the tasks of `load_tasks`; call inside `contained`.

    Args:
        model: a causal language model of transformers, on its device.
        name: what messages call the model.
        limit: the first so many documents of each task; None = all.

    Returns:
        lm_eval's result: ``"results"`` (values by task and ``"metric,filter"``) and ``"samples"`` (by task).

    Raises:
        UsageError: a task cannot run on this model.
        NumericsError: a log-likelihood is NaN.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    _seed(seed)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    try:
        with _weights_untouched(model):
            lm = HFLM(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),
                backend="causal",
                batch_size=batch_size,
                softmax_dtype="float32",
            )
        result = evaluate(
            lm,
            loaded,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
        )
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        AssertionError,
        ImportError,
        NotImplementedError,
    ) as error:
        tasks = ", ".join(loaded["tasks"])
        raise UsageError(f"lm_eval cannot run {tasks} on the {name}: {type(error).__name__}: {error}") from error
    if not isinstance(result, dict):
        raise UsageError("tasks run in one process; this one is not the first of a distributed run")
    for task, samples in result["samples"].items():
        _check_finite(samples, task, name)
    return result


def _check_finite(samples: list[dict[str, Any]], task: str, name: str) -> None:
    """A NaN would not show: the arg max over answers takes the first NaN for the largest."""
    for sample in samples:
        for response in sample["filtered_resps"]:
            likelihood = response[0] if isinstance(response, list | tuple) and response else response
            if isinstance(likelihood, float) and math.isnan(likelihood):
                raise NumericsError(f"the {name} gives NaN log-likelihoods: task {task}, document {sample['doc_id']}")


@contextlib.contextmanager
def contained(progress: Progress) -> Iterator[None]:
    """Nothing that lm_eval does to the process outlives this, and nothing reaches stdout."""
    allow_again()
    shows_bars = progress.verbosity >= 1 and sys.stderr.isatty()
    warnings: list[str] = []
    stderr = contextlib.nullcontext() if shows_bars else contextlib.redirect_stderr(io.StringIO())
    try:
        with _restored_state(), _collected(warnings), contextlib.redirect_stdout(io.StringIO()), stderr:
            yield
    finally:
        for message in dict.fromkeys(warnings):
            tells = any(word in message.lower() for word in _TELLING)
            (progress.say if tells else progress.detail)(f"lm_eval: {message}")


@contextlib.contextmanager
def _restored_state() -> Iterator[None]:
    environment = dict(os.environ)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for key in os.environ.keys() - environment.keys():
            del os.environ[key]
        os.environ.update(environment)


class _Collector(logging.Handler):
    def __init__(self, messages: list[str]):
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(" ".join(record.getMessage().split())[:500])


@contextlib.contextmanager
def _collected(messages: list[str]) -> Iterator[None]:
    """lm_eval's warnings go to ``messages``; transformers' advice on generation goes nowhere."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers")]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    loggers[0].handlers, loggers[0].propagate = [_Collector(messages)], False
    loggers[0].setLevel(logging.WARNING)
    loggers[1].setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.propagate, logger.handlers = propagate, handlers


@contextlib.contextmanager
def _weights_untouched(model: nn.Module) -> Iterator[None]:
    """lm_eval ties weights on every model it gets: a head that training untied would be overwritten."""
    model.tie_weights = lambda *args, **kwargs: None  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.tie_weights


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
