"""A base that nobody gave: what an adapter's own tensors and config say of it, so that the checks can run without one.

Names and shapes alone. A question about the base's values is an error that asks for the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qconv.checkpoint import SafetensorsCheckpoint
from qconv.errors import AdapterError
from qconv.merge.adapter_config import parse_adapter_config
from qconv.merge.adapter_names import sort_names
from qconv.merge.spellings import BARE
from qconv.types import TensorSpec


class ImpliedBase:
    """A `Checkpoint` of the weights that an adapter changes; see `load_adapter`.

    Raises:
        AdapterError: the config or a tensor name is not a LoRA adapter's.
    """

    def __init__(self, adapter: SafetensorsCheckpoint):
        self.location = f"the base of {adapter.location}"
        self.config: Mapping[str, Any] = {}
        config_file = str(adapter.folder / "adapter_config.json")
        config = parse_adapter_config(adapter.config, config_file)
        if adapter.config["peft_type"] != "LORA":
            raise AdapterError(
                f"{config_file}: expected peft_type LORA, found {adapter.config['peft_type']}, which does not tell the "
                "base's shapes; give the base with --base"
            )
        names = sort_names(
            adapter.specs(), adapter.config["peft_type"], str(adapter.folder / "adapter_model.safetensors")
        )
        if BARE in names.rules:
            raise AdapterError(
                f"{adapter.location}: names without peft's prefix are read against the base's own; give the base "
                "with --base"
            )
        shapes: dict[str, tuple[int, ...]] = {}
        for module, parts in names.layers.items():
            if "a" in parts and "b" in parts:
                columns = [k * (config.qalora_group or 1) for k in adapter.specs()[parts["a"]].shape[1:]]
                update = (*adapter.specs()[parts["b"]].shape[:1], *columns)
                shapes[module + ".weight"] = update[::-1] if config.fan_in_fan_out else update
                shapes[module + ".bias"] = update[:1]
            if "embedding_a" in parts and "embedding_b" in parts:
                a, b = (adapter.specs()[parts[f"embedding_{side}"]].shape for side in "ab")
                shapes[module + ".weight"] = (*a[1:], *b[:1])
        whole = {name: tensors[0] for name, tensors in names.plain.items()} | names.copies
        shapes |= {name: adapter.specs()[tensor].shape for name, tensor in whole.items()}
        self._specs = {name: TensorSpec(name=name, shape=shape, dtype=torch.float32) for name, shape in shapes.items()}

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read(self, name: str, device: str = "cpu") -> Tensor:
        """Always an error: the values are not known.

        Raises:
            AdapterError: names the tensor, and asks for the base.
        """
        raise AdapterError(
            f"{self.location}: the adapter stores {name} whole, and only the base can say whether it was trained; "
            "give the base with --base"
        )
