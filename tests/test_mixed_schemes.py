"""Linears that are left out or have a scheme of their own, and the output head: stored, described, and read again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qconv import pipeline
from qconv.checkpoint import SafetensorsCheckpoint, open_checkpoint
from qconv.config import CalibrationConfig, MergeJob, OutputConfig, ValidationConfig
from qconv.convert import DequantizedCheckpoint, dequantize
from qconv.errors import QconvError, SchemeError, UsageError
from qconv.gating import rules_for
from qconv.overrides import OverrideConfig, parse_override
from qconv.quantization_config import QuantizationConfig
from qconv.runners import Candidate
from qconv.selection import schemes_of
from qconv.types import Scheme
from tests.cli_cases import decode_gptq, stored_tensors
from tests.merge_cases import TensorsInMemory

DOWN = OverrideConfig(pattern="*.down_proj", bits=8, group_size=32)
FIRST_ATTENTION = "*.layers.0.self_attn.*"
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
Untied = Callable[..., Path]


@pytest.fixture(scope="module")
def untied(random_model: Callable[..., Path]) -> Path:
    return random_model("llama", num_hidden_layers=2, tie_word_embeddings=False)


def quantize(model: Path, out: Path, target: str, validate: bool = False, **options: Any) -> dict[str, Any]:
    job = MergeJob(
        base=str(model),
        outputs=(OutputConfig(out=out, quantization=QuantizationConfig(target=target, **options)),),
        calibration=CalibrationConfig(samples=8, seq_len=64),
        validation=ValidationConfig(tokens=256, seq_len=64, defaults=False, attribution="never") if validate else None,
        device="cpu",
    )
    (outcome,) = pipeline.run(job)
    return outcome.document


def reopened(folder: Path) -> DequantizedCheckpoint:
    return dequantize(open_checkpoint(folder))


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config


def bits_of(view: DequantizedCheckpoint) -> dict[str, tuple[int, int, bool]]:
    return {m: (scheme.bits, scheme.group_size, scheme.symmetric) for m, scheme in view.schemes.items()}


def expected_bits(module: str) -> tuple[int, int, bool]:
    return (8, 32, True) if module.endswith("down_proj") else (4, 128, True)


@pytest.mark.parametrize("target", ["w4a16", "gptq", "gptq_v2"])
def test_each_linear_has_the_numbers_of_its_own_scheme(tmp_path: Path, tiny_llama: Path, target: str) -> None:
    """In the first block, whose inputs are the same in all runs, they are those of a run with that scheme for all."""
    quantize(tiny_llama, tmp_path / "mixed", target, overrides=(DOWN,), ignore=("*.layers.1.mlp.*",))
    quantize(tiny_llama, tmp_path / "four", target)
    quantize(tiny_llama, tmp_path / "eight", "gptq" if target == "gptq" else "w8a16", bits=8, group_size=32)
    mixed, four, eight = (reopened(tmp_path / name) for name in ("mixed", "four", "eight"))
    assert {m: expected_bits(m) for m in four.quantized_modules if ".1.mlp." not in m} == bits_of(mixed)
    assert len(mixed.quantized_modules) == 25
    for module in (m for m in mixed.quantized_modules if ".layers.0." in m):
        alone = eight if module.endswith("down_proj") else four
        assert torch.equal(mixed.read(f"{module}.weight"), alone.read(f"{module}.weight")), module
    source = open_checkpoint(tiny_llama)
    for name in (n for n in source.specs() if ".layers.1.mlp." in n):
        assert torch.equal(mixed.read(name), source.read(name))


def engine_says(config: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Of a GPTQ module, by the first rule that matches, as GPTQModel and vLLM have it; None = it is not quantized."""
    for rule, changes in config.get("dynamic", {}).items():
        if rule.startswith("-:") and re.match(rule.removeprefix("-:"), name):
            return None
        if not rule.startswith("-:") and re.match(rule.removeprefix("+:"), name):
            return config | changes
    return config


def test_gptq_rules_mean_what_is_stored(tmp_path: Path, tiny_llama: Path) -> None:
    overrides = (
        OverrideConfig(pattern="re:.*(gate|up)_proj$", bits=3, symmetric=False),
        OverrideConfig(pattern="*.1.self_attn.[qkv]_proj", bits=8),
    )
    quantize(tiny_llama, tmp_path / "out", "gptq", overrides=overrides, ignore=(FIRST_ATTENTION,))
    config, view, tensors = config_of(tmp_path / "out"), reopened(tmp_path / "out"), stored_tensors(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == config
    modules = {name.removesuffix(".weight") for name in view.specs() if name.endswith("_proj.weight")}
    assert len(modules) == 28
    for module in modules:
        own = engine_says(config, module)
        assert (own is None) == (".layers.0.self_attn." in module)
        if own is not None:
            assert torch.equal(torch.from_numpy(decode_gptq(tensors, module, own)), view.read(f"{module}.weight"))
    for block in range(4):  # vLLM asks with the names of what it fuses
        for fused, parts in FUSED.items():
            parent = f"model.layers.{block}.{'self_attn' if fused == 'qkv_proj' else 'mlp'}"
            answers = [engine_says(config, f"{parent}.{name}") for name in (fused, *parts)]
            assert all(answer == answers[0] for answer in answers), (parent, fused)
    assert engine_says(config, "model.layers.1.self_attn.qkv_proj")["bits"] == 8  # type: ignore[index]


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "awq"])
def test_transformers_computes_our_logits_from_config_groups(tmp_path: Path, tiny_llama: Path, algorithm: str) -> None:
    out = tmp_path / "out"
    options = {"overrides": (DOWN,), "ignore": (FIRST_ATTENTION, "lm_head")}
    report = quantize(tiny_llama, out, "w4a16", validate=True, algorithm=algorithm, **options)
    check_logits(out)
    facts = report["stages"]["quantization"]
    assert facts["linears quantized"] == 24
    assert facts["linears with other settings"] == [
        "4 in 8-bit symmetric, group 32: model.layers.0.mlp.down_proj to model.layers.3.mlp.down_proj"
    ]
    assert facts["left unquantized by"] == [FIRST_ATTENTION, "lm_head"]
    assert not [finding for finding in report["findings"] if finding["severity"] == "error"]
    assert 0 < report["fidelity"]["total"]["kl"]["mean"] < 0.02


def test_transformers_computes_our_logits_from_odd_widths(tmp_path: Path, tiny_llama: Path) -> None:
    overrides = (
        OverrideConfig(pattern="*.down_proj", bits=5),
        OverrideConfig(pattern="re:.*(gate|up)_proj$", bits=3),
        OverrideConfig(pattern="*.o_proj", bits=6, group_size=-1),
    )
    report = quantize(tiny_llama, tmp_path / "out", "w4a16", overrides=overrides)
    check_logits(tmp_path / "out")
    assert {scheme.bits for scheme in reopened(tmp_path / "out").schemes.values()} == {3, 4, 5, 6}
    assert any(note.startswith("5 bits: ") for note in report["stages"]["quantization"]["notes on readers"])


def check_logits(folder: Path) -> None:
    """transformers with compressed-tensors against plain float32 weights that our reader gave."""
    config = config_of(folder)
    ids = torch.arange(64)[None] * 31 % 2048
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"] | {key for key, *_ in info["mismatched_keys"]}
    found = logits(model, ids)
    view = reopened(folder)
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    missing = plain.load_state_dict({name: view.read(name).float() for name in view.specs()}, strict=False)
    assert not missing.unexpected_keys
    for module in view.quantized_modules:  # the first forward has decompressed the loaded model
        assert torch.equal(model.get_submodule(module).weight.float(), view.read(f"{module}.weight")), module
    assert torch.allclose(found, logits(plain, ids), atol=1e-4, rtol=0)
    assert config["format"] == "pack-quantized"


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(ids).logits
    return result


@pytest.mark.parametrize("target", ["gptq", "w4a16"])
def test_overrides_that_take_all_linears_leave_no_trace_of_what_no_linear_has(
    tmp_path: Path, tiny_llama: Path, target: str
) -> None:
    overrides = (
        OverrideConfig(pattern="*.mlp.*", bits=8, group_size=32),
        OverrideConfig(pattern="*.self_attn.*", bits=8, group_size=64, symmetric=False),
    )
    report = quantize(tiny_llama, tmp_path / "out", target, algorithm="rtn", overrides=overrides)
    facts, config = report["stages"]["quantization"], config_of(tmp_path / "out")
    assert (facts["bits"], facts["group_size"], facts["symmetric"]) == (8, 64, False)  # of 16 linears out of 28
    assert facts["linears with other settings"] == [
        "12 in 8-bit symmetric, group 32: model.layers.0.mlp.gate_proj to model.layers.3.mlp.down_proj"
    ]
    text = json.dumps([config, facts])
    assert [said for said in ('"bits": 4', '"num_bits": 4', '"group_size": 128') if said in text] == []
    if target == "gptq":
        assert (config["bits"], config["group_size"], config["sym"]) == (8, 64, False)
        assert engine_says(config, "model.layers.2.self_attn.q_proj") is not None
    schemes = bits_of(reopened(tmp_path / "out"))
    expected = {name: (8, 32, True) if ".mlp." in name else (8, 64, False) for name in schemes}
    assert (len(schemes), schemes) == (28, expected)


def test_a_single_2_bit_linear_does_not_loosen_the_gate(tmp_path: Path, tiny_llama: Path) -> None:
    two = OverrideConfig(pattern="*.layers.1.self_attn.o_proj", bits=2)
    quantize(tiny_llama, tmp_path / "out", "gptq", algorithm="rtn", overrides=(two,))
    view = reopened(tmp_path / "out")
    weights = dict.fromkeys((2, 4), 0)
    for module, scheme in view.schemes.items():
        weights[scheme.bits] += torch.Size(view.specs()[f"{module}.weight"].shape).numel()
    rules = rules_for(Candidate.of(open_checkpoint(tmp_path / "out")), False, ValidationConfig())
    limits = {rule.metric: rule.limit for rule in rules}
    assert limits["kl_mean"] == pytest.approx((1.0 * weights[2] + 0.3 * weights[4]) / sum(weights.values()), abs=5e-4)
    assert 0.3 < limits["kl_mean"] < 0.32


# The output head


def test_an_untied_head_is_quantized_and_read(tmp_path: Path, untied: Path) -> None:
    report = quantize(untied, tmp_path / "out", "w4a16", validate=True, algorithm="rtn", group_size=32, lm_head=True)
    view = reopened(tmp_path / "out")
    assert "lm_head" in view.quantized_modules
    assert "lm_head" not in config_of(tmp_path / "out")["ignore"]
    check_logits(tmp_path / "out")
    facts = report["stages"]["quantization"]
    assert facts["output head rounded to nearest on a searched grid, without calibration"] == 1
    assert any("output head" in note for note in facts["notes on readers"])
    # Each group no worse than round-to-nearest over its range.
    w_NK = open_checkpoint(untied).read("lm_head.weight").float()
    groups = w_NK.view(len(w_NK), -1, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 7.5
    plain = (groups / scale).round().clamp(-8, 7) * scale
    error = (view.read("lm_head.weight").view_as(groups) - groups).square().sum()
    assert error < (plain - groups).square().sum()


def test_a_head_of_its_own_bits_in_gptq(tmp_path: Path, untied: Path) -> None:
    head = OverrideConfig(pattern="lm_head", bits=8)
    quantize(untied, tmp_path / "out", "gptq", group_size=32, lm_head=True, overrides=(head,))
    config, view, tensors = config_of(tmp_path / "out"), reopened(tmp_path / "out"), stored_tensors(tmp_path / "out")
    assert config["lm_head"] is True
    own = engine_says(config, "lm_head")
    assert own is not None
    assert (own["bits"], engine_says(config, "model.layers.0.mlp.up_proj")["bits"]) == (8, 4)  # type: ignore[index]
    assert torch.equal(torch.from_numpy(decode_gptq(tensors, "lm_head", own)), view.read("lm_head.weight"))


def test_a_tied_head_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(SchemeError, match="the output head is the input embedding"):
        quantize(tiny_llama, tmp_path / "out", "w4a16", lm_head=True)
    assert not (tmp_path / "out").exists()


# Several outputs of one job


def several(model: Path, out: Path, *quantizations: QuantizationConfig) -> list[Path]:
    """One run; the folders in the order of what is asked for."""
    outputs = tuple(OutputConfig(out=out / str(i), quantization=config) for i, config in enumerate(quantizations))
    calibration = CalibrationConfig(samples=8, seq_len=64)
    pipeline.run(MergeJob(base=str(model), outputs=outputs, calibration=calibration, validation=None, device="cpu"))
    return [output.out for output in outputs]


def test_outputs_made_together_have_each_their_own_linears_and_head(
    tmp_path: Path, untied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the ones made alone, byte for byte, and the head was read once for all."""
    head = OverrideConfig(pattern="lm_head", bits=8)
    first = OverrideConfig(pattern="*.layers.0.*", group_size=16, symmetric=False)
    asked = [
        QuantizationConfig(target="w4a16", group_size=32, lm_head=True, overrides=(DOWN,)),
        QuantizationConfig(target="fp8", ignore=(FIRST_ATTENTION,)),
        QuantizationConfig(target="gptq", algorithm="rtn", group_size=32, lm_head=True, overrides=(head, first)),
        QuantizationConfig(target="awq", algorithm="rtn", group_size=32, ignore=("*.mlp.*",)),
    ]
    read: list[str] = []
    inner = SafetensorsCheckpoint._read_host

    def hearing(self: SafetensorsCheckpoint, name: str, **options: Any) -> Tensor:
        read.append(name)
        return inner(self, name, **options)

    monkeypatch.setattr(SafetensorsCheckpoint, "_read_host", hearing)
    together = several(untied, tmp_path / "together", *asked)
    assert read.count("lm_head.weight") == 1
    for number, (folder, config) in enumerate(zip(together, asked, strict=True)):
        (alone,) = several(untied, tmp_path / str(number), config)
        for name in ("model.safetensors", "config.json"):
            assert (folder / name).read_bytes() == (alone / name).read_bytes(), (config.target, name)
    heads = [bits_of(reopened(folder)).get("lm_head") for folder in together]
    assert heads == [(4, 32, True), None, (8, 32, True), None]
    counted = [(folder / "qconv-report.json").read_text().count("output head rounded") for folder in together]
    assert counted == [1, 0, 1, 0]


def test_a_linear_that_one_output_leaves_out_takes_no_scale_from_anothers_statistics(
    tmp_path: Path, tiny_llama: Path
) -> None:
    """With two calibrated outputs the first block is the one made alone."""
    awq = QuantizationConfig(target="awq", ignore=("*.o_proj", "*.down_proj"))
    w4a16 = QuantizationConfig(target="w4a16", overrides=(DOWN,))
    together = several(tiny_llama, tmp_path / "together", awq, w4a16)
    for folder, config in zip(together, (awq, w4a16), strict=True):
        (alone,) = several(tiny_llama, tmp_path / config.target, config)
        found, expected = stored_tensors(folder), stored_tensors(alone)
        assert found.keys() == expected.keys()
        for name in (name for name in found if ".layers.0." in name):
            assert torch.equal(found[name], expected[name]), name
    source, stored = open_checkpoint(tiny_llama), stored_tensors(together[0])
    name = "model.layers.3.self_attn.o_proj.weight"
    assert torch.equal(stored[name], source.read(name))


# Other layouts


@pytest.mark.parametrize(("target", "key"), [
    ("awq", "modules_to_not_convert"), ("fp8", "ignore"), ("fp8-block", "modules_to_not_convert"), ("int8", "ignore"),
    ("nf4", "llm_int8_skip_modules"),
])  # fmt: skip
def test_every_layout_names_what_was_left_out(tmp_path: Path, tiny_llama: Path, target: str, key: str) -> None:
    quantize(tiny_llama, tmp_path / "out", target, ignore=("*.layers.2.*", "*.o_proj"))
    view, source = reopened(tmp_path / "out"), open_checkpoint(tiny_llama)
    left_out = [n for n in source.specs() if n.endswith("_proj.weight") and (".layers.2." in n or "o_proj" in n)]
    assert len(view.quantized_modules) == 28 - len(left_out) == 18
    assert {name.removesuffix(".weight") for name in left_out} <= set(config_of(tmp_path / "out")[key])
    if target != "awq":  # whose folds scale them
        assert all(torch.equal(view.read(name), source.read(name)) for name in left_out)


def settings(*overrides: OverrideConfig, target: str = "w4a16", **options: Any) -> Callable[[], QuantizationConfig]:
    return lambda: QuantizationConfig(target=target, overrides=overrides, **options)


REFUSED: dict[str, tuple[Callable[[], QuantizationConfig], str]] = {
    "awq": (settings(DOWN, target="awq"), "--override: awq has one scheme .*--requant w4a16 --algorithm awq"),
    "fp8": (settings(DOWN, target="fp8"), "--override: fp8 has one scheme for all linears"),
    "bits": (settings(OverrideConfig(pattern="*", bits=2)), "w4a16 has bits 3 or 4 or 5 or 6 or 8, got 2"),
    "head of awq": (settings(target="awq", lm_head=True), "readers of awq expect the output head in 16 bits"),
    "no linear": (settings(OverrideConfig(pattern="*.down_prj", bits=8)), r"matches no linear; did you mean \*\.down_"),
    "nothing near": (settings(ignore=("zzz",)), r"--ignore 'zzz' matches no linear; there are \*\.q_proj"),
    "left out": (settings(DOWN, ignore=("*.mlp.*",)), r"--override '\*\.down_proj' matches no linear"),
    "taken": (settings(DOWN, OverrideConfig(pattern="*.0.mlp.down_proj", bits=4)), "earlier overrides have taken all"),
    "fused ignored": (settings(ignore=("*.q_proj",)), r"run q_proj and k_proj and v_proj as one linear, and --ignore"),
    "fused": (settings(OverrideConfig(pattern="*.gate_proj", bits=8)), r"gate_proj \(8-bit.*up_proj \(4-bit"),
    "everything": (settings(ignore=("*",)), "--ignore leaves no linear to quantize"),
    "group": (settings(OverrideConfig(pattern="*.down_proj", group_size=80)), "down_proj: .*group size, got .* and 80"),
    "expression": (settings(ignore=("re:(",)), r"'re:\(' is not a regular expression"),
    "empty": (settings(ignore=("",)), "an empty pattern"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_work(tmp_path: Path, tiny_llama: Path, case: str) -> None:
    build, message = REFUSED[case]
    with pytest.raises(QconvError, match=message):
        output = OutputConfig(out=tmp_path / "out", quantization=build())
        pipeline.run(MergeJob(base=str(tiny_llama), outputs=(output,), validation=None))
    assert not list(tmp_path.iterdir())


def test_head_and_ignore_contradict_one_another(tmp_path: Path, untied: Path) -> None:
    with pytest.raises(UsageError, match="--lm-head asks for what --ignore leaves out"):
        quantize(untied, tmp_path / "out", "w4a16", lm_head=True, ignore=("lm_head",))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("*.down_proj:bits=8", OverrideConfig(pattern="*.down_proj", bits=8)),
        ("re:.*a:b:group-size=-1,asym", OverrideConfig(pattern="re:.*a:b", group_size=-1, symmetric=False)),
        ("a:sym, bits=2", OverrideConfig(pattern="a", bits=2, symmetric=True)),
    ],
)
def test_overrides_are_parsed(text: str, expected: OverrideConfig) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits=8", "no pattern before the settings"),
        ("*.down_proj", "'\\*.down_proj' is no setting; expected PATTERN:"),
        ("*:bits=four", "'bits=four' is no setting"),
        ("*:bits=4,bits=8", "'bits=8' says again"),
        ("*:sym,asym", "'asym' says again"),
        ("re:(:bits=4", "not a regular expression"),
        ("*:group-size=4", "group-size is at least 8"),
        ("*:", "'' is no setting"),
    ],
)
def test_malformed_overrides_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_override(text)


def test_an_override_that_changes_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="changes nothing"):
        OverrideConfig(pattern="*")


def test_the_default_group_size_need_not_divide_where_an_override_has_its_own() -> None:
    shapes = {"model.layers.0.a.weight": (64, 256), "model.layers.0.b.weight": (64, 40)}
    view = TensorsInMemory({name: torch.empty(shape) for name, shape in shapes.items()}, {})
    with pytest.raises(SchemeError, match="divides the 40 input features"):
        schemes_of(view, shapes, QuantizationConfig(target="w4a16"))
    own = OverrideConfig(pattern="*.b", group_size=8)
    base, schemes = schemes_of(view, shapes, QuantizationConfig(target="w4a16", overrides=(own,)))
    assert base == Scheme(group_size=128, activation_order=True)
    assert [scheme.group_size for scheme in schemes.values()] == [128, 8]
