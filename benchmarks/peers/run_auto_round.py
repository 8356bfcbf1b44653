"""``python run_auto_round.py MODEL ROWS.json OUT STEPS``, in auto-round's environment: 4 bits, groups of 64."""

from __future__ import annotations

import json
import sys
from pathlib import Path

BATCH = 8


def main(model: str, rows_file: str, out: str, steps: str) -> None:
    import torch
    from auto_round import AutoRound

    rows_TS = torch.tensor(json.loads(Path(rows_file).read_text()))
    batches = [{"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)} for ids_BS in rows_TS.split(BATCH)]
    rounding = AutoRound(
        model,
        scheme="W4A16",
        group_size=64,
        sym=True,
        iters=int(steps),
        dataset=batches,
        nsamples=rows_TS.shape[0],
        seqlen=rows_TS.shape[1],
        batch_size=BATCH,
        device_map="cpu",
    )
    rounding.quantize_and_save(out, format="auto_gptq")


if __name__ == "__main__":
    main(*sys.argv[1:])
