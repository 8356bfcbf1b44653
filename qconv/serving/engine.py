"""What is to be served, and what an engine says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qconv.types import Scheme


@dataclass(frozen=True, kw_only=True)
class ServedAdapter:
    """A plain LoRA beside the model.

    Attributes:
        path: as the engine finds it.
        rank: the largest of its modules.
        trained_on: how training saw its base, where that is recorded.
    """

    name: str
    path: str
    rank: int
    trained_on: str | None = None


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model as an engine will meet it.

    Attributes:
        name: that requests call it.
        path: as the engine finds it.
        layout: ``"plain"``, ``"bnb-..."``, ``"onnx..."``, a key of `convert.FORMATS`, or several with ``+`` between.
        schemes: the different ones of its linears.
        quantization: ``quantization_config`` of its config.json.
        dtype: of what is not quantized.
        unquantized: modules of linears that are in no scheme.
        num_gpus: that it is split among.
        num_kv_heads: of keys and values.
        context: tokens of a sequence at most.
        concurrency: sequences at a time.
        cache_dtype: of keys and values: ``"auto"`` (the model's) or ``"fp8"``.
        has_cache_scales: the folder holds calibrated scales for these.
        model_file: the Modelfile beside a GGUF file; empty = there is none.
        adds_special_tokens: whether the tokenizer of an ONNX folder puts any around a prompt by itself.
    """

    name: str
    path: str
    layout: str
    schemes: tuple[Scheme, ...] = ()
    quantization: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    unquantized: tuple[str, ...] = ()
    adapters: tuple[ServedAdapter, ...] = ()
    num_gpus: int = 1
    num_kv_heads: int = 8
    context: int = 8192
    concurrency: int = 16
    cache_dtype: str = "auto"
    has_cache_scales: bool = False
    model_file: str = ""
    adds_special_tokens: bool = False
    host: str = "0.0.0.0"
    port: int = 8000

    @property
    def is_onnx(self) -> bool:
        """A graph, which other engines do not read."""
        return self.layout.startswith("onnx")

    @property
    def is_gguf(self) -> bool:
        """A GGUF file, which other engines do not read."""
        return self.layout.startswith("gguf-")

    @property
    def layouts(self) -> tuple[str, ...]:
        return tuple(self.layout.split("+"))

    @property
    def max_rank(self) -> int:
        return max((adapter.rank for adapter in self.adapters), default=0)

    @property
    def odd_bits(self) -> int | None:
        """A width of integer codes that most kernels do not know."""
        return next((s.bits for s in self.schemes if s.kind == "int" and s.bits not in (4, 8)), None)

    @property
    def has_group_index(self) -> bool:
        """GPTQ with groups that follow a stored index (``desc_act``)."""
        return bool(self.quantization.get("desc_act")) and any(scheme.group_size != -1 for scheme in self.schemes)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question over HTTP, and where its answer lies in the JSON that comes back."""

    path: str
    body: Mapping[str, Any]
    answer: tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Attributes:
    name: as ``--for`` takes it.
    title: for people.
    port: that it listens on by itself.
    refusal: why it does not load what is served, and what to take instead; None = it does.
    notes: what is worth knowing about what it does load.
    command: words of the launch line.
    files: further ones, by path, that it needs beside the weights.
    links_model: whether these have to lie in the model's folder: then a folder of links to its files is made.
    request: asks the model, or an adapter, for so many tokens of a greedy answer.
    ready: path that answers once it serves.
    steps: lines that make it serve, `launch.sh` among them.
    most_at_a_time: sequences; None = as many as fit.
    usual_at_a_time: the same unless more are asked for; None = as any engine.
    takes_the_gpu: it takes most of a GPU for itself when it starts.
    sources: where all of this is from.
    """

    name: str
    title: str
    port: int
    refusal: Callable[[Served], str | None]
    notes: Callable[[Served], list[str]]
    command: Callable[[Served], list[str]]
    request: Callable[[Served, ServedAdapter | None, str, int], Request]
    files: Callable[[Served], dict[str, str]] = lambda _: {}
    links_model: Callable[[Served], bool] = lambda _: False
    ready: str = "/health"
    steps: Callable[[Served], list[str]] = lambda _: ["./launch.sh"]
    most_at_a_time: int | None = None
    usual_at_a_time: int | None = None
    takes_the_gpu: bool = True
    sources: tuple[str, ...]


def openai_request(model: str, prompt: str, num_tokens: int) -> Request:
    """The completions of OpenAI's interface, which most engines have."""
    body = {"model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0}
    return Request(path="/v1/completions", body=body, answer=("choices", 0, "text"))


def instead(target: str, served: Served) -> str:
    """What to run for another target of the same model."""
    return f"make another output of the same base and adapter with --requant {target}" + (
        "" if served.layout == "plain" else f", or a plain one without --requant ({served.path} is {served.layout})"
    )
