"""The processes that gpu_pipeline.py starts, besides qconv itself: ``python benchmarks/peer_steps.py NAME ARGUMENTS``.

The peers' merge is transformers, bitsandbytes and peft; their quantization is llm-compressor's one-shot with the
defaults of its modifiers.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TINY = {  # no shape of a real model: to try the steps out
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def build_step(shape: str, folder: str, layers: str) -> None:
    import shapes
    import torch

    shapes.SHAPES["tiny"] = TINY
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes.build(shape, Path(folder), device, int(layers) if layers else None)


def import_step(names: str) -> None:
    """Imports modules, all of a package where its name ends in ``.*``; what cannot be imported is passed over."""
    if "qconv.*" in names.split():
        from qconv.own_process import leave_out_unused

        leave_out_unused()  # as the command does
    for name in names.split():
        package = name.removesuffix(".*")
        modules = [package]
        if name != package:
            walk = pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
            modules += [module.name for module in walk if not module.name.endswith("__main__")]
        for module in modules:
            try:
                importlib.import_module(module)
            except ImportError as error:
                print(f"not imported: {module}: {error}", file=sys.stderr)


def peer_merge_step(base: str, adapter: str, out: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", device_map=device).dequantize()
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    # The original format is the 4-bit one, which transformers cannot write back.
    model.save_pretrained(out, save_original_format=False)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)


def peer_quantize_step(job: str, model: str, out: str, samples: str, seq_len: str) -> None:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    what: dict[str, Any] = {"targets": "Linear", "ignore": ["lm_head"]}
    if job == "fp8":
        oneshot(model=model, recipe=QuantizationModifier(scheme="FP8_DYNAMIC", **what), output_dir=out)
        return
    from datasets import Dataset

    from qconv import corpus

    size = int(samples), int(seq_len)
    rows_TS = corpus.pack_tokens(corpus.load_documents("default"), corpus.load_tokenizer(Path(model)), *size, seed=0)
    data = {"input_ids": rows_TS.tolist(), "attention_mask": rows_TS.new_ones(size).tolist()}
    if job == "gptq":
        recipe = [GPTQModifier(scheme="W4A16", **what)]
    else:
        recipe = [AWQModifier(), QuantizationModifier(scheme="W4A16_ASYM", **what)]
    oneshot(
        model=model,
        recipe=recipe,
        dataset=Dataset.from_dict(data),
        num_calibration_samples=size[0],
        max_seq_length=size[1],
        shuffle_calibration_samples=False,
        output_dir=out,
    )


STEPS: dict[str, Callable[..., None]] = {
    "build": build_step,
    "import": import_step,
    "peer-merge": peer_merge_step,
    "peer-quantize": peer_quantize_step,
}


if __name__ == "__main__":
    STEPS[sys.argv[1]](*sys.argv[2:])
