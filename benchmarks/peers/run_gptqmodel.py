"""``python run_gptqmodel.py MODEL ROWS.json OUT gptq``, in gptqmodel's environment: 4 bits, groups of 64."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(model: str, rows_file: str, out: str, _: str) -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it computes less than one on two cores, and stops
    from gptqmodel import GPTQModel, QuantizeConfig

    rows = json.loads(Path(rows_file).read_text())
    quantizer = GPTQModel.load(model, QuantizeConfig(bits=4, group_size=64, sym=True))
    quantizer.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1)
    quantizer.save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
