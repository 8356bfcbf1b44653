"""Running an ONNX folder with ONNX Runtime, on the CPU: tokens in, logits out, with and without cached keys and values.

The CPU provider has no operations in bfloat16. Such a graph is run as its twin in float32, with the same weights: made
in a temporary folder, with every bfloat16 of the graph replaced.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qconv.errors import CheckpointError
from qconv.onnx.builder import GENAI_CONFIG
from qconv.onnx.graph import load_proto
from qconv.onnx.package import onnx_package, runtime_package

_FLOAT, _BFLOAT16 = 1, 16  # onnx.TensorProto.DataType
_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
Cache = dict[str, "np.ndarray[Any, Any]"]


class OnnxSession:
    """A loaded model.

    Args:
        file: the graph; its ``genai_config.json`` lies beside it.

    Raises:
        CheckpointError: ONNX Runtime cannot load it; quotes the reason.
    """

    def __init__(self, file: Path):
        self.file = file
        content = json.loads((file.parent / GENAI_CONFIG).read_text(encoding="utf-8"))
        self._head_size = int(content["model"]["decoder"]["head_size"])
        runtime = runtime_package()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._twin: tempfile.TemporaryDirectory[str] | None = None
        self.is_widened = _has_bfloat16(file)
        try:
            if self.is_widened:
                self._twin = tempfile.TemporaryDirectory(prefix="qconv-onnx-")
                file = _widened(file, Path(self._twin.name))
            self._session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's own classes, one for each status
            raise CheckpointError(
                f"{self.file}: ONNX Runtime {runtime.__version__} cannot load it ({type(error).__name__}: {error})"
            ) from error

    @property
    def runs(self) -> str:
        """What computes, for the report."""
        return f"ONNX Runtime {runtime_package().__version__}, CPU" + (
            ", bfloat16 weights in float32" if self.is_widened else ""
        )

    def logits(self, ids_BS: Tensor) -> Tensor:
        """Float32 [B, S, V] of whole rows of tokens."""
        return self.step(ids_BS, {})[0]

    def step(self, ids_BS: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Logits of further tokens behind what is cached, and the cache with them in it; an empty one begins.

        Raises:
            CheckpointError: ONNX Runtime fails.
        """
        past = next(iter(cache.values())).shape[2] if cache else 0
        rows, length = ids_BS.shape
        known = {
            "input_ids": ids_BS.cpu().numpy(),
            "attention_mask": np.ones((rows, past + length), dtype=np.int64),
            "position_ids": np.arange(past, past + length, dtype=np.int64)[None].repeat(rows, axis=0),
        }
        feed = {}
        for entry in self._session.get_inputs():
            if entry.name in known:
                feed[entry.name] = known[entry.name]
            elif cache:
                feed[entry.name] = cache[entry.name]
            else:
                feed[entry.name] = np.zeros((rows, entry.shape[1], 0, self._head_size), dtype=_NUMPY[entry.type])
        names = [entry.name for entry in self._session.get_outputs()]
        try:
            outputs = dict(zip(names, self._session.run(names, feed), strict=True))
        except Exception as error:  # the runtime's own classes
            raise CheckpointError(f"{self.file}: ONNX Runtime fails ({type(error).__name__}: {error})") from error
        logits = torch.from_numpy(outputs.pop("logits")).float()
        return logits, {name.replace("present.", "past_key_values."): value for name, value in outputs.items()}


def _has_bfloat16(file: Path) -> bool:
    return any(tensor.data_type == _BFLOAT16 for tensor in load_proto(file).graph.initializer)


def _widened(file: Path, folder: Path) -> Path:
    """The same graph in float32, in another folder."""
    onnx = onnx_package()
    model = onnx.load(str(file))
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.data_type == _BFLOAT16:
            stored = torch.frombuffer(bytearray(tensor.raw_data), dtype=torch.bfloat16)
            tensor.raw_data, tensor.data_type = stored.float().numpy().tobytes(), _FLOAT
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == _BFLOAT16:
            value.type.tensor_type.elem_type = _FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == _BFLOAT16:
                attribute.i = _FLOAT
            if attribute.HasField("t") and attribute.t.data_type == _BFLOAT16:
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(attribute.t).astype("f4")))
    out = folder / file.name
    onnx.save(model, str(out), save_as_external_data=True, location=f"{file.name}.data", size_threshold=0)
    return out
