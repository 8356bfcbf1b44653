"""What is said of engines: memory by published numbers, files by their documented schemas, refusals, launch lines."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
import torch

from qconv.decoder_shape import DecoderShape
from qconv.serving import ENGINES, Served, ServedAdapter
from qconv.serving.memory import ServingMemory, serving_memory
from qconv.serving.trtllm import QUANT_CONFIG
from qconv.types import Scheme, TensorSpec
from tests.fp4_cases import MXFP4, MXFP4A16, NVFP4, NVFP4A16

LLAMA_8B = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32}
LLAMA_70B = {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 80}
DEEPSEEK_V3 = {"hidden_size": 7168, "num_attention_heads": 128, "num_hidden_layers": 61}
DEEPSEEK_V3 |= {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
GEMMA2_9B = {"hidden_size": 3584, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256}
GEMMA2_9B |= {"num_hidden_layers": 42, "sliding_window": 4096}  # type: ignore[dict-item]

W4, W4_ASYM = Scheme(), Scheme(symmetric=False)
FP8 = Scheme(kind="float", bits=8, group_size=-1, dynamic_activations=True)
STATIC = Scheme(kind="float", bits=8, group_size=-1, static_activations=True)
BLOCK = Scheme(kind="float", bits=8, group_size=128, block_rows=128, dynamic_activations=True)
INT8 = Scheme(bits=8, group_size=-1, dynamic_activations=True)
W4A8 = Scheme(dynamic_activations=True)
W4A8_FP8 = Scheme(group_size=64, dynamic_activations=True, float8_activations=True)


def memory(config: dict[str, Any], *, num_gpus: int = 1, itemsize: int = 2, context: int = 8192) -> ServingMemory:
    shape = DecoderShape.of(config, "model")
    return serving_memory(
        shape, [], {}, num_gpus=num_gpus, cache_itemsize=itemsize, context=context, concurrency=4, gpu=80_000_000_000
    )


@pytest.mark.parametrize(
    ("config", "num_gpus", "itemsize", "per_token"),
    [
        (LLAMA_8B, 1, 2, 131_072),  # 128 KiB, the number of vLLM's and NVIDIA's sizing guides
        (LLAMA_8B, 8, 2, 16_384),
        (LLAMA_8B, 16, 2, 16_384),  # 8 heads on 16 GPUs: each of them twice
        (LLAMA_70B, 1, 2, 327_680),
        (LLAMA_70B, 1, 1, 163_840),
        (DEEPSEEK_V3, 1, 2, 70_272),  # 70.272 KB, table 1 of "Insights into DeepSeek-V3" (arXiv 2505.09343)
        (DEEPSEEK_V3, 8, 2, 70_272),  # a latent is not split
    ],
)
def test_cache_of_a_token(config: dict[str, Any], num_gpus: int, itemsize: int, per_token: int) -> None:
    assert memory(config, num_gpus=num_gpus, itemsize=itemsize).per_token == per_token


def test_cache_of_sequences() -> None:
    found = memory(LLAMA_8B, context=8190)
    assert found.per_sequence == 131_072 * 8192  # pages of 16 tokens
    assert found.cache == 4 * found.per_sequence
    layers = ["sliding_attention", "full_attention"] * 21
    sliding = memory(GEMMA2_9B | {"layer_types": layers}, context=8192)
    one_layer = 2 * 8 * 256 * 2
    assert sliding.per_sequence == 21 * one_layer * 4096 + 21 * one_layer * 8192
    assert sliding.per_token == 42 * one_layer


def test_sequences_that_fit() -> None:
    found = memory(LLAMA_8B)
    assert found.fitting_sequences == int(80e9 * 0.9) // (131_072 * 8192) == 67


def test_weights_are_split_as_engines_split_them() -> None:
    """A block of Llama-3.1-8B in bfloat16 on 16 GPUs: k and v have 8 heads, so each is on two of them."""
    sizes = {
        "model.embed_tokens": (128256, 4096),
        "model.layers.0.self_attn.q_proj": (4096, 4096),
        "model.layers.0.self_attn.k_proj": (1024, 4096),
        "model.layers.0.self_attn.o_proj": (4096, 4096),
        "model.layers.0.mlp.down_proj": (4096, 14336),
        "model.layers.0.input_layernorm": (4096,),
    }
    specs = {f"{n}.weight": TensorSpec(name=f"{n}.weight", shape=s, dtype=torch.bfloat16) for n, s in sizes.items()}
    shape = DecoderShape.of(LLAMA_8B, "model")
    options: dict[str, Any] = {"cache_itemsize": 2, "context": 16, "concurrency": 1}
    whole = serving_memory(shape, specs.values(), specs, num_gpus=1, **options)
    assert whole.weights == sum(spec.num_bytes for spec in specs.values())
    split = serving_memory(shape, specs.values(), specs, num_gpus=16, **options)
    assert split.weights == 2 * (
        128256 * 4096 // 16 + 4096 * 4096 // 16 + 1024 * 4096 // 8 + 4096 * 4096 // 16 + 4096 * 14336 // 16 + 4096
    )


def test_parts_of_a_quantized_linear_share_its_place() -> None:
    logical = {"l.down_proj.weight": TensorSpec(name="l.down_proj.weight", shape=(64, 128), dtype=torch.float32)}
    stored = [TensorSpec(name="l.down_proj.qweight", shape=(16, 64), dtype=torch.int32)]
    stored += [TensorSpec(name="l.down_proj.weight.quant_state.bitsandbytes__nf4", shape=(80,), dtype=torch.uint8)]
    shape = DecoderShape.of(LLAMA_8B, "model")
    found = serving_memory(shape, stored, logical, num_gpus=2, cache_itemsize=2, context=16, concurrency=1)
    assert found.weights == (16 * 64 * 4 + 80) // 2


def served(layout: str = "plain", *schemes: Scheme, **more: Any) -> Served:
    return Served(name="out", path="/models/out", layout=layout, schemes=schemes, **more)


GPTQ_V2 = ("gptq_v2", (W4,), {})
INDEXED = ("gptq", (W4,), {"desc_act": True})
# By engine: what it refuses, with a word of the reason and the target that is named instead.
REFUSED = {
    "vllm": [
        (("bnb-nf4-dq", (), {}), "bitsandbytes", "w4a16"),
        (INDEXED, "desc_act", "without --desc-act"),
        (("gptq", (W4_ASYM,), {}), "asymmetric", "awq --algorithm gptq"),
        (("gptq", (Scheme(bits=3),), {}), "3 bits", "gptq --sym"),
        (("pack-quantized", (W4A8_FP8,), {}), "groups of 128, not 64", "w4a8"),
    ],
    "sglang": [
        (GPTQ_V2, "checkpoint_format", "gptq"),
        (("gptq", (W4_ASYM,), {}), "asymmetric", "awq"),
        (("mxfp4-pack-quantized", (MXFP4,), {}), "no kernel", "w4a16"),
        (("mxfp4-pack-quantized", (MXFP4A16,), {}), "no kernel", "w4a16"),
        (("pack-quantized", (W4A8,), {}), "no kernel", "w4a16"),
    ],
    "tgi": [
        (GPTQ_V2, "version 2", "gptq"),
        (("bnb-nf4-dq", (), {}), "bitsandbytes", "--to bf16"),
        (("nvfp4-pack-quantized", (NVFP4,), {}), "4-bit floats", "w4a16"),
        (("pack-quantized", (W4A8,), {}), "4-bit weights beside rounded inputs", "w4a16"),
        (("pack-quantized", (W4_ASYM,), {}), "zero points", "awq"),
        (("gptq", (W4,), {"dynamic": {"-:x": {}}}), "dynamic", "without --override"),
        (("awq", (W4_ASYM,), {"modules_to_not_convert": ["lm_head", "model.layers.0"]}), "leaves out", "awq"),
    ],
    "trtllm": [
        (("gptq", (W4,), {}), "ModelOpt", "fp8"),
        (("awq", (W4_ASYM,), {}), "ModelOpt", "fp8"),
        (("pack-quantized", (W4,), {}), "ModelOpt", "fp8"),
        (("int-quantized", (INT8,), {}), "8-bit integers for float8", "fp8"),
        (("bnb-nf4", (), {}), "bnb-nf4", "fp8"),
        (("nvfp4-pack-quantized", (NVFP4,), {}), "nvfp4-pack-quantized", "fp8"),
    ],
    "lorax": [(("float-quantized", (FP8,), {}), "float-quantized", "awq"), (GPTQ_V2, "version 2", "gptq")],
}
LOADED = {
    "vllm": ["plain", "gptq", "gptq_v2", "awq", "pack-quantized", "float-quantized", "fp8-block", "int-quantized"],
    "sglang": ["plain", "gptq", "awq", "pack-quantized", "float-quantized", "fp8-block", "int-quantized", "bnb-nf4-dq"],
    "tgi": ["plain", "gptq", "awq", "pack-quantized", "float-quantized", "fp8-block", "int-quantized"],
    "trtllm": ["plain", "float-quantized", "fp8-block"],
    "lorax": ["plain", "gptq", "awq"],
}
LOADED["sglang"] += ["nvfp4-pack-quantized"]
SCHEMES = {
    "nvfp4-pack-quantized": NVFP4,
    "mxfp4-pack-quantized": MXFP4,
    "awq": W4_ASYM,
    "float-quantized": FP8,
    "fp8-block": BLOCK,
    "int-quantized": INT8,
}


@pytest.mark.parametrize("name", [*REFUSED, "triton"])
def test_refusals_name_reason_and_alternative(name: str) -> None:
    for (layout, schemes, quantization), reason, instead in REFUSED["vllm" if name == "triton" else name]:
        found = ENGINES[name].refusal(served(layout, *schemes, quantization=quantization))
        assert found is not None, (name, layout)
        assert reason in found, found
        assert "make another output" in found, found
        assert instead in found, found


@pytest.mark.parametrize("name", [*LOADED, "triton"])
def test_what_is_loaded(name: str) -> None:
    for layout in LOADED["vllm" if name == "triton" else name]:
        schemes = () if layout in ("plain", "bnb-nf4-dq") else (SCHEMES.get(layout, W4),)
        assert ENGINES[name].refusal(served(layout, *schemes)) is None, layout


def test_vllm_tells_what_its_cpu_build_does_with_4_bits_beside_rounded_inputs() -> None:
    def notes(*schemes: Scheme) -> str:
        return " ".join(ENGINES["vllm"].notes(served("pack-quantized", *schemes)))

    assert "VLLM_CPU_INT4_W4A8=1" in notes(W4A8)
    assert "no kernel" not in notes(W4A8)
    assert "no kernel" in notes(W4A8_FP8)
    assert "VLLM_CPU" not in notes(W4A8_FP8) + notes(W4) + notes(INT8)


def test_sglang_reads_nvfp4_of_weights_alone() -> None:
    one = served("nvfp4-pack-quantized", NVFP4A16)
    assert ENGINES["sglang"].refusal(one) is None
    assert any("0.5.23 reads NVFP4" in note for note in ENGINES["sglang"].notes(one))
    mixed = served("pack-quantized+nvfp4-pack-quantized", W4, NVFP4A16)
    assert ENGINES["sglang"].refusal(mixed) is None
    assert any("layout of each config group" in note for note in ENGINES["sglang"].notes(mixed))
    assert "one layout for all linears" in str(ENGINES["tgi"].refusal(mixed))


@pytest.mark.parametrize("name", ["tgi", "lorax"])
def test_launchers_copy_no_key_value_heads(name: str) -> None:
    """TGI: '`num_key_value_heads` must be divisible by `num_shards`'; vLLM copies them."""
    wide = served(num_gpus=8, num_kv_heads=4)
    assert "4 of them are no multiple of 8 GPUs" in str(ENGINES[name].refusal(wide))
    assert ENGINES[name].refusal(served(num_gpus=4, num_kv_heads=4)) is None
    assert ENGINES["vllm"].refusal(wide) is None


def adapters(*ranks: int) -> tuple[ServedAdapter, ...]:
    return tuple(ServedAdapter(name=f"a{n}", path=f"/loras/a{n}", rank=rank) for n, rank in enumerate(ranks))


@pytest.mark.parametrize(("ranks", "allocated"), [((8,), "8"), ((9, 3), "16"), ((257,), "320"), ((512, 1), "512")])
def test_vllm_allocates_the_next_rank_that_it_takes(ranks: tuple[int, ...], allocated: str) -> None:
    words = ENGINES["vllm"].command(served(adapters=adapters(*ranks)))
    assert words[words.index("--max-lora-rank") + 1] == allocated
    assert words[words.index("--max-loras") + 1] == str(len(ranks))
    assert "--enable-lora" in words
    assert words[words.index("--lora-modules") + 1 :] == [f"a{n}=/loras/a{n}" for n in range(len(ranks))]


def test_ranks_that_are_too_large() -> None:
    assert "up to rank 512" in str(ENGINES["vllm"].refusal(served(adapters=adapters(513))))
    assert ENGINES["lorax"].refusal(served(adapters=adapters(128))) is None
    assert "up to 128" in str(ENGINES["lorax"].refusal(served(adapters=adapters(16, 256))))
    assert "merge the adapter" in str(ENGINES["trtllm"].refusal(served(adapters=adapters(8))))


def test_requests_name_the_adapter() -> None:
    one = served(adapters=adapters(8))
    (adapter,) = one.adapters

    def body(engine: str) -> Any:
        return ENGINES[engine].request(one, adapter, "Hello", 7).body

    assert (body("vllm")["model"], body("sglang")["model"]) == ("a0", "out:a0")
    assert body("tgi")["parameters"]["adapter_id"] == "a0"
    assert (
        body("lorax")["parameters"] | {"adapter_id": "/loras/a0", "adapter_source": "local"}
        == body("lorax")["parameters"]
    )
    assert body("triton")["parameters"]["lora_name"] == "a0"
    assert all(word in json.dumps(body(name)) for name in ("vllm", "tgi", "triton", "lorax") for word in ("Hello", "7"))


# config.pbtxt: fields of ModelConfig in model_config.proto of triton-inference-server/common, as far as they are used.
MODEL_CONFIG: dict[str, Any] = {
    "name": str,
    "backend": str,
    "max_batch_size": int,
    "model_transaction_policy": {"decoupled": bool},
    "instance_group": [{"count": int, "kind": {"KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"}}],
}


def parsed(text: str) -> dict[str, Any]:
    """The text format of protocol buffers, strictly: every character belongs to a token."""
    tokens = re.findall(r'"(?:[^"\\\n]|\\.)*"|[A-Za-z_]\w*|-?\d+|[{}\[\]:,]', re.sub(r"#.*", "", text))
    assert "".join(tokens) == re.sub(r"\s+(?=(?:[^\"]*\"[^\"]*\")*[^\"]*$)", "", re.sub(r"#.*", "", text))

    def value() -> Any:
        token = tokens.pop(0)
        if token == "{":
            return message("}")
        if token == "[":
            items = [value()]
            while tokens[0] == ",":
                tokens.pop(0)
                items.append(value())
            assert tokens.pop(0) == "]"
            return items
        if token.startswith('"'):
            return json.loads(token)
        if token in ("true", "false"):
            return token == "true"
        return int(token) if re.fullmatch(r"-?\d+", token) else {token}

    def message(end: str | None) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        while tokens and tokens[0] != end:
            name = tokens.pop(0)
            assert re.fullmatch(r"[a-z_]+", name), name
            if tokens[0] == ":":
                tokens.pop(0)
            else:
                assert tokens[0] in "{[", f"{name}: a scalar needs a colon"
            assert name not in fields
            fields[name] = value()
        if end is not None:
            assert tokens.pop(0) == end
        return fields

    return message(None)


def check_fields(found: Any, kind: Any) -> None:
    if isinstance(kind, dict):
        assert found.keys() <= kind.keys(), found.keys() - kind.keys()
        for name, value in found.items():
            check_fields(value, kind[name])
    elif isinstance(kind, list):
        for item in found:
            check_fields(item, kind[0])
    elif isinstance(kind, set):
        assert found <= kind
    else:
        assert type(found) is kind


@pytest.mark.parametrize("name", ["out", "llama-3.1_8B"])
def test_triton_config_is_of_its_schema(name: str) -> None:
    one = Served(name=name, path="/models/out", layout="plain", num_gpus=4)
    files = ENGINES["triton"].files(one)
    config = parsed(files[f"model_repository/{name}/config.pbtxt"])
    check_fields(config, MODEL_CONFIG)
    # Triton refuses a name that is not its folder's; the backend refuses KIND_GPU with GPUs, and needs decoupled.
    assert config["name"] == name
    assert config["backend"] == "vllm"
    assert config["max_batch_size"] == 0
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert config["instance_group"] == [{"count": 1, "kind": {"KIND_MODEL"}}]


def test_the_parser_of_this_test_is_strict() -> None:
    for wrong in ('name "a"', "name: a: b", 'name: "a" $', "a: [1", "a { b: 1"):
        with pytest.raises((AssertionError, IndexError)):
            parsed(wrong)
    with pytest.raises(AssertionError):
        check_fields(parsed('nme: "a"'), MODEL_CONFIG)


# Fields of vLLM's EngineArgs (vllm/engine/arg_utils.py, 0.32), as far as they are used.
ENGINE_ARGS = {
    "model": str,
    "served_model_name": str,
    "tensor_parallel_size": int,
    "max_model_len": int,
    "max_num_seqs": int,
    "kv_cache_dtype": str,
    "enable_lora": bool,
    "max_lora_rank": int,
    "max_loras": int,
}


def test_triton_model_json_is_engine_args_and_names_its_adapters() -> None:
    one = served(adapters=adapters(8, 20), cache_dtype="fp8", num_gpus=2, context=4096)
    files = ENGINES["triton"].files(one)
    arguments = json.loads(files["model_repository/out/1/model.json"])
    assert {name: type(value) for name, value in arguments.items()} == ENGINE_ARGS
    assert (arguments["model"], arguments["max_lora_rank"], arguments["max_model_len"]) == ("/models/out", 32, 4096)
    # The backend reads this file when enable_lora is set, and fails without it.
    assert json.loads(files["model_repository/out/1/multi_lora.json"]) == {"a0": "/loras/a0", "a1": "/loras/a1"}
    assert not any("multi_lora" in name for name in ENGINES["triton"].files(served()))


# The nested shape of hf_quant_config.json, as tensorrt_llm/quantization/modelopt_config.py documents and reads it.
HF_QUANT_CONFIG = {
    "type": "object",
    "required": ["producer", "quantization"],
    "additionalProperties": False,
    "properties": {
        "producer": {"type": "object", "required": ["name", "version"]},
        "quantization": {
            "type": "object",
            "required": ["quant_algo", "kv_cache_quant_algo", "exclude_modules"],
            "additionalProperties": False,
            "properties": {
                "quant_algo": {"enum": ["FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_BLOCK_SCALES", "NVFP4", "W4A16_AWQ"]},
                "kv_cache_quant_algo": {"enum": ["FP8", "INT8", None]},
                "exclude_modules": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
            },
        },
    },
}


def test_trtllm_gets_modelopts_words_for_one_scale() -> None:
    one = served("float-quantized", STATIC, unquantized=("model.layers.0.mlp.down_proj", "lm_head"))
    files = ENGINES["trtllm"].files(one)
    document = json.loads(files[f"model/{QUANT_CONFIG}"])
    jsonschema.validate(document, HF_QUANT_CONFIG)
    assert document["quantization"]["quant_algo"] == "FP8"
    assert document["quantization"]["exclude_modules"] == ["model.layers.0.mlp.down_proj", "lm_head"]
    assert ENGINES["trtllm"].links_model(one)
    assert ENGINES["trtllm"].command(one)[1] == "./model"
    for layout, scheme in (("float-quantized", FP8), ("fp8-block", BLOCK)):  # config.json alone says these
        assert ENGINES["trtllm"].files(served(layout, scheme)) == {}
        assert ENGINES["trtllm"].command(served(layout, scheme))[1] == "/models/out"


def test_flags_of_launchers() -> None:
    tgi = ENGINES["tgi"].command(served("pack-quantized", W4, num_gpus=2, context=100, adapters=adapters(8, 8)))
    assert tgi[tgi.index("--quantize") + 1] == "compressed-tensors"
    assert tgi[tgi.index("--num-shard") + 1] == "2"
    assert (tgi[tgi.index("--max-input-tokens") + 1], tgi[tgi.index("--max-total-tokens") + 1]) == ("99", "100")
    assert tgi[tgi.index("--lora-adapters") + 1] == "a0=/loras/a0,a1=/loras/a1"
    assert "--quantize" not in ENGINES["tgi"].command(served())
    lorax = ENGINES["lorax"].command(served("gptq", W4))
    assert lorax[lorax.index("--quantize") + 1] == "gptq"
    sglang = ENGINES["sglang"].command(served("bnb-nf4-dq", cache_dtype="fp8"))
    assert sglang[sglang.index("--load-format") + 1] == "bitsandbytes"
    assert sglang[sglang.index("--kv-cache-dtype") + 1] == "fp8_e4m3"


def test_every_engine_says_where_its_facts_are_from() -> None:
    for engine in ENGINES.values():
        assert engine.sources
        assert all(source.startswith("https://") for source in engine.sources)
