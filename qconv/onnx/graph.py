"""The graph of an ONNX file and where its initializers lie; no weight is read.

Weights are external data (ONNX, docs/ExternalData.md): a file name, an offset and a length beside each initializer.
Only plain names of files in the folder of the model are followed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from qconv.errors import CheckpointError, UsageError
from qconv.onnx.package import onnx_package

# onnx.TensorProto.DataType
DTYPES: Mapping[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    6: torch.int32,
    7: torch.int64,
    10: torch.float16,
    16: torch.bfloat16,
}


@dataclass(frozen=True, kw_only=True)
class Initializer:
    """Where the data of an initializer lies."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    offset: int

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Node:
    """An operation; ``inputs`` of weights are keys of `Graph.initializers`."""

    name: str
    operation: str
    inputs: Sequence[str]
    attributes: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Graph:
    nodes: Sequence[Node]
    initializers: Mapping[str, Initializer]


def load_proto(file: Path) -> Any:
    """The model as the onnx package has it, without its external data.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return onnx_package().load(str(file), load_external_data=False)
    except UsageError:  # the package is missing, and nothing is wrong with the file
        raise
    except Exception as error:  # of protobuf and of the file system
        raise CheckpointError(
            f"{file}: cannot be read as an ONNX model ({type(error).__name__}: {error}); make the folder again"
        ) from error


def read_graph(file: Path) -> Graph:
    """Nodes and initializers of a model file.

    Raises:
        CheckpointError: a damaged file, data that is missing or lies outside of the folder.
    """
    proto = load_proto(file)
    initializers = {}
    for tensor in proto.graph.initializer:
        if tensor.name in initializers:
            raise CheckpointError(f"{file}: initializer {tensor.name!r} stands twice")
        initializers[tensor.name] = _initializer(file, tensor)
    nodes = [
        Node(
            name=node.name,
            operation=node.op_type,
            inputs=tuple(node.input),
            attributes={a.name: int(a.i) for a in node.attribute if a.type == 2},  # AttributeProto.INT
        )
        for node in proto.graph.node
    ]
    return Graph(nodes=nodes, initializers=initializers)


def _initializer(file: Path, tensor: Any) -> Initializer:
    where = f"{file}: initializer {tensor.name!r}"
    if tensor.data_type not in DTYPES:
        raise CheckpointError(f"{where} has the ONNX data type {tensor.data_type}, which is not read")
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if "location" not in entries:
        raise CheckpointError(f"{where} lies in the model file itself; expected external data beside it")
    location = entries["location"]
    if Path(location).name != location or location in ("", ".", "..") or "\\" in location:
        raise CheckpointError(f"{where} names the file {location!r}; only plain names in the folder are read")
    shape, dtype = tuple(tensor.dims), DTYPES[tensor.data_type]
    num_bytes, data = prod(shape) * dtype.itemsize, file.parent / location
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", num_bytes))
        size = data.stat().st_size
    except ValueError as error:
        raise CheckpointError(f"{where}: its place in {location} is no number ({error})") from error
    except OSError as error:
        raise CheckpointError(f"{where}: {data} cannot be read ({error}); fetch the folder again") from error
    if min((*shape, offset)) < 0 or length != num_bytes or offset + num_bytes > size:
        raise CheckpointError(
            f"{where} of {dtype} {shape} begins at {offset} and takes {length} bytes of {location}, which has {size}; "
            "the file is cut off, or of another model"
        )
    return Initializer(name=tensor.name, shape=shape, dtype=dtype, file=data, offset=offset)
