"""What divides by a number of GPUs: shapes of published models, and what is known of serving them.

Qwen2-72B is the well-known case: 29568 = 231 x 128 intermediate features, so its 4-bit checkpoints with groups of 128
load on one GPU only, and its makers padded them to 29696 (https://qwen.readthedocs.io/en/v2.0/quantization/gptq.html).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qconv.cli import main
from qconv.decoder_shape import DecoderShape
from qconv.errors import CheckpointError, SchemeError
from qconv.tensor_parallel import Finding, Linear, check_parallel, find_misfits, share_of
from qconv.types import Scheme
from tests.fp4_cases import MXFP4, NVFP4A16

W4 = Scheme(group_size=128)
FP8_BLOCK = Scheme(kind="float", bits=8, group_size=128, block_rows=128, dynamic_activations=True)
FP8 = Scheme(kind="float", bits=8, group_size=-1, dynamic_activations=True)
LLAMA_8B = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
QWEN_72B = {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 29568}
QWEN_7B = {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944}
SMOL = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}


def shape(config: dict[str, int]) -> DecoderShape:
    return DecoderShape.of({"num_hidden_layers": 2, **config}, "model")


def block(config: dict[str, int], scheme: Scheme | None, layout: str, number: int = 0) -> list[Linear]:
    """The seven linears of a Llama block."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    sizes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    return [
        Linear(
            module=f"model.layers.{number}.{name}", out_features=rows, in_features=columns, layout=layout, scheme=scheme
        )
        for name, (rows, columns) in sizes.items()
    ]


def misfits(config: dict[str, int], scheme: Scheme | None, layout: str, num_gpus: int) -> list[Finding]:
    return find_misfits(shape(config), block(config, scheme, layout), num_gpus)


def errors(config: dict[str, int], scheme: Scheme | None, layout: str, num_gpus: int) -> list[str]:
    return [str(finding) for finding in misfits(config, scheme, layout, num_gpus) if finding.is_error]


@pytest.mark.parametrize("num_gpus", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("layout", "scheme"),
    [("plain", None), ("gptq", W4), ("awq", Scheme(symmetric=False)), ("pack-quantized", W4), ("float-quantized", FP8)],
)
def test_llama_8b_divides_by_up_to_8(num_gpus: int, layout: str, scheme: Scheme | None) -> None:
    assert misfits(LLAMA_8B, scheme, layout, num_gpus) == []


@pytest.mark.parametrize("layout", ["gptq", "awq", "pack-quantized"])
def test_qwen2_72b_in_groups_of_128_loads_on_one_gpu_only(layout: str) -> None:
    assert errors(QWEN_72B, W4, layout, 1) == []
    for num_gpus in (2, 4, 8):
        found = errors(QWEN_72B, W4, layout, num_gpus)
        assert len(found) == 1
        assert "model.layers.0.mlp.down_proj" in found[0]
        assert f"29568 / {num_gpus} = {29568 // num_gpus} inputs cut groups of 128" in found[0]
    padded = {**QWEN_72B, "intermediate_size": 29696}  # as its makers published it
    assert errors(padded, W4, layout, 2) == errors(padded, W4, layout, 4) == errors(padded, W4, layout, 8) == []


def test_a_smaller_group_is_named_that_fits() -> None:
    assert "--group-size 64 would fit" in errors(QWEN_72B, W4, "gptq", 2)[0]
    assert errors(QWEN_72B, Scheme(group_size=64), "gptq", 2) == []
    assert "--group-size 32 would fit" in errors(QWEN_72B, W4, "gptq", 4)[0]
    assert "--group-size -1 would fit (a scale for each row" in errors(QWEN_72B, W4, "gptq", 8)[0]
    assert errors(QWEN_72B, Scheme(group_size=-1), "gptq", 8) == []  # scales of whole rows are on every GPU
    assert "would fit" not in errors(QWEN_72B, W4, "awq", 8)[0]


def test_awq_does_not_split_rows_with_one_scale() -> None:
    """vLLM's AWQ divides the inputs of a part by those of the row to count groups, and gets none."""
    rows = Scheme(group_size=-1, symmetric=False)
    assert errors(LLAMA_8B, rows, "awq", 1) == []
    found = errors(LLAMA_8B, rows, "awq", 2)
    assert [text.partition(":")[0] for text in found] == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert "no scale of a row that is split among GPUs; --group-size 128 would fit" in found[0]


def test_groups_of_4_bit_floats_stay_whole() -> None:
    """Qwen2-7B's 18944 inputs of down_proj are 592 groups of 32, which 32 GPUs cut and 16 do not."""
    wide = QWEN_7B | {"num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 4096}
    assert errors(wide, NVFP4A16, "nvfp4-pack-quantized", 32) == []
    assert errors(wide, MXFP4, "mxfp4-pack-quantized", 16) == []
    (found,) = errors(wide, MXFP4, "mxfp4-pack-quantized", 32)
    assert "18944 / 32 = 592 inputs cut groups of 32, the only size of this layout" in found


def test_heads_that_do_not_divide() -> None:
    assert errors(SMOL, None, "plain", 2) == [
        "9 attention heads are no multiple of 2",
        "3 key and value heads can be neither split among 2 GPUs nor copied to equal numbers of them",
    ]
    assert errors(SMOL, None, "plain", 3) == []
    assert errors(QWEN_7B, None, "plain", 8) == ["28 attention heads are no multiple of 8"]
    grouped = {**LLAMA_8B, "num_key_value_heads": 6, "num_attention_heads": 48, "hidden_size": 6144}
    assert "6 key and value heads" in errors(grouped, None, "plain", 4)[0]


def test_few_key_value_heads_are_copied() -> None:
    config = {**LLAMA_8B, "num_key_value_heads": 2}
    assert errors(config, W4, "gptq", 8) == []
    assert share_of(shape(config), "model.layers.0.self_attn.k_proj", (256, 4096), 8) == 1 / 2
    assert share_of(shape(config), "model.layers.0.self_attn.q_proj", (4096, 4096), 8) == 1 / 8
    assert share_of(shape(config), "model.layers.0.input_layernorm", (4096,), 8) == 1
    # q of 4096 rows splits by 8, k and v of 256 rows by 2: 512 + 2 x 128 of 4608.
    assert share_of(shape(config), "model.layers.0.self_attn.qkv_proj", (4608, 4096), 8) == 768 / 4608


def test_blocks_of_fp8() -> None:
    assert errors(LLAMA_8B, FP8_BLOCK, "fp8-block", 8) == []
    found = errors(QWEN_7B, FP8_BLOCK, "fp8-block", 4)  # 18944 = 148 x 128 = 4 x 37 x 128
    assert found == []
    found = errors({**QWEN_7B, "intermediate_size": 18816}, FP8_BLOCK, "fp8-block", 2)  # 147 x 128
    assert sum("9408" in text for text in found) == 3  # gate and up by rows, down by columns
    assert "cut blocks of 128 rows; take fp8" in found[0]
    # On one GPU only what the engine fuses has to end with a block, and the last part may end anywhere.
    narrow = {**LLAMA_8B, "head_dim": 96, "num_key_value_heads": 1, "num_attention_heads": 4}
    linears = [
        Linear(module=f"b.{n}", out_features=rows, in_features=4096, layout="fp8-block", scheme=FP8_BLOCK)
        for n, rows in (("q_proj", 384), ("k_proj", 96), ("v_proj", 96))
    ]
    assert [f.modules for f in find_misfits(shape(narrow), linears, 1) if f.is_error] == [("b.k_proj",)]


def test_words_of_codes_and_zero_points_stay_whole() -> None:
    odd = {"hidden_size": 160, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 320}
    small = Scheme(group_size=4, symmetric=False)
    assert errors(odd, small, "awq", 4) == []  # 40 outputs are five words of eight codes
    odd = {"hidden_size": 144, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 144}
    found = errors(odd, small, "awq", 4)
    assert any("36 outputs on each GPU are no multiple of 8, the codes in a word" in text for text in found)
    found = errors(odd, Scheme(group_size=-1), "gptq", 4)
    assert any("36 inputs on each GPU do not fill words of 32 bits with 4-bit codes" in text for text in found)
    assert any("36 outputs on each GPU are no multiple of 8, the zero points in a word" in text for text in found)
    symmetric = errors(odd, Scheme(group_size=-1), "pack-quantized", 4)  # which stores no zero points then
    assert not any("zero points" in text for text in symmetric)


def test_marlin_tiles_are_warnings() -> None:
    found = misfits(SMOL, Scheme(group_size=64), "gptq", 1)
    assert not any(finding.is_error for finding in found)
    (down,) = [f for f in found if f.modules == ("model.layers.0.self_attn.o_proj",)]
    assert "576 outputs and 576 inputs on each GPU are no multiples of Marlin's 64 and 128" in down.text
    (odd,) = {f.text for f in misfits(LLAMA_8B, Scheme(group_size=256), "gptq", 1)}
    assert odd.startswith("Marlin kernels have no groups of 256")


def test_qkv_counts_as_the_one_linear_that_it_runs_as() -> None:
    """32 outputs of k alone would miss Marlin's tile of 64; 64 + 32 + 32 together do not."""
    config = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}
    found = misfits(config, Scheme(group_size=32), "gptq", 2)
    assert [f.modules for f in found] == [("model.layers.0.self_attn.o_proj",)]  # 64 inputs


def test_bitsandbytes_is_not_split() -> None:
    assert misfits(LLAMA_8B, None, "bnb-nf4-dq", 1) == []
    assert all("bitsandbytes" in text for text in errors(LLAMA_8B, None, "bnb-nf4-dq", 2))


def test_equal_findings_are_told_once_with_the_first_name() -> None:
    linears = [linear for number in range(80) for linear in block(QWEN_72B, W4, "gptq", number)]
    with pytest.raises(SchemeError) as caught:
        check_parallel(shape(QWEN_72B), linears, 8, "./out")
    message = str(caught.value)
    assert "model.layers.0.mlp.down_proj and 79 like it: 29568 / 8 = 3696 inputs" in message
    assert "--tp 1 would" in message


def test_unknown_names_are_said_to_be_unchecked() -> None:
    linear = Linear(module="model.layers.0.mixer.in_proj", out_features=64, in_features=64, layout="gptq", scheme=W4)
    (found,) = find_misfits(shape(LLAMA_8B), [linear], 2)
    assert not found.is_error
    assert "not checked" in found.text


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({}, (None,) * 4),
        ({"sliding_window": 64, "use_sliding_window": False}, (None,) * 4),
        ({"model_type": "mistral", "sliding_window": 64}, (64,) * 4),
        ({"model_type": "gemma2", "sliding_window": 64}, (None,) * 4),  # no layer_types: the larger count
        ({"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}, (8, None, 8, None)),
        ({"layer_types": ["linear_attention", "linear_attention", "full_attention", "mamba"]}, (None,)),
        ({"attention_chunk_size": 16, "layer_types": ["chunked_attention"] * 4}, (16,) * 4),
    ],
)
def test_windows_of_layers(config: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    base = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4}
    assert DecoderShape.of(base | config, "model").windows == windows
    assert DecoderShape.of({"text_config": base | config}, "model").windows == windows


def test_shape_of_names_that_families_use() -> None:
    gpt2 = DecoderShape.of({"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512}, "model")
    assert (gpt2.num_kv_heads, gpt2.head_dim, gpt2.max_positions, len(gpt2.windows)) == (4, 32, 512, 2)
    falcon = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True}
    assert DecoderShape.of(falcon, "model").num_kv_heads == 1
    deepseek = {**LLAMA_8B, "num_hidden_layers": 1, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    assert DecoderShape.of(deepseek, "model").latent == 576
    with pytest.raises(CheckpointError, match=r"num_attention_heads.*found None"):
        DecoderShape.of({"hidden_size": 64, "num_hidden_layers": 1}, "model")


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    return int(caught.value.code or 0)


@pytest.fixture
def odd_width(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "base"))


def test_quantize_refuses_before_any_work(
    odd_width: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qconv.pipeline.write_tensors", lambda *_, **__: pytest.fail("work was begun"))
    words = ("quantize", str(odd_width), "--to", "gptq", "--algorithm", "rtn", "--no-validate")
    out = ("-o", str(tmp_path / "out"))
    assert run(*words, *out, "--tp", "4") == 3  # 256 / 4 = 64 and 768 / 4 = 192 cut groups of 128
    message = capsys.readouterr().err
    assert "model.layers.0.mlp.down_proj and 3 like it: 768 / 4 = 192 inputs cut groups of 128" in message
    assert "--group-size 64 would fit" in message
    assert not (tmp_path / "out").exists()
    assert run(*words, *out, "--tp", "3") == 3
    assert "4 attention heads are no multiple of 3" in capsys.readouterr().err
    assert run(*words, *out, "--tp", "0") == 2


def test_plan_carries_the_warnings(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["quantize", str(tiny_llama), "--to", "gptq", "--algorithm", "rtn", "--no-validate", "--dry-run", "--json"]
    main([*words, "--group-size", "32", "--tp", "4", "-o", str(tmp_path / "out")])
    notes = json.loads(capsys.readouterr().out)["notes"]
    # 256 / 4 = 64 inputs of o_proj are no multiple of 128.
    assert any("self_attn.o_proj and 3 like it" in note and "Marlin's 64 and 128" in note for note in notes)
    assert run(*words, "--group-size", "128", "--tp", "4", "-o", str(tmp_path / "out")) == 3
