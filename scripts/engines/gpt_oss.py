"""A small gpt-oss with random weights: the family that the target ``gpt-oss-mxfp4`` is for."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import GptOssConfig, GptOssForCausalLM

YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""Of the published models."""


def build(tokenizer_of: Path, out: Path) -> None:
    """Four layers of eight experts, in bfloat16, with weights large enough for clear answers.

    Args:
        tokenizer_of: a folder whose tokenizer has 2048 tokens.
    """
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=131072,
        rope_parameters=YARN,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    for file in tokenizer_of.glob("tokenizer*"):
        shutil.copy(file, out)
