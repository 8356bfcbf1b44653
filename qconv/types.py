"""The nouns that the rooms of qconv hand to one another.

Nothing here imports torch when it runs, so that building a config stays cheap.

Dimension legend, used in names throughout the package: N = out features, K = in features,
G = number of quantization groups along K, R = adapter rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from qconv.errors import SchemeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BnbKind = Literal["nf4", "nf4-dq", "fp4", "fp4-dq", "16bit"]
"""How training saw the base: bitsandbytes 4-bit (``-dq`` = double quantization) or unquantized."""

BnbBackend = Literal["cpu", "cuda"]
"""Whose bitsandbytes kernels quantized a base: the two round a few values differently."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, shape and dtype of one tensor; no data."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Checkpoint(Protocol):
    """A readable set of named tensors with a model config: a folder on disk, or a view over one.

    Views (dequantized, merged) read their source lazily, so a whole model is never in memory.
    """

    @property
    def location(self) -> str:
        """Where the tensors come from, for messages."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of ``config.json`` (for an adapter: ``adapter_config.json``)."""

    def specs(self) -> Mapping[str, TensorSpec]:
        """All tensors by name, in a stable order. Reads no data."""

    def read(self, name: str, device: str = "cpu") -> Tensor:
        """The tensor, a fresh copy on ``device``, with the shape and dtype of its spec.

        Raises:
            CheckpointError: no such tensor, or its bytes cannot be read.
        """


@runtime_checkable
class ReadsAhead(Protocol):
    """A checkpoint, or a view over one, that can fetch tensors from disk before they are read."""

    def read_ahead(self, names: Iterable[str], pin: bool = False, max_bytes: int | None = None) -> None:
        """Begins to fetch in the background what ``names`` are stored as, for `read` to find it there.

        What was begun earlier and never read is dropped.

        Args:
            names: in the order in which they will be read.
            pin: into page-locked memory, from where they reach a GPU several times faster.
            max_bytes: that are fetched and wait to be read (of each checkpoint below a view); the rest follows as they
                are. None begins everything at once.
        """


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What the numbers of a quantized linear look like.

    Attributes:
        kind: ``"int"`` (affine integer codes) or ``"float"`` (float8_e4m3fn, or e2m1 with 4 bits, see `e2m1.py`).
        bits: width of a code; 8 or 4 for ``"float"``.
        group_size: input features that share a scale; -1 = the whole row (per output channel).
        symmetric: no stored zero point; integer codes are centred on ``2**(bits - 1)``.
        activation_order: columns were quantized in order of decreasing activation power
            (GPTQ "act-order"); groups are then either static or named by a group index.
        dynamic_activations: the engine quantizes inputs at run time: beside integers to 8-bit ones per token, beside
            floats to the same, per token and ``group_size`` features (-1 = all of a token). Beside a global scale of
            the weight one of the inputs is stored.
        float8_activations: dynamic activations become float8 per token, beside integers.
        static_activations: the engine quantizes inputs at run time to 8 bits of the same kind, by one scale that is
            stored with each linear; float8 only, and the rows of a weight share one scale, too.
        min_zero: smallest zero point of an asymmetric scheme; 1 for the GPTQ v1 layout, which stores
            zero - 1 and whose readers disagree on what a stored -1 means.
        block_rows: output features that share a scale; more than 1 for ``"float"`` blocks with a group size.
        scale_format: what scales are stored in: ``"plain"`` (16 or 32 bits), ``"e4m3"`` (float8, divided by one number
            for the whole weight, its global scale: NVFP4) or ``"e8m0"`` (powers of two: MXFP4).
    """

    kind: Literal["int", "float"] = "int"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    activation_order: bool = False
    dynamic_activations: bool = False
    float8_activations: bool = False
    static_activations: bool = False
    min_zero: Literal[0, 1] = 0
    block_rows: int = 1
    scale_format: Literal["plain", "e4m3", "e8m0"] = "plain"

    def __post_init__(self) -> None:
        if self.kind == "float" and (self.bits not in (4, 8) or not self.symmetric):
            raise SchemeError(
                f"float schemes have 4 or 8 bits and are symmetric, got bits={self.bits} symmetric={self.symmetric}"
            )
        if self.scale_format != "plain" and not self.is_fp4:
            raise SchemeError(
                f"scales in {self.scale_format} are those of 4-bit floats, got {self.bits}-bit {self.kind}"
            )
        if self.kind == "int" and self.bits not in (2, 3, 4, 5, 6, 8):
            raise SchemeError(f"integer schemes have 2, 3, 4, 5, 6 or 8 bits, got {self.bits}")
        if self.group_size != -1 and self.group_size <= 0:
            raise SchemeError(f"group size must be positive, or -1 for one group per row, got {self.group_size}")
        if self.block_rows != 1 and (self.block_rows < 1 or self.kind != "float" or self.group_size == -1):
            raise SchemeError(
                f"rows share a scale in float8 blocks only, got block_rows={self.block_rows} kind={self.kind} "
                f"group_size={self.group_size}"
            )
        if self.float8_activations and (self.kind != "int" or not self.dynamic_activations):
            raise SchemeError(f"float8 activations are dynamic ones beside integers, got kind={self.kind}")
        if self.static_activations and (self.dynamic_activations or self.kind != "float" or self.group_size != -1):
            raise SchemeError(
                "static activations are those of float8 with group size -1, and not dynamic, got "
                f"kind={self.kind} group_size={self.group_size} dynamic_activations={self.dynamic_activations}"
            )

    @property
    def is_fp4(self) -> bool:
        """Whether codes are those of `e2m1.py`."""
        return self.kind == "float" and self.bits == 4

    @property
    def has_global_scale(self) -> bool:
        return self.scale_format == "e4m3"

    @property
    def stores_input_scale(self) -> bool:
        return self.static_activations or (self.has_global_scale and self.dynamic_activations)

    @property
    def rounds_activations(self) -> bool:
        """Whether the engine quantizes inputs."""
        return self.dynamic_activations or self.static_activations

    @property
    def input_words(self) -> str:
        """What inputs are rounded to, where they are."""
        if self.is_fp4:
            return "4-bit floats"
        return "int8" if self.kind == "int" and not self.float8_activations else "float8"

    @property
    def max_code(self) -> int:
        return int(2**self.bits) - 1

    @property
    def mid_code(self) -> int:
        """The code that means zero in a symmetric integer scheme."""
        return int(2 ** (self.bits - 1))

    def num_groups(self, in_features: int) -> int:
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)

    def scales_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Of ``scales_NG`` for a weight ``[N, K]``."""
        return -(-out_features // self.block_rows), self.num_groups(in_features)


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedLinear:
    """One quantized linear weight, independent of any on-disk format.

    Algorithms produce it, formats pack it, and ``unpack(pack(q))`` gives it back bit for bit.

    Attributes:
        codes_NK: ``[N, K]``; uint8 in ``0 .. 2**bits - 1`` for integer schemes (always unsigned,
            also when symmetric) and 4-bit floats, float8_e4m3fn for 8-bit ones.
        scales_NG: ``[N, G]`` float32, holding values that are exact in both float16 and bfloat16
            (see `quantize/grid.py`), so that no reader's cast changes them. With ``scheme.block_rows`` above 1
            ``[ceil(N / block_rows), G]``, any float32 values: such formats store float32. With a global scale the
            float32 quotients of float8 numbers and it.
        zeros_NG: ``[N, G]`` uint8 zero points, or None when the scheme is symmetric; float32 for a format that stores
            any numbers (ggml's q4_1, HQQ).
        group_index_K: ``[K]`` int32, the group of each input feature, or None for ``k // group_size``.
        scheme: what the codes mean.
        input_scale: ``[1]`` float32, exact in both float16 and bfloat16, what inputs are divided by before they are
            rounded and clipped, with ``scheme.static_activations``; their global scale (any positive float32) beside
            one of the weight; else None: see ``scheme.stores_input_scale``.
        global_scale: ``[1]`` float32, positive, what the stored float8 scales are divided by; with
            ``scheme.has_global_scale``, else None.
        computed_in: dtype in which readers round the difference and the product that make the weight (HQQ); None = they
            round no more than the result.
    """

    codes_NK: Tensor
    scales_NG: Tensor
    zeros_NG: Tensor | None
    group_index_K: Tensor | None
    scheme: Scheme
    input_scale: Tensor | None = None
    global_scale: Tensor | None = None
    computed_in: torch.dtype | None = None

    def rows(self, rows: slice) -> QuantizedLinear:
        """Some rows, with a scale for each; where ``rows`` begins and ends need not fit blocks."""
        import torch

        zeros = None if self.zeros_NG is None else self.zeros_NG[rows]
        scales, scheme = self.scales_NG, self.scheme
        if scheme.block_rows == 1:
            scales = scales[rows]
        else:
            picked = torch.arange(*rows.indices(len(self.codes_NK)), device=scales.device) // scheme.block_rows
            scales, scheme = scales[picked], replace(scheme, block_rows=1)
        return replace(self, codes_NK=self.codes_NK[rows], scales_NG=scales, zeros_NG=zeros, scheme=scheme)

    def dequantize(self) -> Tensor:
        """The weight ``[N, K]`` in float32: ``(code - zero) * scale`` of the column's group, or of floats their number
        times the scale."""
        import torch

        from qconv import e2m1

        # The one large temporary; from here on in place.
        if self.scheme.is_fp4:
            w_NK = e2m1.decode(self.codes_NK).contiguous()
        else:
            dtype = self.computed_in or torch.float32
            w_NK = self.codes_NK.to(dtype, memory_format=torch.contiguous_format)
        n, k = w_NK.shape
        scales, zeros = self.scales_NG.to(w_NK.dtype), None if self.zeros_NG is None else self.zeros_NG.to(w_NK.dtype)
        if self.scheme.block_rows > 1:
            scales = scales.repeat_interleave(self.scheme.block_rows, dim=0)[:n]
        size = k if scales.shape[1] == 1 else self.scheme.group_size
        target = w_NK
        if self.group_index_K is None and k == scales.shape[1] * size:
            target = w_NK.view(n, -1, size)
            scales, zeros = scales.unsqueeze(-1), None if zeros is None else zeros.unsqueeze(-1)
        else:
            index = self.group_index_K
            index = torch.arange(k, device=w_NK.device) // size if index is None else index.long()
            scales, zeros = scales[:, index], None if zeros is None else zeros[:, index]
        if self.scheme.kind == "int":
            target -= self.scheme.mid_code if zeros is None else zeros
        target *= scales
        return w_NK.float()


class _OfLayer:
    """What changes the weight of a layer, and may change its bias."""

    weight: str

    @property
    def module(self) -> str:
        return self.weight.removesuffix(".weight")

    @property
    def bias(self) -> str:
        return self.module + ".bias"


@dataclass(frozen=True, kw_only=True)
class LoraDelta(_OfLayer):
    """Where the low-rank update of one base weight lies in an adapter, and how it is scaled.

    The update is ``scaling * (B @ A)``, transposed when the base stores ``[in, out]``
    (LoRA, Hu et al. 2021, section 4.1).

    Attributes:
        weight: base tensor that changes, e.g. ``model.layers.0.self_attn.q_proj.weight``.
        a: adapter tensor A ``[R, in]``.
        b: adapter tensor B ``[out, R]``.
        rank: R of this module, after ``rank_pattern``; of A and B the first R components count.
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA, after both patterns.
        transposed: the base weight is stored ``[in, out]`` (``fan_in_fan_out``, Conv1D).
        b_bias: adapter tensor ``[out]`` added, scaled, to the layer's bias (``lora_bias``), or None.
        magnitude: adapter tensor ``[out]`` of DoRA (Liu et al. 2024, equation 5), or None.
        singular: adapter tensor ``[R, 1]`` that multiplies the rows of A (AdaLoRA, Zhang et al. 2023, equation 3;
            KaSA, Wang et al. 2024: ``[R]``), or None.
        pooled: so many neighbouring inputs are summed before A, ``[R, in / pooled]`` (QA-LoRA, Xu et al. 2023).
        elastic_a: adapter tensor ``[1]``: that times the means of R equal runs of inputs is added to what A gives
            (IR-QLoRA, Qin et al. 2024), or None.
        elastic_b: adapter tensor ``[1]``: that times what A gives, each in its run of outputs, is added to B's.
        dropped: smallest singular components that the base weight lost when training began (KaSA).
        of_embedding: the weight ``[V, D]`` is looked up, not multiplied: A is ``[R, V]``, B ``[D, R]``, and the update
            is transposed.
    """

    weight: str
    a: str
    b: str
    rank: int
    scaling: float
    transposed: bool = False
    b_bias: str | None = None
    magnitude: str | None = None
    singular: str | None = None
    pooled: int = 1
    elastic_a: str | None = None
    elastic_b: str | None = None
    dropped: int = 0
    of_embedding: bool = False


@dataclass(frozen=True, kw_only=True)
class Transform(_OfLayer):
    """Where an update that is not made of LoRA's factors lies in an adapter.

    It names tensors and numbers; the formula of its kind is `merge/kinds`' to know.

    Attributes:
        kind: the ``peft_type``.
        weight: base tensor that changes.
        tensors: part -> adapter tensor, the ones that layers share included.
        settings: what the formula needs of the config.
        transposed: the base weight is stored ``[in, out]`` (Conv1D).
        changes_weight, changes_bias: whether the layer's weight changes, and its bias.
    """

    kind: str
    weight: str
    tensors: Mapping[str, str]
    settings: Mapping[str, Any]
    transposed: bool = False
    changes_weight: bool = True
    changes_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainedRows:
    """Rows of an embedding or a head that were trained by themselves.

    Attributes:
        weight: base tensor ``[V, D]`` whose rows they replace.
        tensor: adapter tensor ``[len(rows), D]``.
        rows: which ones, each once.
    """

    weight: str
    tensor: str
    rows: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A PEFT adapter that was checked against its base: every tensor in it has a place to go.

    Attributes:
        tensors: the adapter's own tensors, read lazily.
        deltas: low-rank updates by base tensor name.
        replacements: base tensor name -> adapter tensor that replaces it whole
            (biases, ``modules_to_save``).
        transforms: updates of other kinds by base tensor name; an adapter has one kind.
        rows: by base tensor name, rows of embedding and head that are replaced (trainable tokens).
        trained_on: the base quantization recorded by ``qconv train``, or None when unknown.
        backend: where the base was quantized for training; a GPU unless the record says otherwise.
        name_rules: by which names that are not peft's own were read (see `merge/spellings.py`).
    """

    tensors: Checkpoint
    deltas: Mapping[str, LoraDelta]
    replacements: Mapping[str, str]
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    rows: Mapping[str, TrainedRows] = field(default_factory=dict)
    trained_on: BnbKind | None = None
    backend: BnbBackend = "cuda"
    name_rules: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The ``peft_type``."""
        return str(self.tensors.config.get("peft_type"))

    @property
    def location(self) -> str:
        return self.tensors.location
