"""Whether a model divides by a number of GPUs as vLLM divides it, from names and shapes alone.

Source: vLLM 0.32. Heads: ``ModelConfig.verify_with_parallel_config``, ``QKVParallelLinear`` (vllm/config/model.py,
vllm/model_executor/layers/linear.py): query heads are split; key and value heads are split, or copied where there are
fewer of them than GPUs. Linears: ``ColumnParallelLinear`` splits rows of the weight, ``RowParallelLinear`` columns.
Quantized: ``verify_group_size_divides_partition`` (vllm/distributed/utils.py), ``PackedvLLMParameter`` (codes that
share a word stay together), ``validate_fp8_block_shape`` (quantization/utils/fp8_utils.py), Marlin's tiles
``GPTQ_MARLIN_MIN_THREAD_N`` and ``_K`` (quantization/utils/marlin_utils.py): releases before 0.32 refuse Marlin for a
linear that they do not divide, later ones fill it up with zeros. SGLang and TGI took these rules over.

An error is what an engine refuses to load; a warning is what it runs slower or only in some releases.

Left out: pipeline and expert parallelism, and linears whose names say nothing of how engines split them (a warning).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qconv.decoder_shape import DecoderShape
from qconv.errors import SchemeError
from qconv.types import Scheme, TensorSpec

COLUMN = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "q_b_proj", "kv_b_proj"})
COLUMN |= {"gate_proj", "up_proj", "gate_up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "w1", "w3", "lm_head"}
ROW = frozenset({"o_proj", "down_proj", "out_proj", "dense", "fc2", "fc_out", "c_proj", "dense_4h_to_h", "w2"})
REPLICATED = frozenset({"q_a_proj", "kv_a_proj_with_mqa", "gate", "router", "shared_expert_gate"})
_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_FUSED_ON_DISK = ("qkv_proj", "query_key_value")

MARLIN_N, MARLIN_K = 64, 128
MARLIN_GROUPS = (-1, 32, 64, 128)
CUTLASS = 16  # vllm/_custom_ops.py, cutlass_scaled_mm: other sizes go to a Triton kernel
TRIED = (1, 2, 4, 8, 16)
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One linear ``[N, K]``.

    Attributes:
        layout: on disk: ``"plain"``, ``"bnb-..."`` or a key of `convert.FORMATS`.
        scheme: of its codes; None where the layout has none.
    """

    module: str
    out_features: int
    in_features: int
    layout: str = "plain"
    scheme: Scheme | None = None

    @property
    def role(self) -> str:
        return self.module.rpartition(".")[2]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Attributes:
    is_error: an engine refuses it.
    modules: the linears that it is about; empty = the model.
    text: what does not divide, with the numbers.
    """

    is_error: bool
    modules: tuple[str, ...] = ()
    text: str

    def __str__(self) -> str:
        if not self.modules:
            return self.text
        more = f" and {len(self.modules) - 1} like it" if len(self.modules) > 1 else ""
        return f"{self.modules[0]}{more}: {self.text}"


@dataclass(frozen=True, kw_only=True)
class _Share:
    """What one of the GPUs gets of a linear.

    Attributes:
        parts: rows of each linear that lies in it (a fused one has several).
        fused_rows: of all that the engine runs together with it.
        columns: of the weight.
    """

    parts: tuple[int, ...]
    fused_rows: int
    columns: int


def parallel_linears(
    specs: Mapping[str, TensorSpec],
    layouts: Mapping[str, str],
    schemes: Mapping[str, Scheme],
    is_transposed: bool,
) -> list[Linear]:
    """The linears of a model that engines split, and all that are quantized.

    Args:
        specs: logical weights ``[N, K]``, or ``[K, N]`` where ``is_transposed``.
        layouts: on disk, of the modules that are quantized.
        schemes: of these, where the layout has one.
    """
    found = []
    for name, spec in specs.items():
        module = name.removesuffix(".weight")
        if module == name or len(spec.shape) != 2:
            continue
        if module in layouts or module.rpartition(".")[2] in COLUMN | ROW:
            rows, columns = reversed(spec.shape) if is_transposed else spec.shape
            layout = layouts.get(module, "plain")
            found.append(
                Linear(
                    module=module,
                    out_features=rows,
                    in_features=columns,
                    layout=layout,
                    scheme=schemes.get(module),
                )
            )
    return found


def find_misfits(shape: DecoderShape, linears: Iterable[Linear], num_gpus: int) -> list[Finding]:
    """Everything that does not divide by ``num_gpus``; equal findings of several linears are one."""
    found = [Finding(is_error=True, text=text) for text in _misfit_heads(shape, num_gpus)]
    if found:
        return found  # shares of linears follow from heads
    gathered: dict[tuple[str, bool, str], list[str]] = {}
    everything = list(linears)
    siblings = {linear.module: linear for linear in everything}
    for linear in everything:
        for is_error, text in _misfits(shape, linear, siblings, num_gpus):
            gathered.setdefault((linear.role, is_error, text), []).append(linear.module)
    found = [
        Finding(is_error=is_error, modules=tuple(modules), text=text)
        for (_, is_error, text), modules in gathered.items()
    ]
    return sorted(found, key=lambda finding: not finding.is_error)


def check_parallel(shape: DecoderShape, linears: Sequence[Linear], num_gpus: int, what: str) -> list[str]:
    """The warnings, in words.

    Raises:
        SchemeError: the model does not divide; says where, with the numbers, and which numbers of GPUs do.
    """
    found = find_misfits(shape, linears, num_gpus)
    errors = [str(finding) for finding in found if finding.is_error]
    if errors:
        lines = [f"  {text}" for text in errors[:_SHOWN]]
        if len(errors) > _SHOWN:
            lines.append(f"  and {len(errors) - _SHOWN} more")
        fitting = [n for n in TRIED if not any(finding.is_error for finding in find_misfits(shape, linears, n))]
        advice = f"--tp {', '.join(map(str, fitting))} would" if fitting else "no number of GPUs would"
        raise SchemeError("\n".join([f"{what} does not divide by {num_gpus} GPUs:", *lines, f"{advice}, of {TRIED}"]))
    return [str(finding) for finding in found]


def share_of(shape: DecoderShape, module: str, shape_NK: tuple[int, ...], num_gpus: int) -> float:
    """The part of a tensor that each GPU holds: 1 where it is copied."""
    role = module.rpartition(".")[2]
    if role in ("k_proj", "v_proj") and num_gpus > shape.num_kv_heads:
        return 1 / shape.num_kv_heads
    if role in _FUSED_ON_DISK and num_gpus > shape.num_kv_heads:
        return sum(_parts(shape, role, shape_NK[0], num_gpus)) / shape_NK[0]
    is_split = role in COLUMN or role in ROW or role in ("embed_tokens", "wte", "word_embeddings")
    return 1 / num_gpus if is_split and len(shape_NK) > 1 else 1.0


def _misfit_heads(shape: DecoderShape, num_gpus: int) -> Iterator[str]:
    if shape.num_heads % num_gpus:
        yield f"{shape.num_heads} attention heads are no multiple of {num_gpus}"
    few, many = sorted((shape.num_kv_heads, num_gpus))
    if shape.latent is None and many % few:
        yield (
            f"{shape.num_kv_heads} key and value heads can be neither split among {num_gpus} GPUs nor copied to equal "
            "numbers of them"
        )


def _parts(shape: DecoderShape, role: str, rows: int, num_gpus: int) -> tuple[int, ...]:
    """Rows that one GPU gets, of each linear in a weight; fractions are rounded down, after they were refused."""
    copies = max(1, num_gpus // shape.num_kv_heads)
    if role in ("k_proj", "v_proj"):
        return (rows * copies // num_gpus,)
    if role in _FUSED_ON_DISK:
        keys = shape.num_kv_heads * shape.head_dim
        kept = keys * copies // num_gpus
        return ((rows - 2 * keys) // num_gpus, kept, kept)
    if role == "gate_up_proj":
        return (rows // 2 // num_gpus,) * 2
    return (rows // num_gpus,)


def _share(shape: DecoderShape, linear: Linear, siblings: dict[str, Linear], num_gpus: int) -> _Share:
    if linear.role in ROW:
        rows = linear.out_features
        return _Share(parts=(rows,), fused_rows=rows, columns=linear.in_features // num_gpus)
    if linear.role not in COLUMN:
        rows = linear.out_features
        return _Share(parts=(rows,), fused_rows=rows, columns=linear.in_features)
    parts = _parts(shape, linear.role, linear.out_features, num_gpus)
    group = next((roles for roles in (_QKV, _GATE_UP) if linear.role in roles), (linear.role,))
    prefix = linear.module.removesuffix(linear.role)
    fused = [siblings[prefix + role] for role in group if prefix + role in siblings]
    rows = sum(sum(_parts(shape, one.role, one.out_features, num_gpus)) for one in fused)
    return _Share(parts=parts, fused_rows=rows, columns=linear.in_features)


def _misfits(
    shape: DecoderShape, linear: Linear, siblings: dict[str, Linear], num_gpus: int
) -> Iterator[tuple[bool, str]]:
    """Whether each is an error, and what it is."""
    if linear.role not in COLUMN | ROW | REPLICATED:
        if num_gpus > 1 and linear.layout != "plain":
            yield False, f"its name does not say how engines split it among {num_gpus} GPUs; not checked"
        return
    if linear.layout.startswith("bnb-") and num_gpus > 1:
        yield True, "engines do not split weights that bitsandbytes quantized; take another target"
        return
    by_row = linear.role in ROW
    size = linear.in_features if by_row else linear.out_features
    # Keys and values follow from heads, and engines fill a vocabulary up.
    is_free = linear.role in REPLICATED or linear.role in ("k_proj", "v_proj", "lm_head", *_FUSED_ON_DISK)
    if not is_free and size % num_gpus:
        yield True, f"{size} {'inputs' if by_row else 'outputs'} are no multiple of {num_gpus}"
        return
    scheme = linear.scheme
    if scheme is None:
        return
    share = _share(shape, linear, siblings, num_gpus)
    if scheme.kind == "int" and (scheme.bits == 4 or not scheme.dynamic_activations):
        yield from _misfit_groups(linear, scheme, share, num_gpus)
        yield from _misfit_words(linear, scheme, share)
        yield from _misfit_tiles(scheme, share)
    elif scheme.is_fp4:
        if linear.role in ROW and share.columns % scheme.group_size:
            yield (
                True,
                f"{linear.in_features} / {num_gpus} = {share.columns} inputs cut groups of {scheme.group_size}, "
                "the only size of this layout",
            )
    elif scheme.block_rows > 1:
        yield from _misfit_blocks(linear, scheme, share, siblings, num_gpus)
    elif share.fused_rows % CUTLASS or share.columns % CUTLASS:
        yield (
            False,
            f"{share.fused_rows} x {share.columns} on each GPU is no multiple of {CUTLASS} in both: vLLM takes a "
            "slower kernel than CUTLASS",
        )


def _misfit_groups(linear: Linear, scheme: Scheme, share: _Share, num_gpus: int) -> Iterator[tuple[bool, str]]:
    size = scheme.group_size
    if linear.role not in ROW or num_gpus == 1:
        return
    fitting = next((group for group in (128, 64, 32) if share.columns % group == 0), -1)
    if size == -1 and linear.layout == "awq":
        # AutoAWQMarlinLinearMethod counts groups of the whole row in a part of it, and finds none.
        advice = "" if fitting == -1 else f"; --group-size {fitting} would fit"
        yield True, f"the awq layout has no scale of a row that is split among GPUs{advice}"
    elif size != -1 and share.columns % size:
        whole = fitting == -1
        advice = "" if whole and linear.layout == "awq" else f"; --group-size {fitting} would fit"
        advice += " (a scale for each row, on every GPU)" if whole and advice else ""
        yield True, f"{linear.in_features} / {num_gpus} = {share.columns} inputs cut groups of {size}{advice}"


def _misfit_words(linear: Linear, scheme: Scheme, share: _Share) -> Iterator[tuple[bool, str]]:
    """Codes and zero points lie several in a word, which goes to one GPU."""
    filling = 32 // math.gcd(32, scheme.bits)
    words = "a word" if 32 % scheme.bits == 0 else "whole words"
    if linear.layout != "awq" and share.columns * scheme.bits % 32:
        yield True, f"{share.columns} inputs on each GPU do not fill words of 32 bits with {scheme.bits}-bit codes"
    has_rows = linear.layout in ("awq", "gptq", "gptq_v2") or not scheme.symmetric
    uneven = next((rows for rows in share.parts if rows * scheme.bits % 32), None)
    if has_rows and uneven is not None:
        what = "codes" if linear.layout == "awq" else "zero points"
        yield True, f"{uneven} outputs on each GPU are no multiple of {filling}, the {what} in {words}"


def _misfit_tiles(scheme: Scheme, share: _Share) -> Iterator[tuple[bool, str]]:
    if scheme.group_size not in MARLIN_GROUPS:
        yield False, f"Marlin kernels have no groups of {scheme.group_size}, only {MARLIN_GROUPS}"
    elif share.fused_rows % MARLIN_N or share.columns % MARLIN_K:
        yield (
            False,
            f"{share.fused_rows} outputs and {share.columns} inputs on each GPU are no multiples of Marlin's "
            f"{MARLIN_N} and {MARLIN_K}: vLLM fills them up with zeros since 0.32 and takes no Marlin kernel before",
        )


def _misfit_blocks(
    linear: Linear, scheme: Scheme, share: _Share, siblings: dict[str, Linear], num_gpus: int
) -> Iterator[tuple[bool, str]]:
    if linear.role in ROW:
        if num_gpus > 1 and share.columns % scheme.group_size:
            yield (
                True,
                f"{linear.in_features} / {num_gpus} = {share.columns} inputs cut blocks of {scheme.group_size}; "
                "take fp8, which has a scale for each row",
            )
        return
    group = next((roles for roles in (_QKV, _GATE_UP) if linear.role in roles), (linear.role,))
    prefix = linear.module.removesuffix(linear.role)
    is_last = linear.role == group[-1] or not any(prefix + role in siblings for role in group if role != linear.role)
    checked = (
        share.parts if num_gpus > 1 or not is_last else share.parts[:-1]
    )  # the last of a fused one may end anywhere
    uneven = next((rows for rows in checked if rows % scheme.block_rows), None)
    if uneven is not None and linear.role not in REPLICATED:
        yield (
            True,
            f"{uneven} outputs on each GPU cut blocks of {scheme.block_rows} rows; take fp8, which has a scale for "
            "each row",
        )
