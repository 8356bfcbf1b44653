"""The reference as users run it: transformers + bitsandbytes kernels + peft's unmerged adapter, whole on a GPU.

Only what is left of qconv here is the lockstep: the loaded model is run block by block so that its
hidden states can be compared with the candidate's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qconv.errors import CheckpointError
from qconv.own_process import import_uncompiled, importing_libraries, without_collections
from qconv.progress import quiet_libraries
from qconv.skeleton import find_blocks
from qconv.streaming import BlockModel
from qconv.timeline import TIMELINE
from qconv.types import BnbKind, TensorSpec

_WRAPPED = ".base_layer."  # what an adapter of peft is put around, and leaves as it is
MEMORY_SHARE = 0.6  # of the free device memory that the resident reference may take


class ResidentModel(BlockModel):
    """A causal language model that is already in memory, behind the interface of a streamed one."""

    def __init__(self, model: nn.Module, device: str):
        super().__init__()
        self.device = device
        self._model = model
        self.layers_name, layers = find_blocks(model, type(model).__name__)
        self._layers = layers
        self.num_blocks = len(layers)
        self._read_embedding: Callable[[], Tensor] | None = None  # while it is not in memory

    def load_block(self, index: int) -> nn.Module:
        return self._layers[index]

    def _load_outer(self, with_embedding: bool, with_head: bool) -> nn.Module:
        if with_embedding:
            self._fetch_embedding()
        return self._model

    @property
    def head_bytes(self) -> int:
        return 0

    def whole(self) -> nn.Module:
        self._fetch_embedding()
        return self._model

    def let_embedding_go(self, specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor]) -> str | None:
        """Frees the input embedding until it is asked for again, where it lies in memory as it is stored.

        Args:
            specs: of the stored tensors.
            read: gives one of them, in its dtype, on this model's device.

        Returns:
            its name; None where it stays: it is the head too, or an adapter changes it.
        """
        embedding = self._model.get_input_embeddings()  # type: ignore[operator]
        names = [name for name, parameter in self._model.named_parameters() if parameter is embedding.weight]
        head = self._model.get_output_embeddings()  # type: ignore[operator]
        is_shared = head is not None and getattr(head, "weight", None) is embedding.weight
        if type(embedding) is not nn.Embedding or is_shared or not names or names[0] not in self.held(specs):
            return None
        self._read_embedding = partial(read, names[0])
        embedding.weight.data = embedding.weight.new_empty(0, embedding.weight.shape[1])
        return names[0]

    def _fetch_embedding(self) -> None:
        if self._read_embedding is not None:
            self._model.get_input_embeddings().weight.data = self._read_embedding()  # type: ignore[operator]
            self._read_embedding = None

    def held(self, specs: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
        """Its matrices that are in memory as they are stored, codes of bitsandbytes among them.

        Vectors are left out, as adapters that train biases put them in the place of the base's.
        """
        parameters = ((name.replace(_WRAPPED, "."), p) for name, p in self._model.named_parameters())
        return {
            name: parameter.data
            for name, parameter in parameters
            if name in specs
            and parameter.ndim == 2
            and (tuple(parameter.shape), parameter.dtype) == (specs[name].shape, specs[name].dtype)
        }


def why_not_resident(device: str, kind: BnbKind, num_bytes: int) -> str | None:
    """None when `load_resident` can serve, otherwise the reason to stream instead, for the report."""
    if not device.startswith("cuda"):
        return "no GPU"
    if kind == "16bit":
        return "the base is not 4-bit"
    missing = [name for name in ("bitsandbytes", "peft") if find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    free, _ = torch.cuda.mem_get_info(device)
    if num_bytes > MEMORY_SHARE * free:
        return f"{num_bytes / 1e9:.1f} GB of 4-bit weights do not fit beside the candidate"
    return None


def load_resident(base: Path, adapter: Path | None, kind: BnbKind, is_quantized: bool, device: str) -> ResidentModel:
    """Loads base and unmerged adapter as their authors' libraries do.

    Args:
        base: model folder; 4-bit on disk when ``is_quantized``, otherwise quantized as it is loaded.
        adapter: PEFT adapter folder, or None.
        kind: how training saw the base.
    """
    with TIMELINE.stage("import libraries"), importing_libraries():
        import_uncompiled("bitsandbytes")
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {} if is_quantized else {"quantization_config": bnb_config(base, kind)}
    # Both libraries make hundreds of thousands of small objects on the way.
    with quiet_libraries(), without_collections(stays=False):
        model = AutoModelForCausalLM.from_pretrained(str(base), dtype="auto", device_map={"": device}, **options)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter), **_adapter_options(adapter)).get_base_model()
    return ResidentModel(model.eval(), device)


def _adapter_options(adapter: Path) -> dict[str, Any]:
    """For a LoRA, all of whose tensors are in its file: none is filled with random numbers first."""
    from peft import PeftConfig

    return {"low_cpu_mem_usage": True} if PeftConfig.from_pretrained(str(adapter)).peft_type == "LORA" else {}


def load_whole(folder: Path, adapter: Path | None, device: str) -> ResidentModel:
    """A checkpoint as transformers loads it, with whatever kernels its format needs.

    Raises:
        CheckpointError: transformers cannot load it here; quotes the reason.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet_libraries():
            model = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto", device_map={"": device})
            with torch.no_grad():
                # compressed-tensors decodes its weights in the first forward pass of the whole model; blocks that
                # are run one by one would not have any.
                model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
            if adapter is not None:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, str(adapter)).get_base_model()
    except Exception as error:  # a missing kernel package, a format that this release does not know, ...
        raise CheckpointError(
            f"{folder}: transformers cannot load it ({type(error).__name__}: {error}); compressed-tensors folders "
            "need the package compressed-tensors, GPTQ and AWQ folders gptqmodel. Without --engine transformers "
            "qconv decodes the weights itself"
        ) from error
    return ResidentModel(model.eval(), device)


def bnb_config(base: Path, kind: BnbKind) -> Any:
    """The transformers quantization config that re-creates ``kind``; computes in the base's own dtype."""
    from transformers import AutoConfig, BitsAndBytesConfig

    config = AutoConfig.from_pretrained(str(base))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind.removesuffix("-dq"),
        bnb_4bit_use_double_quant=kind.endswith("-dq"),
        bnb_4bit_compute_dtype=config.dtype or torch.bfloat16,
    )
