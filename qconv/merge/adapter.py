"""Reading a PEFT adapter against its base: every tensor finds its place, or it is an error.

Method: LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023) and DoRA (Liu et al. 2024) as peft 0.21
saves them, with trained biases, ``lora_bias`` and ``modules_to_save``, and the other kinds of `kinds/`. Nothing is
rounded here.

LoRA on bare parameters is read for the mixtures of experts in `experts.py` (`expert_adapter.py`). Left out, and refused
by name: the kinds that `kinds/refused.py` lists, LoRA on convolutions and other bare parameters, pickled adapters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qconv.adapter_configs import AdapterOptions
from qconv.checkpoint import open_adapter_files
from qconv.errors import AdapterError, NumericsError
from qconv.merge.adapter_config import parse_adapter_config
from qconv.merge.adapter_names import named_as_in_base, sort_names
from qconv.merge.adapter_source import AdapterSource
from qconv.merge.expert_adapter import ExpertAdapter, expert_adapter
from qconv.merge.kinds import LOW_RANK, Kind
from qconv.merge.lora_layers import find_deltas
from qconv.merge.spellings import TORCHTUNE, HalvedHeads
from qconv.merge.token_rows import check_number_of_rows, find_rows
from qconv.merge.transform import find_transforms
from qconv.merge.vocabulary import find_vocabulary
from qconv.merge.whole_tensors import drop_unchanged, find_replacements
from qconv.records import read_train_record
from qconv.types import Adapter, Checkpoint, LoraDelta, Transform

_READERS = 4


def load_adapter(
    source: str | Path,
    base: Checkpoint,
    revision: str | None = None,
    linear_weights: Collection[str] | None = None,
    options: AdapterOptions | None = None,
) -> Adapter:
    """Opens an adapter by folder or hub id and checks all of it against its base.

    Every adapter tensor is read once, so that NaN or infinity shows before long work starts.

    Args:
        source: folder or hub id.
        base: view with logical weights (dequantized). Names, shapes and config are used; data only
            of tensors that the adapter also stores whole.
        revision: of the hub id.
        linear_weights: the base tensors that are weights of linear layers, when the caller knows
            them; a LoRA on any other tensor (a norm, an embedding) is then refused.
        options: what its config does not say of it.

    Raises:
        CheckpointError: the folder or its files are missing or malformed.
        AdapterError: the adapter cannot be merged exactly into this base, or was never trained
            (its update is zero in every module).
        NumericsError: NaN or infinity in an adapter tensor.
    """
    folder = open_adapter_files(source, revision)
    config = parse_adapter_config(folder.config, str(folder.folder / "adapter_config.json"))
    where = str(folder.folder / "adapter_model.safetensors")
    tensors = expert_adapter(folder, base, where)
    names = named_as_in_base(sort_names(tensors.specs(), folder.config["peft_type"], where), base.specs(), where)
    if isinstance(tensors, ExpertAdapter):
        names.trained_as.update(tensors.pattern_names)
    if TORCHTUNE in names.rules:
        tensors = HalvedHeads(folder, names.peft, base.config, where)
    record = read_train_record(folder.folder)
    touched = {module + ".weight" for module in [*names.layers, *names.rows]} | names.plain.keys()
    opened = AdapterSource(
        files=tensors,
        where=where,
        config=config,
        options=options or AdapterOptions(),
        names=names,
        base=base,
        vocabulary=find_vocabulary(base, touched),
    )
    zeros = _check_values(opened)
    replacements = find_replacements(opened)
    deltas = find_deltas(opened, replacements, linear_weights)
    transforms = find_transforms(opened, replacements, linear_weights)
    rows = find_rows(opened)
    check_number_of_rows(opened, rows, replacements)
    if config.kind is not None:
        _check_changes(transforms, config.kind, zeros, where)
    elif tensors.config["peft_type"] in LOW_RANK:
        _check_trained(deltas, zeros, where)
    elif not names.tuned and not rows:
        raise AdapterError(f"{where}: holds nothing that peft_type {tensors.config['peft_type']} trains")
    return Adapter(
        tensors=tensors,
        deltas=deltas,
        replacements=drop_unchanged(opened, replacements),
        transforms=transforms,
        rows=rows,
        trained_on=None if record is None else record.trained_on,
        backend="cuda" if record is None else record.backend,
        name_rules=names.rules,
    )


def _check_values(source: AdapterSource) -> set[str]:
    """Reads every tensor once; returns the names of those that are all zero."""
    files, where, kind = source.files, source.where, source.config.kind
    layers = [*source.names.layers.values(), source.names.shared]
    parts = {} if kind is None else {tensor: part.split(".")[0] for parts in layers for part, tensor in parts.items()}
    for name, spec in files.specs().items():
        is_index = kind is not None and parts.get(name) in kind.indices
        if spec.dtype.is_floating_point is is_index:
            if is_index:
                raise AdapterError(f"{where}: tensor {name!r}: expected integers, found {spec.dtype}")
            raise AdapterError(
                f"{where}: tensor {name!r}: expected floating point values, found {spec.dtype}; "
                "save the adapter from an unquantized layer"
            )

    def is_zero(name: str) -> bool:
        tensor = files.read(name).float()
        if not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise NumericsError(
                f"{where}: tensor {name!r} has NaN or infinity in {bad} of {tensor.numel()} values; training diverged "
                "or the file is damaged: use an earlier checkpoint of the adapter"
            )
        return not tensor.any()

    with ThreadPoolExecutor(_READERS, "qconv-adapter") as pool:  # hundreds of small tensors, each alone on a core
        return {name for name, zero in zip(files.specs(), pool.map(is_zero, files.specs()), strict=True) if zero}


def _check_changes(transforms: Mapping[str, Transform], kind: Kind, zeros: set[str], where: str) -> None:
    """The same for other kinds, as far as zeros tell."""
    if not transforms:
        expected = kind.when_no_layers or f"expected {', '.join(sorted(kind.parts))}"
        raise AdapterError(f"{where}: holds no layer of peft_type {kind.peft_type}; {expected}")
    if all(_vanishes(t.tensors, kind, zeros) for t in transforms.values()):
        parts = kind.vanishing or kind.vanishing_together
        raise AdapterError(
            f"{where}: {' or '.join(sorted(parts))} is zero in all {len(transforms)} modules: the adapter was "
            "never trained, or its tensors were saved before training; merging it would change nothing"
        )


def _vanishes(tensors: Mapping[str, str], kind: Kind, zeros: set[str]) -> bool:
    if any(tensors.get(part) in zeros for part in kind.vanishing):
        return True
    terms = kind.vanishing_together
    return bool(terms) and all(tensor in zeros for part, tensor in tensors.items() if part in terms)


def _check_trained(deltas: Mapping[str, LoraDelta], zeros: set[str], where: str) -> None:
    """Refuses an adapter whose LoRA is exactly zero everywhere, whatever else it holds.

    One training step makes B non-zero in every module it reaches, so this is a save that went wrong.
    """
    if not deltas:
        raise AdapterError(f"{where}: holds no LoRA layer; expected lora_A and lora_B tensors")
    biases = {delta.b_bias for delta in deltas.values()} - {None}
    if all(not {delta.a, delta.b, delta.singular}.isdisjoint(zeros) for delta in deltas.values()) and biases <= zeros:
        raise AdapterError(
            f"{where}: lora_B (or lora_A) is zero in all {len(deltas)} modules: the adapter was never trained, or its "
            "tensors were saved before training; merging it would change nothing"
        )
