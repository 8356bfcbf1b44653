"""Reading an ONNX folder: its initializers under the model's names, lazily.

What the model builder of ONNX Runtime GenAI calls its nodes tells which module one is. ``MatMul`` stores the transposed
weight ``[K, N]``; q, k and v may lie in one node, one behind the other. Linears in ``MatMulNBits`` appear as
``MODULE.MatMulNBits.qweight``, ``.scales`` and ``.qzeros``, one row for each output feature, for
`convert.matmul_nbits` to decode; biases that are zero are left out of a graph, and are read as zeros.

Source: onnxruntime-genai 0.18, ``models/builders/base.py`` (names), and ONNX Runtime's ContribOperators.md.

Left out: tables of embeddings in blocks (``GatherBlockQuantized``), and families other than those that are written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qconv.errors import CheckpointError
from qconv.onnx.builder import GENAI_CONFIG, check_family
from qconv.onnx.graph import Initializer, Node, read_graph
from qconv.read_bytes import read_to_host
from qconv.stored_tensors import FileCheckpoint
from qconv.types import TensorSpec

_NODE = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+)/(MatMul\w*|Add)")
_NORM = re.compile(r"model\.layers\.(\d+)\.(?:attn\.)?(\w+?)(?:\.layernorm)?\.weight")
_CACHES = ("cos_cache", "sin_cache")  # rotary angles, which the config tells
_DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
LAYERS_NAME = "model.layers"
EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head", "model.norm.weight"


@dataclass(frozen=True)
class _Columns:
    """Columns of a stored matrix ``[K, N]``, which are the rows of a weight."""

    stored: Initializer
    begin: int
    end: int


class OnnxCheckpoint(FileCheckpoint):
    """A `Checkpoint` over an ONNX folder.

    Args:
        folder: that holds the graph.
        config: the model's ``config.json``, which lies beside it.
        file: the graph.

    Raises:
        CheckpointError: a damaged file, or nodes and weights that are not read.
    """

    def __init__(self, folder: Path, config: dict[str, Any], file: Path):
        super().__init__(folder, config)
        check_family(config, str(folder))
        self.graph_file = file
        self._columns: dict[str, _Columns] = {}
        self._zeros: set[str] = set()
        graph = read_graph(file)
        self._unread = dict(graph.initializers)
        self.modules: dict[str, dict[str, Any]] = {}
        for node in graph.nodes:
            self._add_node(node)
        self._add_rest()
        self._add_zero_biases()
        strange = [name for name in self._unread if name not in _CACHES]
        if strange:
            raise CheckpointError(
                f"{file}: initializer {strange[0]!r} is none that a {config['model_type']} is read with"
            )
        config["quantization_config"] = {"quant_method": "onnx", "modules": self.modules}
        config["dtype"] = _DTYPE_NAMES[self._specs[EMBEDDING].dtype]

    def _add_node(self, node: Node) -> None:
        stored = [self._unread[name] for name in node.inputs if name in self._unread]
        match = _NODE.fullmatch(node.name)
        is_head = node.name.startswith("/lm_head/MatMul")
        if not stored or (match is None and not is_head):
            return
        parts = {HEAD: 0} if match is None else self._parts(match)
        if node.operation == "MatMul":
            self._add_transposed(parts, stored[0])
        elif node.operation == "MatMulNBits":
            self._add_blocks(parts, node)
        elif node.operation == "Add":
            self._add_bias(parts, stored[0])
        else:
            return
        for initializer in stored:
            self._unread.pop(initializer.name, None)

    def _parts(self, match: re.Match[str]) -> dict[str, int]:
        """The modules of a node, and how many rows each has; 0 = all there are."""
        block, where, role = match[1], {"attn": "self_attn", "mlp": "mlp"}[match[2]], match[3]
        prefix = f"model.layers.{block}.{where}."
        if role != "qkv_proj":
            return {prefix + role: 0}
        heads, width = int(self.config["num_attention_heads"]), _head_width(self.config)
        keys = int(self.config.get("num_key_value_heads") or heads)
        return {prefix + "q_proj": heads * width, prefix + "k_proj": keys * width, prefix + "v_proj": keys * width}

    def _add_transposed(self, parts: Mapping[str, int], stored: Initializer) -> None:
        k, n = self._matrix(stored)
        for module, begin, end in self._ranges(parts, n, stored):
            name = f"{module}.weight"
            if module == HEAD and self.config.get("tie_word_embeddings"):
                name = EMBEDDING
            self._columns[name] = _Columns(stored, begin, end)
            self._specs[name] = TensorSpec(name=name, shape=(end - begin, k), dtype=stored.dtype)
            self._places[name] = (stored.file, stored.offset)

    def _add_blocks(self, parts: Mapping[str, int], node: Node) -> None:
        """Codes [N, G, bytes of a block], scales [N * G], zero points [N * bytes of a row of them]."""
        n, bits = node.attributes["N"], node.attributes["bits"]
        inputs = dict(zip(("qweight", "scales", "qzeros"), node.inputs[1:], strict=False))
        if len(node.inputs) > 4 and any(node.inputs[4:]):
            raise CheckpointError(f"{self.graph_file}: node {node.name!r} has a group index or a bias; not read")
        for kind, initializer in ((kind, self._unread[name]) for kind, name in inputs.items() if name):
            row = (initializer.num_bytes // initializer.dtype.itemsize) // n
            shape = initializer.shape[1:] if len(initializer.shape) == 3 else (row,)
            for module, begin, end in self._ranges(parts, n, initializer):
                name = f"{module}.MatMulNBits.{kind}"
                self._specs[name] = TensorSpec(name=name, shape=(end - begin, *shape), dtype=initializer.dtype)
                self._places[name] = (initializer.file, initializer.offset + begin * row * initializer.dtype.itemsize)
        for module in parts:
            self.modules[module] = {
                "bits": bits,
                "group_size": node.attributes["block_size"],
                "symmetric": not inputs.get("qzeros"),
                "in_features": node.attributes["K"],
            }

    def _add_bias(self, parts: Mapping[str, int], stored: Initializer) -> None:
        for module, begin, end in self._ranges(parts, stored.shape[0], stored):
            self._add_vector(f"{module}.bias", stored, begin, end)

    def _add_vector(self, name: str, stored: Initializer, begin: int, end: int) -> None:
        self._specs[name] = TensorSpec(name=name, shape=(end - begin,), dtype=stored.dtype)
        self._places[name] = (stored.file, stored.offset + begin * stored.dtype.itemsize)

    def _ranges(self, parts: Mapping[str, int], n: int, stored: Initializer) -> list[tuple[str, int, int]]:
        found, begin = [], 0
        for module, rows in parts.items():
            found.append((module, begin, begin + (rows or n)))
            begin += rows or n
        if begin != n:
            raise CheckpointError(
                f"{self.graph_file}: initializer {stored.name!r} has {n} rows, {' and '.join(parts)} have {begin}"
            )
        return found

    def _matrix(self, stored: Initializer) -> tuple[int, int]:
        if len(stored.shape) != 2:
            raise CheckpointError(f"{self.graph_file}: initializer {stored.name!r} has the shape {stored.shape}")
        return stored.shape[0], stored.shape[1]

    def _add_rest(self) -> None:
        """The embedding and the norms, which go by the names of their initializers."""
        for name, stored in list(self._unread.items()):
            match = _NORM.fullmatch(name)
            if name == EMBEDDING:
                v, h = self._matrix(stored)
                self._specs[name] = TensorSpec(name=name, shape=(v, h), dtype=stored.dtype)
                self._places[name] = (stored.file, stored.offset)
            elif match is not None and len(stored.shape) == 1:
                own = FINAL_NORM if match[2] == "final_norm_layernorm" else _norm_name(match[1], match[2])
                self._add_vector(own, stored, 0, stored.shape[0])
            else:
                continue
            self._unread.pop(name)
        if EMBEDDING not in self._specs:
            raise CheckpointError(f"{self.graph_file}: no embedding {EMBEDDING!r} that is read")

    def _add_zero_biases(self) -> None:
        wanted: tuple[str, ...] = ()
        if self.config.get("attention_bias") or self.config["model_type"] == "qwen2":
            wanted = ("q_proj", "k_proj", "v_proj")
            wanted += ("o_proj",) if self.config["model_type"] == "llama" else ()
        wanted = tuple(f"self_attn.{role}" for role in wanted)
        if self.config.get("mlp_bias"):
            wanted += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        for block in range(int(self.config["num_hidden_layers"])):
            for role in wanted:
                module = f"model.layers.{block}.{role}"
                name = f"{module}.bias"
                weight = self._specs.get(f"{module}.weight") or self._specs.get(f"{module}.MatMulNBits.qweight")
                if name not in self._specs and weight is not None:
                    dtype = self._specs[EMBEDDING].dtype
                    self._specs[name] = TensorSpec(name=name, shape=weight.shape[:1], dtype=dtype)
                    self._places[name] = (self.graph_file, 0)
                    self._zeros.add(name)

    def _read_host(self, name: str, *, pin: bool = False) -> Tensor:
        if name in self._zeros:
            return torch.zeros(self._specs[name].shape, dtype=self._specs[name].dtype)
        part = self._columns.get(name)
        if part is None:
            return super()._read_host(name, pin=pin)
        stored = part.stored
        data = read_to_host(self._handle(stored.file), stored.file, stored.offset, stored.num_bytes)
        whole_KN = data.view(stored.dtype).view(stored.shape)
        return whole_KN[:, part.begin : part.end].T.contiguous()

    def _read_to_gpu(self, name: str, device: str) -> Tensor:
        return self._read_host(name).to(device)


def _norm_name(block: str, role: str) -> str:
    inside = "self_attn." if role in ("q_norm", "k_norm") else ""
    return f"model.layers.{block}.{inside}{role}.weight"


def _head_width(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or int(config["hidden_size"]) // int(config["num_attention_heads"]))


def is_onnx_folder(folder: Path) -> bool:
    """Whether a folder is one that ONNX Runtime GenAI loads."""
    return (folder / GENAI_CONFIG).is_file()


def open_onnx(folder: Path, config: dict[str, Any], genai: Mapping[str, Any]) -> OnnxCheckpoint:
    """Opens a folder, reading its graph without weights.

    Args:
        config: the content of its ``config.json``.
        genai: of its ``genai_config.json``, which names the graph.

    Raises:
        CheckpointError: see `OnnxCheckpoint`.
    """
    try:
        name = genai["model"]["decoder"]["filename"]
    except (KeyError, TypeError):
        name = None
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or "\\" in name:
        raise CheckpointError(
            f"{folder / GENAI_CONFIG}: expected the file name of a decoder in this folder, found {name!r}"
        )
    return OnnxCheckpoint(folder, config, folder / name)
