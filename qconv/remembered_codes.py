"""A decoded view whose codes the readers of one comparison share: a model that runs, and the audit of its weights."""

from __future__ import annotations

from dataclasses import replace

from qconv.convert import DequantizedCheckpoint, separate_experts
from qconv.remembered import Remembered
from qconv.types import Checkpoint, QuantizedLinear


class RememberedCodes(DequantizedCheckpoint):
    """A `DequantizedCheckpoint` that keeps tensors and codes until `forget`, and after `stop` no longer keeps anything.

    Of what became codes, the bytes are not kept.
    """

    def __init__(self, source: Checkpoint):
        self._bytes = Remembered(separate_experts(source))
        self._codes: dict[tuple[str, str], QuantizedLinear] = {}
        self._is_stopped = False
        super().__init__(self._bytes)

    def read_quantized(self, module: str, device: str = "cpu") -> QuantizedLinear:
        """As that of `DequantizedCheckpoint`; shared, not to be changed."""
        if self._is_stopped:
            return super().read_quantized(module, device)
        key = (module, device)
        if key not in self._codes:
            codes = super().read_quantized(module, device)
            # In rows, however the format has them: everybody who decodes reads them so.
            self._codes[key] = replace(codes, codes_NK=codes.codes_NK.contiguous())
            for part in self._parts[module + ".weight"]:
                self._bytes.drop(part, device)
        return self._codes[key]

    def forget(self) -> None:
        self._codes.clear()
        self._bytes.forget()

    def stop(self) -> None:
        """Forgets, and from now on passes reads through: whoever reads later does not share."""
        self._is_stopped = True
        self.forget()
        self._bytes.stop()
