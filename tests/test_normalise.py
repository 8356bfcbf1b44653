"""A normalised adapter: peft loads it and computes the same, and it has what engines ask for and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qconv.adapter_configs import AdapterOptions, NormaliseConfig
from qconv.cli import main
from qconv.errors import AdapterError, CheckpointError
from qconv.normalise import Normalised, normalise
from qconv.records import read_train_record, write_train_record
from qconv.side_files import is_adapter
from tests.merge_cases import TINY_LLAMA, edit_adapter, gpt2, llama, logits, qwen2, save_model, trained, write_adapter

peft = pytest.importorskip("peft")

CASES: dict[str, tuple[Any, dict[str, Any], int]] = {
    "plain": (llama, {"target_modules": ["q_proj", "down_proj"]}, 8),
    "rslora": (llama, {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "r": 9}, 16),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"],
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2, r"layers\.[12]\.mlp\.down_proj": 33},
            "alpha_pattern": {"k_proj": 1, r"model.layers.0.self_attn.o_proj": 20},
        },
        64,
    ),
    "velora": (llama, {"target_modules": ["q_proj"], "velora_config": peft.VeloraConfig(num_groups=2)}, 8),
    "some-layers": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1, 3]}, 8),
    "regex": (llama, {"target_modules": r".*layers\.2\.mlp\.(up|down)_proj"}, 8),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, 8),
    "head": (lambda: qwen2(tied=False), {"target_modules": ["q_proj", "lm_head"]}, 8),
}


def reloaded(folder: Path, build: Any) -> torch.Tensor:
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(build(), str(folder)).eval())


@pytest.mark.parametrize("name", CASES)
def test_peft_reloads_it_with_equal_logits(name: str, tmp_path: Path) -> None:
    build, config, rank = CASES[name]
    before, adapted = logits(build()), trained(build(), **config)
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    expected = logits(adapted)
    assert float((expected - before).abs().max()) > 1e-2, "the adapter must matter"
    base = None
    if name == "head":  # peft keeps the frozen head beside its LoRA, and the base says that it is the base's
        base = str(save_model(build(), tmp_path / "base"))

    result = normalise(NormaliseConfig(adapter=str(tmp_path / "adapter"), out=tmp_path / "out", base=base))

    found = reloaded(tmp_path / "out", build)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], result.rank) == (rank, rank, rank)
    assert not written["use_rslora"]
    assert written["rank_pattern"] == written["alpha_pattern"] == {}
    shapes = {
        t.shape[0 if "lora_A" in n else 1] for n, t in load_file(tmp_path / "out/adapter_model.safetensors").items()
    }
    assert shapes == {rank}


def written_updates(folder: Path) -> dict[str, torch.Tensor]:
    """By module, in double precision; the written config scales by 1."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    sides = {n.removesuffix(".lora_A.weight"): tensor for n, tensor in tensors.items() if n.endswith("lora_A.weight")}
    return {n.removeprefix("base_model.model."): tensors[f"{n}.lora_B.weight"] @ a for n, a in sides.items()}


def test_adalora_is_plain_lora(tmp_path: Path) -> None:
    """Against peft's own update, `get_delta_weight`."""
    config = {"init_r": 6, "target_r": 4, "total_step": 10, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}
    adapted = trained(llama(), config_class="AdaLoraConfig", **config)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    base = str(save_model(llama(), tmp_path / "base"))
    run(tmp_path / "adapter", tmp_path / "out", base=base)
    found = written_updates(tmp_path / "out")
    assert len(found) == 8
    for module, update in found.items():
        expected = adapted.get_submodule(f"base_model.model.{module}").get_delta_weight("default")
        torch.testing.assert_close(update.float(), expected.detach(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "factor"), [({"qa_lora": "sum"}, 1.0), ({"qa_lora": "mean"}, 1 / 64), ({}, 4 / 64)]
)
def test_pooled_inputs_are_repeated(options: dict[str, Any], factor: float, tmp_path: Path) -> None:
    """QA-LoRA, by its formula: A counts for every input of a group. Of peft's own the config tells the group."""
    made = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 4, generator=made), torch.randn(256, 4, generator=made)
    name = "model.layers.2.self_attn.q_proj"
    tensors = {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    config: dict[str, Any] = {} if options else {"use_qalora": True, "qalora_group_size": 64}
    adapter = write_adapter(tmp_path / "adapter", tensors, r=4, lora_alpha=6, **config)
    base = str(TINY_LLAMA) if options else None
    run(adapter, tmp_path / "out", options=AdapterOptions(**options), base=base)
    (found,) = written_updates(tmp_path / "out").values()
    expected = 6 / 4 * factor * (b.double() @ a.double()).repeat_interleave(64, 1)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_elastic_connections_and_a_smaller_rank(tmp_path: Path) -> None:
    made = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 256, generator=made), torch.randn(256, 4, generator=made)
    name = "base_model.model.model.layers.2.self_attn.q_proj."
    tensors = {f"{name}lora_A.weight": a, f"{name}lora_B.weight": b}
    plain = write_adapter(tmp_path / "plain", tensors, r=4, lora_alpha=6)
    scales = {f"{name}lora_default_{side}_scale": torch.tensor([scale]) for side, scale in (("A", 0.7), ("B", -0.3))}
    elastic = write_adapter(tmp_path / "elastic", tensors | scales, r=4, lora_alpha=6)
    run(elastic, tmp_path / "one", options=AdapterOptions(ir_qlora="plain"))
    (found,) = written_updates(tmp_path / "one").values()
    means = torch.eye(4).repeat_interleave(64, 1).double()
    expected = 6 / 4 * (b.double() - 0.3 * means.T) @ (a.double() + 0.7 * means / 64)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    run(plain, tmp_path / "two", options=AdapterOptions(rank=3, rank_scaling="truncated"))
    (found,) = written_updates(tmp_path / "two").values()
    torch.testing.assert_close(found, 6 / 3 * b[:, :3].double() @ a[:3].double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--qa-lora", "sum"], "give it with --base"),
        (["--rank", "auto", "--rank-scaling", "trained"], "give the rank's number"),
        (["--rank", "3"], "--rank and --rank-scaling go together"),
    ],
)
def test_options_that_a_conversion_cannot_follow(
    words: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["convert", str(saved(tmp_path)), "--to", "lora", "-o", str(tmp_path / "out"), *words])
    assert text in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", str(TINY_LLAMA), "--to", "bf16", "-o", str(tmp_path / "out"), *words])
    assert f"{words[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["some-layers", "regex"])
def test_no_other_module_is_targeted(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    build, config, _ = CASES[name]
    adapted = trained(build(), **config)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    normalise(NormaliseConfig(adapter=str(tmp_path / "adapter"), out=tmp_path / "out"))
    again = PeftModel.from_pretrained(build(), str(tmp_path / "out"))
    lora = {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert {name for name, _ in again.named_parameters() if "lora_" in name} == lora


def saved(tmp_path: Path, build: Any = llama, **config: Any) -> Path:
    trained(build(), **({"target_modules": ["q_proj"]} | config)).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def run(adapter: Path, out: Path, **config: Any) -> Normalised:
    return normalise(NormaliseConfig(adapter=str(adapter), out=out, **config))


@pytest.mark.parametrize(
    ("build", "config", "reason"),
    [
        (llama, {"use_dora": True}, "DoRA rescales"),
        (qwen2, {"lora_bias": True}, "lora_bias"),
        (qwen2, {"bias": "lora_only"}, "--base"),
        (llama, {"modules_to_save": ["model.norm"]}, "modules_to_save"),
        (llama, {"rank_pattern": {"q_proj": 513}}, "up to 512"),
    ],
)
def test_refused_with_the_reason(build: Any, config: dict[str, Any], reason: str, tmp_path: Path) -> None:
    adapter = saved(tmp_path, build, **config)
    with pytest.raises(AdapterError, match=reason):
        run(adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_lora_bias_of_zeros_is_left_out(tmp_path: Path) -> None:
    adapter = edit_adapter(
        saved(tmp_path, qwen2, lora_bias=True),
        tmp_path / "zero",
        lambda state: {n: t * 0 if n.endswith("lora_B.bias") else t for n, t in state.items()},
    )
    run(adapter, tmp_path / "out")
    assert not [name for name in load_file(tmp_path / "out/adapter_model.safetensors") if "bias" in name]


def test_an_embedding_saved_along_needs_the_base_and_is_dropped_when_it_is_the_bases(tmp_path: Path) -> None:
    adapter = saved(tmp_path)
    embedding = load_file(TINY_LLAMA / "model.safetensors")["model.embed_tokens.weight"]
    extra = {"base_model.model.model.embed_tokens.weight": embedding}
    with_copy = edit_adapter(adapter, tmp_path / "copy", lambda state: state | extra)
    with pytest.raises(AdapterError, match=r"embed_tokens.weight whole.*--base"):
        run(with_copy, tmp_path / "out")
    run(with_copy, tmp_path / "out", base=str(TINY_LLAMA))
    assert not [name for name in load_file(tmp_path / "out/adapter_model.safetensors") if "embed" in name]
    changed = edit_adapter(
        with_copy, tmp_path / "changed", lambda state: {n: t + 0.1 if "embed" in n else t for n, t in state.items()}
    )
    with pytest.raises(AdapterError, match=r"embed_tokens.weight' cannot be written as plain LoRA"):
        run(changed, tmp_path / "out2", base=str(TINY_LLAMA))


def test_record_and_tokenizer_come_along_byte_for_byte(tmp_path: Path) -> None:
    adapter = saved(tmp_path)
    write_train_record(adapter, "nf4-dq", "org/base", "cpu", {"seed": 3})
    (adapter / "tokenizer.json").write_text("{}")
    run(adapter, tmp_path / "out")
    record = read_train_record(tmp_path / "out")
    assert record is not None
    assert (record.trained_on, record.backend) == ("nf4-dq", "cpu")
    for name in ("qconv-train.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (adapter / name).read_bytes()


def test_16_bit_factors_and_their_measured_rounding(tmp_path: Path) -> None:
    adapter = saved(tmp_path, lora_alpha=7)
    result, exact = run(adapter, tmp_path / "out", dtype="bf16"), run(adapter, tmp_path / "exact")
    assert exact.rounding == 0
    state, full = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "exact"))
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    errors = []
    for a in (name for name in full if "lora_A" in name):
        b = a.replace("lora_A", "lora_B")
        whole = full[b].double() @ full[a].double()
        errors.append(float((state[b].double() @ state[a].double() - whole).norm() / whole.norm()))
    assert result.rounding == pytest.approx(max(errors), rel=1e-6)
    assert 1e-4 < result.rounding < 1e-2


def test_float16_that_would_overflow_is_refused(tmp_path: Path) -> None:
    adapter = edit_adapter(saved(tmp_path), tmp_path / "large", lambda state: {n: t * 1e7 for n, t in state.items()})
    with pytest.raises(AdapterError, match=r"fp16 cannot hold"):
        run(adapter, tmp_path / "out", dtype="fp16")


def test_a_folder_with_model_and_adapter_is_refused(tmp_path: Path) -> None:
    adapter = saved(tmp_path)
    assert is_adapter(adapter)
    assert not is_adapter(TINY_LLAMA)
    (adapter / "config.json").write_text("{}")
    save_file({"x": torch.zeros(1)}, adapter / "model.safetensors")
    with pytest.raises(CheckpointError, match="folders of"):
        is_adapter(adapter)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = saved(tmp_path)

    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as raised:
            main(["convert", *arguments, "-o", str(tmp_path / "out")])
        assert raised.value.code == 2
        return capsys.readouterr().err

    assert "is an adapter: --to bf16 is for models" in refused(str(adapter), "--to", "bf16")
    assert "is no adapter" in refused(str(TINY_LLAMA), "--to", "lora")
    assert "--base, --dtype is not for models" in refused(
        str(TINY_LLAMA), "--to", "bf16", "--base", "x", "--dtype", "bf16"
    )
    assert "--max-shard-size is not for adapters" in refused(str(adapter), "--to", "lora", "--max-shard-size", "1GB")
    main(["convert", str(adapter), "--to", "lora", "--json", "-o", str(tmp_path / "out")])
    document = json.loads(capsys.readouterr().out)
    assert (document["rank"], document["ranks"], document["exit_code"]) == (8, [4], 0)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
