"""``python run_llm_compressor.py MODEL ROWS.json OUT gptq|awq``, in llm-compressor's environment: 4 bits, groups 64."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(model: str, rows_file: str, out: str, method: str) -> None:
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights = QuantizationArgs(
        num_bits=4, group_size=64, symmetric=method == "gptq", strategy=QuantizationStrategy.GROUP
    )
    what = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }
    if method == "gptq":
        recipe = [GPTQModifier(**what)]
    else:
        if not torch.accelerator.is_available():
            # Its AWQ pins memory without asking whether there is a device to copy to, which raises.
            torch.Tensor.pin_memory = lambda tensor, *_: tensor
        recipe = [AWQModifier(), QuantizationModifier(**what)]
    rows = json.loads(Path(rows_file).read_text())
    oneshot(
        model=model,
        recipe=recipe,
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
        shuffle_calibration_samples=False,
        output_dir=out,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
