"""What LQ-LoRA saves: nothing of the pickle runs, codes have the values of its formula, the adapter fits its base."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qconv.adapter_configs import UnpickleConfig
from qconv.checkpoint import open_checkpoint
from qconv.cli import main
from qconv.convert import dequantize, lq_lora
from qconv.decomposed import Separated, separate
from qconv.errors import AdapterError, CheckpointError, NumericsError, QconvError
from qconv.merge import load_adapter, merge
from qconv.safe_pickles import load_pickle
from tests.lq_lora_cases import its_modules, normal_float, weight
from tests.merge_cases import TINY_LLAMA, factors, llama, logits, plain_model, toy_base, trained, write_adapter

Q = "base_model.model.model.layers.0.self_attn.q_proj."


def pickled(folder: Path, state: object, **config: Any) -> Path:
    """A folder as its training leaves it."""
    write_adapter(folder, **{"base_model_name_or_path": str(TINY_LLAMA), **config})
    (folder / "adapter_model.safetensors").unlink()
    torch.save(state, folder / "full_model.pth")
    return folder


def separated(folder: Path, **more: Any) -> Separated:
    return separate(UnpickleConfig(adapter=str(folder), out=folder.with_name(folder.name + "-out"), **more))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read_back(folder: Path, tensor: Any) -> Any:
    torch.save({"w": tensor}, folder / "w.pth")
    return load_pickle(folder / "w.pth", "", lq_lora.CLASSES)["w"]


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("scale_bits", "sizes", "dtype"),
    [
        (8, (64, 8), torch.float32),
        (3, (16, 32), torch.bfloat16),
        (2, (32, 16), torch.float16),
        (4, (64, 4), torch.float32),
    ],
)
def test_codes_of_every_width(
    words: bool, bits: int, scale_bits: int, sizes: tuple[int, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(bits)
    with its_modules() as modules:
        stored, values = weight(modules, (32, 128), bits, scale_bits, sizes, words, dtype)
        found = read_back(tmp_path, stored)
    assert type(found) is lq_lora.QuantizedTensor
    assert lq_lora.bits_of(found) == bits
    torch.testing.assert_close(lq_lora.decode(found).double(), values, rtol=3e-7, atol=0)


def test_four_bits_are_those_of_bitsandbytes(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes").functional
    with its_modules() as modules:
        stored, _ = weight(modules, (8, 512), 4, 8, (64, 16), words=True)
        found = read_back(tmp_path, stored)
    container = found._container
    book = bnb.get_4bit_type("nf4", device="cpu")
    torch.testing.assert_close(torch.tensor(normal_float(4)).float(), book, rtol=1e-5, atol=1e-6)
    stream = container.qtensor_packed.view(torch.uint8)  # its first code is the lower half
    packed = (stream << 4 | stream >> 4).view(-1, 1)
    largest = container.qscales_qscales.view(-1, 1).repeat_interleave(16)
    scales = container.qscales_offset + container.qscales_packed.view(torch.uint8) * largest / 255
    shape = torch.Size((8, 512))
    quant_state = bnb.QuantState(scales, shape, book, 64, "nf4", torch.float32)
    decoded = bnb.dequantize_4bit(packed, quant_state)
    torch.testing.assert_close(lq_lora.decode(found), decoded, rtol=1e-5, atol=1e-7)


def whole_state(modules: ModuleType, style: str) -> tuple[dict[str, Tensor], Any]:
    """The state dict of tiny-llama under LQ-LoRA, and peft's model with the decoded weights."""
    adapted = trained(llama(), r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    state: dict[str, Tensor] = {}
    for i, (name, tensor) in enumerate(adapted.state_dict().items()):
        old = name.replace(".base_layer.", ".") if style == "peft 0.5" else name
        state[old] = tensor.clone()
        if ".base_layer." in name:
            bits = (2, 3, 4, 8)[i % 4]
            state[old], values = weight(modules, tuple(tensor.shape), bits, 8, (64, 16), words=i % 8 < 4)
            tensor.copy_(values.float())
    state["base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    return state, adapted


@pytest.mark.parametrize("style", ["peft 0.5", "peft 0.6"])
def test_base_and_adapter_are_for_one_another(style: str, tmp_path: Path) -> None:
    with its_modules() as modules:
        state, adapted = whole_state(modules, style)
        config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
        folder = pickled(tmp_path / "lq", state, **config)
    result = separated(folder)
    assert set(result.bits) == {2, 3, 4, 8}
    assert sum(result.bits.values()) * 2 == result.num_factors
    plain = {name.removeprefix("base_model.model.") for name in adapted.state_dict() if ".lora_" not in name}
    found = load_file(result.base / "model.safetensors")
    assert found.keys() == {name.replace(".base_layer.", ".") for name in plain} - {"lm_head.weight"}
    base = dequantize(open_checkpoint(result.base))
    view = merge(base, [load_adapter(result.adapter, base)])
    torch.testing.assert_close(logits(plain_model(view, tmp_path / "merged")), logits(adapted), rtol=0, atol=2e-4)
    assert json.loads((result.adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        result.base
    )
    assert (result.base / "tokenizer.json").read_bytes() == (TINY_LLAMA / "tokenizer.json").read_bytes()
    out = tmp_path / "out"
    # Nobody has to say what it was trained on.
    main(["merge", str(result.base), str(result.adapter), "--no-validate", "--dtype", "bf16", "-o", str(out)])
    assert load_file(out / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


class Harmful:
    """What a pickle can do when it is read."""

    def __init__(self, mark: Path, how: Any = os.mkdir):
        self.mark, self.how = mark, how

    def __reduce__(self) -> Any:
        return self.how, (str(self.mark),)


def test_nothing_of_it_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "was-here"
    with its_modules() as modules:
        stored, _ = weight(modules, (8, 64), 4, 8, (16, 16), words=False)
        stored._container.offset = Harmful(mark)
        folder = pickled(tmp_path / "lq", {Q + "weight": stored})
        with pytest.raises(AdapterError, match=r"mkdir\)\. Nothing was run"):
            separated(folder)
        assert not mark.exists()
        assert not (tmp_path / "lq-out").exists()
        torch.load(folder / "full_model.pth", weights_only=False)
        assert mark.exists(), "the file is as harmful as it is meant to be"
        modules.Other = type("Other", (), {"__module__": modules.__name__})  # type: ignore[attr-defined]
        torch.save({Q + "weight": modules.Other()}, folder / "full_model.pth")
    with pytest.raises(AdapterError, match=r"\(models\.quantization_utils_2\.Other\)"):
        separated(folder)


def _set(path: str, value: Any) -> Callable[[Any], None]:
    def edit(tensor: Any) -> None:
        *owners, last = path.split(".")
        for owner in owners:
            tensor = getattr(tensor, owner)
        setattr(tensor, last, value(getattr(tensor, last)) if callable(value) else value)

    return edit


@pytest.mark.parametrize(
    ("words", "edit", "message"),
    [
        (False, _set("_transpose", True), "is transposed"),
        (False, _set("_container", None), "found NoneType"),
        (False, _set("_container.ctensor.ptensor", lambda t: t[:-1]), "for 512 codes of 4 bits"),
        (False, _set("_container.ctensor.num_bits", 5), "codes of 5 bits"),
        (False, _set("_container.ctensor.shape", (1 << 40, 1 << 40)), "codes of 4 bits"),
        (False, _set("_container.ctensor.shape", (-8, -64)), "has a shape"),
        (False, _set("_container.cscales.ctensor.shape", (2, 15, 1)), "scales of shape"),
        (False, _set("_container.cscales.cscales.qtensor", lambda t: t[:1]), "largest scales"),
        (False, _set("_container.cscales", 3), "damaged"),
        (False, _set("_container.offset", lambda t: t.double()), "smallest scales"),
        (False, _set("_container.qscheme", lambda s: s._replace(values=s.values[:8])), "code book"),
        (False, _set("_container.median_shape", (2, 16, 8)), "for 32 blocks of 8"),
        (True, _set("_container.block_sizes", (2, 16)), "expected .runs, blocks, elements."),
        (True, _set("_container.qtensor_packed", lambda t: t[:-1]), "for 512 codes of 4 bits"),
        (True, _set("_container.qtensor_shape", (64, 8)), r"of shape \(8, 64\) holds \(64, 8\)"),
        (True, _set("_container.qtensor_num_bits", 4), "damaged"),
        (True, _set("_container.qtensor_map", lambda t: t * float("nan")), "code book"),
    ],
)
def test_damaged_weights(words: bool, edit: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    with its_modules() as modules:
        stored, _ = weight(modules, (8, 64), 4, 8, (16, 16), words=words)
        edit(stored)
        state = {
            Q + "weight": stored,
            Q + "lora_A.default.weight": torch.ones(2, 64),
            Q + "lora_B.default.weight": torch.ones(8, 2),
        }
        folder = pickled(tmp_path / "lq", state)
    with pytest.raises(CheckpointError, match=message) as caught:
        separated(folder)
    assert "full_model.pth: tensor 'model.layers.0.self_attn.q_proj.weight'" in str(caught.value)
    assert not (tmp_path / "lq-out").exists()


def test_files_that_are_none_of_its(tmp_path: Path) -> None:
    with its_modules() as modules:
        stored, _ = weight(modules, (8, 64), 4, 8, (16, 16), words=False)
        good = {
            Q + "weight": stored,
            Q + "lora_A.default.weight": torch.ones(2, 64),
            Q + "lora_B.default.weight": torch.ones(8, 2),
        }

        def expect(words: str, state: object, error: type[QconvError] = AdapterError, **more: Any) -> None:
            folder = pickled(tmp_path / "lq", state)
            with pytest.raises(error, match=words):
                separated(folder, **more)

        expect("expected a dictionary of tensors, found list", [1])
        expect("'step': expected a tensor under a name, found int", {**good, "step": 3})
        expect("expected a plain tensor, found torch.sparse", {**good, Q + "b": torch.eye(3).to_sparse()})
        expect("names of a model under peft", {**good, "model.norm.weight": torch.ones(3)})
        expect("no part of a LoRA", {**good, Q + "lora_embedding_A.default": torch.ones(3)})
        expect("adapters default, other", {**good, Q + "lora_A.other.weight": torch.ones(2, 64)})
        expect("found no lora_A and lora_B", {Q + "weight": stored})
        expect(
            "full_model.pth: tensor 'x' has NaN",
            {**good, "base_model.model.x": torch.tensor([float("nan")])},
            NumericsError,
        )
        expect(
            "does not fit torch.float16; use --dtype fp32",
            {**good, "base_model.model.x": torch.tensor([1e6])},
            NumericsError,
            dtype="fp16",
        )
        folder = pickled(tmp_path / "other", good, base_model_name_or_path="./gone")
        with pytest.raises(CheckpointError, match=r"gone: no such folder.*with --base"):
            separated(folder)
        assert separated(folder, base=str(TINY_LLAMA), dtype="bf16").dtype == "bf16"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("failing", ["base", "base.partial", "adapter", "adapter.partial"])
def test_base_and_adapter_appear_together(
    failing: str, overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever rename fails; nor is a base there, after any of them, without its own adapter."""
    with its_modules() as modules:
        stored, _ = weight(modules, (8, 64), 4, 8, (16, 16), words=False)
        state = {
            Q + "weight": stored,
            Q + "lora_A.default.weight": torch.ones(2, 64),
            Q + "lora_B.default.weight": torch.ones(8, 2),
        }
        folder = pickled(tmp_path / "lq", state)
        out, before = tmp_path / "lq-out", {}
        if overwrite:
            separated(folder)
            before = content(out)
            state[Q + "lora_B.default.weight"] *= 2
            pickled(folder, state)
    rename, fails, generations = Path.rename, True, []

    def of_generation(part: str) -> int | None:
        file = out / part / "generation"
        return int(file.read_text()) if file.is_file() else None

    def watched(self: Path, target: Path) -> Path:
        if self.name == failing and fails:
            raise OSError("no")
        if self.name.endswith(".partial"):
            (self / "generation").write_text("2")
        result = rename(self, target)
        generations.append((of_generation("base"), of_generation("adapter")))
        return result

    if overwrite:
        for part in ("base", "adapter"):
            (out / part / "generation").write_text("1")
        before = content(out)
    monkeypatch.setattr(Path, "rename", watched)
    if overwrite or failing.endswith(".partial"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            separated(folder, overwrite=overwrite)
        assert out.exists() == overwrite
        assert not overwrite or content(out) == before
        assert names(tmp_path) == (["lq", "lq-out"] if overwrite else ["lq"])
        assert not overwrite or names(out) == ["adapter", "base"]
    fails = False
    separated(folder, overwrite=overwrite)
    assert names(out) == ["adapter", "base"]
    assert generations[-1] == (2, 2)
    assert all(base is None or base == adapter for base, adapter in generations)


def test_its_adapter_is_for_no_other_base(tmp_path: Path) -> None:
    """It is plain LoRA as far as it goes; only the file of the decomposed base beside it tells."""
    safe = write_adapter(tmp_path / "safe")
    load_adapter(safe, toy_base())
    (safe / "full_model.pth").write_bytes(b"objects")
    with pytest.raises(CheckpointError, match=r"LQ-LoRA.*is wrong. qconv convert .*--to safetensors -o OUT"):
        load_adapter(safe, toy_base())


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with its_modules() as modules:
        stored, _ = weight(modules, (8, 64), 3, 8, (16, 16), words=False)
        a, values = weight(modules, (2, 64), 8, 8, (16, 8), words=True)  # as its evaluation stores factors
        state = {Q + "weight": stored, Q + "lora_A.default.weight": a, Q + "lora_B.default.weight": torch.ones(8, 2)}
        folder = pickled(tmp_path / "lq", state)
    arguments = ["convert", str(folder), "--to", "safetensors", "--base", str(TINY_LLAMA), "--dtype", "bf16"]
    for _ in range(2):
        main([*arguments, "-o", str(tmp_path / "out"), "--overwrite", "--json"])
        document = json.loads(capsys.readouterr().out)
        assert (document["bits"], document["dtype"], document["num_factors"]) == ({"3": 1}, "bf16", 2)
    assert (
        load_file(Path(document["base"]) / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].dtype
        == torch.bfloat16
    )
    factor = load_file(Path(document["adapter"]) / "adapter_model.safetensors")[Q + "lora_A.weight"]
    torch.testing.assert_close(factor, values.float())
    with pytest.raises(SystemExit):
        main([*arguments, "--rank", "2", "--rank-scaling", "truncated", "-o", str(tmp_path / "no")])
    assert "--rank, --rank-scaling is not for --to safetensors" in capsys.readouterr().err
    other = write_adapter(tmp_path / "plain", factors())
    with pytest.raises(SystemExit):
        main(["convert", str(other), "--to", "safetensors", "--dtype", "bf16", "-o", str(tmp_path / "no")])
    assert "--dtype is not for --to safetensors" in capsys.readouterr().err
