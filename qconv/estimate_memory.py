"""What each stage of a job holds at its peak, term by term, from shapes alone.

Every function gives the steps of one stage; a step is what is held at the same time, by name, in bytes, and the largest
step is the stage's peak. The constants were measured (`benchmarks/plan.py`; docs/planning.md has its table).

- Host memory is what the process itself holds (anonymous memory). Pages of files, the libraries' code among them, are
  the system's to take back and do not count.
- On a GPU, host memory is what moves bytes: windows of page-locked memory for reading and writing.

Left out: memory of training beyond weights, adapter and activations; answers to prompts and tasks beyond whole models.

Legend: N = out features, K = in features, H = hidden size, S = tokens of a row, V = vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qconv.assemble import CPU_WINDOW_BYTES, GPU_WINDOW_BYTES
from qconv.plain_tensors import ELEMENTS_AT_ONCE, MAX_WORKERS
from qconv.quantization_config import QuantizationConfig
from qconv.quantize.memory import (
    CPU_TOKENS,
    LIBRARIES,
    MemoryPlan,
    ModelShape,
    advances_while_gathering,
    head_bytes,
    is_shared_pass,
    solving_order,
)
from qconv.write_behind import HOST_BYTES, PINNED_BYTES

Terms = Mapping[str, int]
Steps = Mapping[str, Terms]

# Anonymous memory of a process that has done a job of its kind for a model of a few megabytes.
INTERPRETER = 215_000_000  # torch alone: plain outputs, and those that need no model to run
INTERPRETER_RUNNING = 385_000_000  # with transformers and the text for calibration or evaluation
INTERPRETER_GPU = 1_500_000_000  # CUDA's own host memory and its libraries
TOKENIZER_FACTOR = 13  # bytes in memory for one of tokenizer.json
STATISTICS_BYTES = 13_000_000 * 6  # temporaries of the statistics, for each thread; `compare._CHUNK_BYTES`
AUDIT_BYTES = 60_000_000  # temporaries of the audit of weights, whose parts are bounded


@dataclass(frozen=True, kw_only=True)
class Work:
    """One tensor on its way through a plain output.

    Attributes:
        elements: of it.
        held: bytes while it is read, merged and rounded.
        stored: bytes that are handed to the writer.
    """

    elements: int
    held: int
    stored: int


def peak(steps: Steps) -> Terms:
    """The step that holds most; empty for a stage that holds nothing."""
    return max(steps.values(), key=lambda terms: sum(terms.values()), default={})


def process(running: bool, tokenizer_bytes: int, on_gpu: bool) -> dict[str, int]:
    """What is there in every stage."""
    terms = {"interpreter and libraries": INTERPRETER_RUNNING if running else INTERPRETER}
    if on_gpu:
        terms["CUDA in host memory"] = INTERPRETER_GPU
    if running:
        terms["tokenizer"] = TOKENIZER_FACTOR * tokenizer_bytes
    return terms


def moving(sources: Sequence[int], written: int, num_writers: int, on_gpu: bool) -> dict[str, int]:
    """Windows through which bytes are read and written; ``sources``: bytes of each folder that is read."""
    window, waiting = (GPU_WINDOW_BYTES, PINNED_BYTES) if on_gpu else (CPU_WINDOW_BYTES, HOST_BYTES)
    return {
        "read-ahead windows": sum(min(window, size) for size in sources),
        "tensors waiting to be written": min(written, num_writers * waiting),
    }


def writing_plain(works: Iterable[Work], num_threads: int) -> Steps:
    """Plain tensors on a CPU, several at a time; goes through them as `plain_tensors` does."""
    workers = min(MAX_WORKERS, num_threads)
    waiting: deque[Work] = deque()
    most = 0
    for work in works:
        while waiting and (
            len(waiting) >= workers or work.elements + sum(w.elements for w in waiting) > ELEMENTS_AT_ONCE
        ):
            waiting.popleft()
        waiting.append(work)
        # What is small is among the tensors that wait to be written; what is large is waited for.
        most = max(most, sum(max(0, w.held - min(w.stored, HOST_BYTES) * (w is waiting[0])) for w in waiting))
    return {"write": {"tensors in work": most}}


def writing_plain_on_gpu(works: Iterable[Work]) -> Steps:
    """One tensor after the other; the one before may still be on its way to the host."""
    held = sorted((work.held + work.stored for work in works), reverse=True)
    return {"write": {"CUDA and its libraries": LIBRARIES, "tensors in work": sum(held[:2])}}


def quantizing(shape: ModelShape, num_rows: int, seq_len: int, outputs: Sequence[QuantizationConfig]) -> Steps:
    """Outputs of one pass on a CPU, some of them calibrated; the steps of `quantize/memory.py`, as a CPU holds them."""
    rows = max(1, min(num_rows, CPU_TOKENS // seq_len))
    tokens = rows * seq_len
    token = shape.hidden_size * shape.itemsize
    held = {"activations of the calibration": num_rows * seq_len * token}
    running = shape.parameters * shape.itemsize
    grams, samples = shape.statistics_bytes(outputs)
    forward = tokens * shape.itemsize * 3 * (shape.widest + shape.hidden_size)
    forward += rows * shape.score_heads * seq_len**2 * (4 + 2 * shape.itemsize)
    largest = max((n * k for n, k in shape.stacks), default=0)
    # A Gram matrix takes inputs in float32, and the mean of magnitudes these magnitudes beside them.
    widened = sum(any(kind in output.statistics for output in outputs) for kind in ("gram", "mean_abs"))
    steps: dict[str, Terms] = {
        "embed": {**held, "embedding": shape.outer_bytes},
        "gather": {
            **held,
            "block as read": shape.source_bytes,
            "Gram matrices": grams,
            "sampled inputs": samples,
            "block in the compute dtype": running,
            "forward pass": forward,
            "inputs of a linear in float32": widened * 4 * tokens * max(shape.grams, default=0),
        },
        "solve": {**held, **_solving(shape, outputs), "sampled inputs": samples},
        **_head(shape.head),
    }
    if not advances_while_gathering(outputs):
        kept = {"block as read": shape.source_bytes, "Gram matrices": grams, "sampled inputs": samples}
        steps["advance"] = {
            **held,
            **(kept if is_shared_pass(outputs) else {}),
            "codes": 2 * shape.parameters,
            "block in the compute dtype": running,
            "forward pass": max(forward, 8 * largest),
        }
    return steps


def _solving(shape: ModelShape, outputs: Sequence[QuantizationConfig]) -> dict[str, int]:
    """The largest solve of a block; the last output gives away weights and Gram matrices as it goes, others keep them.

    GPTQ holds start and pull, codes twice and a factor as large as the Gram matrix, later the dequantized weights,
    start and pull; AWQ, before anything is given away, scaled copies of weights and Gram matrix. The weights themselves
    are the block as read.
    """
    stacks = _stacks(shape, outputs)
    rest = max(0, shape.source_bytes - sum(4 * weights for weights, _, _ in stacks))
    most: dict[str, int] = {}
    *before, last = [outputs[number] for number in solving_order(outputs)]
    for output in (*before, last):
        for number, (weights, square, _) in enumerate(stacks):
            left = stacks[number:] if output is last else stacks
            terms = {
                "block as read": rest + sum(4 * each for each, _, _ in left),
                "Gram matrices": sum(gram for _, _, gram in left),
                "codes": shape.parameters + sum(each for each, _, _ in stacks[:number]),
                "workspace of the solver": _workspace(output, weights, square),
            }
            if output is not last:
                terms["copies for one of several outputs"] = sum(shape.copies_bytes(output))
            folding = {
                "block as read": rest + sum(4 * each for each, _, _ in stacks),
                "Gram matrices": sum(gram for _, _, gram in stacks),
                "codes": shape.parameters,
                "scaled copies": 8 * weights + (4 * square if "gram" in output.statistics else 0),
            }
            most = max(most, terms, folding if output.folding else {}, key=lambda step: sum(step.values()))
    return most


def _stacks(shape: ModelShape, outputs: Sequence[QuantizationConfig]) -> list[tuple[int, int, int]]:
    """Of linears that may share an input: elements, K squared, and bytes of the Gram matrices of their inputs."""
    grams = list(shape.grams) if any("gram" in output.statistics for output in outputs) else []
    found = []
    for n, k in shape.stacks:
        own = [grams.pop(0) for _ in range(2) if grams and grams[0] == k]
        found.append((n * k, k * k, sum(4 * each * each for each in own)))
    return found


def _workspace(output: QuantizationConfig, weights: int, square: int) -> int:
    """Of one solve."""
    return max(10 * weights + 4 * square, 14 * weights) if output.solves else 4 * weights


def quantizing_by_weights(parameters: int, source_bytes: int, largest: int, head: tuple[int, int]) -> Steps:
    """Outputs without calibration on a CPU, block by block.

    Args:
        parameters, source_bytes: of the largest block, elements and bytes as the view gives them.
        largest: elements of the largest linear of a block.
        head: elements of an output head to quantize, and its bytes as the view gives them; 0 = none.
    """
    steps: dict[str, Terms] = {
        "solve": {"block as read": source_bytes, "codes": 2 * parameters, "workspace": 4 * largest}
    }
    return steps | _head(head)


def _head(head: tuple[int, int]) -> dict[str, Terms]:
    """An output head that is quantized: after the blocks, whose activations are gone by then."""
    return {"head": {"output head and its codes": head_bytes(*head)}} if head[0] else {}


def quantizing_on_gpu(plan: MemoryPlan) -> Steps:
    """The largest step of a plan that was made for the device; `quantize/memory.py` says what it is made of."""
    step = max(plan.steps, key=lambda name: plan.steps[name])
    return {step: {"CUDA and its libraries": LIBRARIES, f"the {step} step": plan.steps[step]}}


@dataclass(frozen=True, kw_only=True)
class Contest:
    """What a comparison holds, from shapes.

    Attributes:
        block: of the reference; of the merge where there is one.
        entrants: rows that each model sees, by name.
        seq_len: S.
        rows_per_batch: of the reference and the candidate.
        head_bytes: of each output embedding that is in memory at the same time.
        vocabulary: V.
        models_bytes: both models in the compute dtype.
        keep: whether both stay in memory between passes.
        whole: whether a model is put together for prompts or tasks.
        merges: whether an adapter is merged for the controls.
        ahead_bytes: of the largest block, as both models store it.
        resident_bytes: of a reference that is on a GPU as a whole; 0 = block by block.
    """

    block: ModelShape
    entrants: Mapping[str, int]
    seq_len: int
    rows_per_batch: int
    head_bytes: Sequence[int]
    vocabulary: int
    models_bytes: int
    keep: bool
    whole: bool
    merges: bool
    ahead_bytes: int
    resident_bytes: int = 0


def comparing(contest: Contest, on_gpu: bool, num_threads: int) -> Steps:
    """A validation, on the device that it runs on."""
    block, seq_len = contest.block, contest.seq_len
    row = seq_len * block.hidden_size * block.itemsize
    states = "hidden states of all models"
    held = {states: sum(contest.entrants.values()) * row}
    if contest.keep:
        held["both models, kept"] = contest.models_bytes
    if on_gpu:
        held = {"CUDA and its libraries": LIBRARIES, "reference": contest.resident_bytes, **held}
    elif contest.whole and not contest.keep:
        held["a whole model for prompts or tasks"] = contest.models_bytes // 2
    tokens = min(contest.rows_per_batch, max(contest.entrants.values())) * seq_len
    forward = tokens * block.itemsize * 3 * (block.widest + block.hidden_size)
    forward += contest.rows_per_batch * block.score_heads * seq_len**2 * (4 + 2 * block.itemsize)
    decoded = block.parameters * (block.itemsize + 4 + (4 if contest.merges and not on_gpu else 0))
    width = contest.vocabulary * block.itemsize
    if on_gpu:
        logits = {"logits and their statistics": 2 * 200_000_000 + 6 * 33_000_000 * 4}
    else:
        logits = {
            "logits of a row": len(contest.entrants) * seq_len * width,
            "statistics": num_threads * STATISTICS_BYTES,
        }
    embedded = dict(contest.entrants)
    if contest.resident_bytes:  # it holds its own embedding, and comes after those that do not
        for name in ("reference", "floor"):
            embedded.pop(name, None)
    return {
        "embed": {
            **held,
            states: sum(embedded.values()) * row,
            "embeddings": 2 * block.outer_bytes,
            "forward pass": tokens * 4 * block.hidden_size,
        },
        "blocks": {
            **held,
            "hidden states of the next block": max(contest.entrants.values()) * row,
            "block of both models and the merge": decoded,
            "block in the compute dtype": block.parameters * block.itemsize,
            "next block, read ahead": contest.ahead_bytes,
            "forward pass": forward,
            "audit of weights": AUDIT_BYTES,
        },
        "logits": {**held, "output embeddings": sum(contest.head_bytes), **logits},
    }
