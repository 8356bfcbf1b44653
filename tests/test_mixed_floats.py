"""4-bit floats for some linears among integers: stored, read by others, chosen by a budget, and refused elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig as PackageConfig
from transformers import AutoModelForCausalLM

from qconv import pipeline
from qconv.config import CalibrationConfig, MergeJob, OutputConfig
from qconv.convert import FORMATS
from qconv.describe import describe
from qconv.errors import QconvError, SchemeError, UsageError
from qconv.estimate_jobs import estimate_merge
from qconv.overrides import OverrideConfig, parse_override
from qconv.plan import make_plan
from qconv.progress import QUIET
from qconv.quantization_config import QuantizationConfig, parse_widths
from qconv.quantize.solve import round_searched
from qconv.recipe import load_recipe
from qconv.report.model_card import model_card
from qconv.sensitivity import rounding_errors, split_rows
from qconv.serving import launcher
from qconv.serving.engine import Served
from qconv.serving.sglang import refusal as sglang
from qconv.serving.trtllm import refusal as trtllm
from qconv.serving.vllm import refusal as vllm
from qconv.size_budget import Choice, sizes_of, together
from qconv.targets import TARGETS, mixed_target, target_scheme
from qconv.types import Scheme
from tests.cli_cases import stored_tensors
from tests.merge_cases import TensorsInMemory
from tests.test_budget import CALIBRATION, Whole, bytes_of_linears, job_of, reopened, weights_of
from tests.test_budget import quantize as with_budget
from tests.test_mixed_schemes import config_of, logits, quantize
from tests.test_quantize_fp4 import logits_in_float32

BUDGET = 4.6
WIDTHS = (3, 4, 8, "nvfp4a16", "mxfp4a16")
NVFP4 = OverrideConfig(pattern="*.down_proj", target="nvfp4a16")
MXFP4 = OverrideConfig(pattern="*.o_proj", target="mxfp4a16")
FIVE = OverrideConfig(pattern="re:.*(gate|up)_proj$", bits=5, group_size=64)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("mixed") / "out"
    report = quantize(tiny_llama, out, "w4a16", validate=True, overrides=(NVFP4, MXFP4, FIVE))
    return out, report


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory, tiny_nf4: Path) -> tuple[Path, dict[str, Any]]:
    """Of an NF4 base, whose weights lie near the numbers of 4-bit floats."""
    out = tmp_path_factory.mktemp("chosen") / "out"
    return out, with_budget(tiny_nf4, out, budget=BUDGET, budget_bits=WIDTHS)


# What is written ----------------------------------------------------------------------------------


@pytest.mark.parametrize("made", ["mixed", "chosen"])
def test_transformers_computes_our_logits_from_layouts_side_by_side(made: str, request: pytest.FixtureRequest) -> None:
    folder, _ = request.getfixturevalue(made)
    check_logits(folder)


def check_logits(folder: Path) -> None:
    """Every weight as compressed-tensors decompresses it, to bfloat16, and the logits of the whole in float32.

    Floats are exact in bfloat16, and integers times their scales are rounded to it once.
    """
    ids = torch.arange(64)[None] * 31 % 2048
    view, (found, model) = reopened(folder), logits_in_float32(folder, ids)
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    weights = {name: view.read(name).bfloat16().float() for name in view.specs()}
    for module, scheme in view.schemes.items():
        assert torch.equal(model.get_submodule(module).weight, weights[f"{module}.weight"]), module
        if scheme.is_fp4:
            assert torch.equal(weights[f"{module}.weight"], view.read(f"{module}.weight")), module
    assert not plain.load_state_dict(weights, strict=False).unexpected_keys
    assert torch.allclose(found, logits(plain, ids), atol=1e-4, rtol=0)
    assert config_of(folder)["format"] == "mixed-precision"


def test_each_config_group_names_the_layout_of_its_linears(mixed: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = mixed
    view, config = reopened(folder), config_of(folder)
    assert set(view.kind.split("+")) == {"pack-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized"}
    expected = {"down_proj": "nvfp4-pack-quantized", "o_proj": "mxfp4-pack-quantized"}
    for module in view.quantized_modules:
        role = module.rpartition(".")[2]
        assert view.layout_of(module) == expected.get(role, "pack-quantized"), module
    package = PackageConfig.model_validate(config)
    groups = [group for group in package.config_groups.values() if group.format and group.weights]
    assert {group.format: group.weights.type for group in groups if group.weights} == {
        "pack-quantized": "int",
        "nvfp4-pack-quantized": "float",
        "mxfp4-pack-quantized": "float",
    }
    assert len(package.config_groups) == 4


def test_floats_among_others_have_the_numbers_of_their_own_target(
    mixed: tuple[Path, dict[str, Any]], tiny_llama: Path, tmp_path: Path
) -> None:
    """In the first block, whose inputs are the same in all runs."""
    view = reopened(mixed[0])
    for target, role in (("nvfp4a16", "mlp.down_proj"), ("mxfp4a16", "self_attn.o_proj")):
        quantize(tiny_llama, tmp_path / target, target)
        alone, module = reopened(tmp_path / target), f"model.layers.0.{role}"
        assert torch.equal(view.read(f"{module}.weight"), alone.read(f"{module}.weight"))
        own = replace_order(view.schemes[module])
        assert own == alone.schemes[module] == target_scheme(target)


def replace_order(scheme: Scheme) -> Scheme:
    assert mixed_target(scheme) is not None
    return target_scheme(str(mixed_target(scheme)))


def test_the_report_and_inspect_name_the_kinds(mixed: tuple[Path, dict[str, Any]]) -> None:
    folder, report = mixed
    facts = report["stages"]["quantization"]
    assert set(facts["format"].split("+")) == {"pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"}
    assert (
        "4 in nvfp4a16: model.layers.0.mlp.down_proj to model.layers.3.mlp.down_proj"
        in (facts["linears with other settings"])
    )
    assert facts["read by"] == TARGETS["mxfp4a16"].readers  # SGLang reads none of these
    assert any("mixed-precision" in note for note in facts["notes on readers"])
    assert "float4, group size 16, symmetric x 4" in describe(folder)["scheme"]
    assert 0 < report["fidelity"]["total"]["kl"]["mean"] < 0.02
    assert not [finding for finding in report["findings"] if finding["severity"] == "error"]
    card = model_card(
        report, base_model="base", adapter=None, license=None, relation="quantized", tags=["qconv", "w4a16"]
    )
    assert "stored as compressed-tensors mixed-precision (" in card


def test_floats_for_all_linears_are_one_layout(tmp_path: Path, tiny_llama: Path) -> None:
    overrides = (OverrideConfig(pattern="*", target="nvfp4a16"),)
    report = quantize(tiny_llama, tmp_path / "out", "w4a16", algorithm="rtn", overrides=overrides)
    quantize(tiny_llama, tmp_path / "alone", "nvfp4a16", algorithm="rtn")
    own, alone = stored_tensors(tmp_path / "out"), stored_tensors(tmp_path / "alone")
    assert own.keys() == alone.keys()
    assert all(torch.equal(tensor, alone[name]) for name, tensor in own.items())
    assert config_of(tmp_path / "out") == config_of(tmp_path / "alone")
    assert report["stages"]["quantization"]["format"] == "nvfp4-pack-quantized"


def test_what_engines_run_as_one_has_one_global_scale_and_one_kind(
    chosen: tuple[Path, dict[str, Any]], tiny_llama: Path, tmp_path: Path
) -> None:
    tensors, view = stored_tensors(chosen[0]), reopened(chosen[0])
    fused = [modules for modules in together(list(view.schemes)).values() if len(modules) > 1]
    floats = [modules for modules in fused if view.schemes[modules[0]].has_global_scale]
    assert floats
    for modules in floats:
        assert len({float(tensors[f"{module}.weight_global_scale"]) for module in modules}) == 1
    with pytest.raises(SchemeError, match=r"gate_proj \(nvfp4a16\), .*up_proj \(4-bit, group size 128, symmetric\)"):
        quantize(tiny_llama, tmp_path / "out", "w4a16", overrides=(parse_override("*.gate_proj:target=nvfp4a16"),))


@pytest.mark.parametrize("target", ["nvfp4a16", "mxfp4a16"])
def test_a_head_in_floats(tmp_path: Path, random_model: Callable[..., Path], target: str) -> None:
    untied = random_model("llama", num_hidden_layers=2, tie_word_embeddings=False)
    head = OverrideConfig(pattern="lm_head", target=target)
    quantize(untied, tmp_path / "out", "w4a16", algorithm="rtn", group_size=32, lm_head=True, overrides=(head,))
    view = reopened(tmp_path / "out")
    assert view.layout_of("lm_head") == TARGETS[target].format
    check_logits(tmp_path / "out")


@pytest.mark.parametrize(("engine", "bits", "floats", "reason"), [
    (vllm, 5, "mxfp4a16", None),
    (sglang, 8, "nvfp4a16", None),
    (sglang, 5, "nvfp4a16", "pack-quantized of 4 or 8 bits, and this has 5"),
    (sglang, 8, "mxfp4a16", "no kernel for such weights"),
    (launcher._tgi_refusal, 8, "nvfp4a16", "one layout for all linears"),
    (trtllm, 8, "nvfp4a16", "does not load pack-quantized+nvfp4-pack-quantized"),
])  # fmt: skip
def test_engines_that_read_several_layouts_are_given_them(
    engine: Callable[[Served], str | None], bits: int, floats: str, reason: str | None
) -> None:
    layout = f"pack-quantized+{TARGETS[floats].format}"
    found = engine(Served(name="m", path="m", layout=layout, schemes=(Scheme(bits=bits), target_scheme(floats))))
    assert found is None if reason is None else found is not None and reason in found


# A budget -----------------------------------------------------------------------------------------


def test_a_budget_with_floats_is_kept_to_the_byte(chosen: tuple[Path, dict[str, Any]]) -> None:
    folder, document = chosen
    facts, view = document["stages"]["budget"], reopened(folder)
    num_weights = sum(prod(view.specs()[f"{module}.weight"].shape) for module in view.quantized_modules)
    assert facts["bytes of quantized linears"] == bytes_of_linears(folder)
    assert 8 * bytes_of_linears(folder) <= BUDGET * num_weights
    for name, modules in together(list(view.schemes)).items():
        unit = facts["linears"][name]
        found = {(mixed_target(view.schemes[m]), view.schemes[m].bits, view.schemes[m].group_size) for m in modules}
        assert found == {(unit["target"], unit["bits"], unit["group size"])}
    targets = [unit["target"] for unit in facts["linears"].values()]
    assert targets.count("nvfp4a16") > 4
    assert targets.count(None) > 4
    assert facts["widths"] == [3, 4, 8, "nvfp4a16", "mxfp4a16"]
    assert facts["with one width for all"]["nvfp4a16"]["bits per weight"] == pytest.approx(4.5, abs=1e-3)
    assert facts["sum of costs as chosen"] < facts["with one width for all"]["nvfp4a16"]["sum of costs"]


def test_the_overrides_of_the_report_give_the_same_bytes(
    chosen: tuple[Path, dict[str, Any]], tiny_nf4: Path, tmp_path: Path
) -> None:
    facts = chosen[1]["stages"]["budget"]
    assert any(text.endswith(":target=nvfp4a16") for text in facts["as overrides"])
    overrides = tuple(parse_override(text) for text in facts["as overrides"])
    size = facts["group size of what no override is about"]
    with_budget(tiny_nf4, tmp_path / "again", group_size=size, overrides=overrides)
    own, again = stored_tensors(chosen[0]), stored_tensors(tmp_path / "again")
    assert own.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in own.items())


def test_floats_beside_integers_beat_integers_on_an_nf4_base(
    chosen: tuple[Path, dict[str, Any]], tiny_nf4: Path, tmp_path: Path
) -> None:
    """The same widths of integers, algorithm, calibration and budget; on text that nothing saw."""
    with_budget(tiny_nf4, tmp_path / "integers", budget=BUDGET, budget_bits=(3, 4, 8))
    ids = make_plan(job_of(tiny_nf4, CalibrationConfig(samples=16, seq_len=64, seed=5)), QUIET).calibration
    assert ids is not None
    pipeline.run(
        MergeJob(base=str(tiny_nf4), outputs=(OutputConfig(out=tmp_path / "plain", dtype="fp32"),), validation=None)
    )
    model = Whole(tmp_path / "plain", ids)
    own, integers = (model.kl(weights_of(folder)) for folder in (chosen[0], tmp_path / "integers"))
    assert own < 0.95 * integers


def test_costs_of_floats_follow_from_the_sample(tmp_path: Path, tiny_llama: Path) -> None:
    """Measured in 4-bit integers; what was put into floats costs what transformers finds."""
    widths = (4, "nvfp4a16", "mxfp4a16")
    document = with_budget(
        tiny_llama, tmp_path / "out", budget=4.35, budget_bits=widths, algorithm="rtn", group_size=128
    )
    facts, stored = document["stages"]["budget"]["linears"], weights_of(tmp_path / "out")
    calibration = make_plan(job_of(tiny_llama, CALIBRATION), QUIET).calibration
    assert calibration is not None
    whole = Whole(tiny_llama, split_rows(calibration)[1])
    modules = together([name.removesuffix(".weight") for name in stored])
    floats = {name: unit for name, unit in facts.items() if unit["target"] is not None}
    assert len(floats) > 3
    ratios = [
        whole.kl({f"{module}.weight": stored[f"{module}.weight"] for module in modules[name]}) / unit["cost"]
        for name, unit in floats.items()
    ]
    assert 0.7 < math.prod(ratios) ** (1 / len(ratios)) < 1.4
    assert all(0.4 < ratio < 2.5 for ratio in ratios)


def test_errors_of_floats_are_those_of_a_whole_weight(tiny_llama: Path) -> None:
    """Of all rows: what rounding the weight by itself gives, its global scale taken out again."""
    torch.manual_seed(0)
    w_NK = torch.randn(16, 64) / 300
    choices = [Choice.floats(target) for target in ("nvfp4a16", "mxfp4a16")]
    errors = rounding_errors({"w": w_NK}, choices, Scheme(group_size=32), searched=True)
    for choice in choices:
        linear = round_searched(w_NK, choice.of(Scheme()), "w")
        assert errors[choice] == pytest.approx(float((linear.dequantize() - w_NK).square().sum()), rel=1e-4)


def test_floats_alone_are_a_choice(tiny_llama: Path) -> None:
    widths = ("nvfp4a16", "mxfp4a16")
    (layout,) = make_plan(job_of(tiny_llama, CALIBRATION, budget=4.4, budget_bits=widths), QUIET).layouts
    assert set(layout.layouts) == {TARGETS[name].format for name in widths}
    with pytest.raises(
        UsageError, match=r"with nvfp4a16 or mxfp4a16 for each linear, .* take 4\.2500 to 4\.50\d\d bits"
    ):
        make_plan(job_of(tiny_llama, CALIBRATION, budget=5.0, budget_bits=widths), QUIET)


def test_floats_alone_that_no_group_of_fits_are_refused() -> None:
    shapes = {"model.layers.0.self_attn.o_proj.weight": (64, 64), "model.layers.0.mlp.down_proj.weight": (64, 40)}
    view = TensorsInMemory({name: torch.empty(shape) for name, shape in shapes.items()}, {})
    floats = ("nvfp4a16", "mxfp4a16")
    config = QuantizationConfig(target="w4a16", group_size=-1, budget=4.4, budget_bits=floats)
    with pytest.raises(SchemeError, match=r"down_proj: --budget 4\.4bpw: none of nvfp4a16, mxfp4a16 divides"):
        sizes_of(view, list(shapes), config, FORMATS["pack-quantized"], torch.bfloat16)
    beside = replace(config, budget_bits=(4, *floats))
    sizes = sizes_of(view, list(shapes), beside, FORMATS["pack-quantized"], torch.bfloat16)
    assert [len(unit.num_bytes) for unit in sizes.units] == [3, 1]


def test_a_plan_has_the_size_of_what_is_measured(chosen: tuple[Path, dict[str, Any]], tiny_nf4: Path) -> None:
    (layout,) = make_plan(job_of(tiny_nf4, CALIBRATION, budget=BUDGET, budget_bits=WIDTHS), QUIET).layouts
    planned = sum(spec.num_bytes for spec in layout.specs)
    stored = sum(t.numel() * t.element_size() for t in stored_tensors(chosen[0]).values())
    assert planned == pytest.approx(stored, rel=0.01)


def test_time_is_planned_by_what_linears_are_in(tiny_llama: Path) -> None:
    """Solving 4-bit floats takes longer than solving integers."""

    def units(**config: Any) -> tuple[float, float]:
        job = job_of(tiny_llama, CALIBRATION, **config)
        (stage,) = (
            s for s in estimate_merge(job, make_plan(job, QUIET), "cpu", "quantize").stages if s.name == "quantize"
        )
        return stage.units.get("gptq", 0.0), stage.units.get("gptq of floats", 0.0)

    whole, _ = units()
    assert units(target="nvfp4a16") == (0, whole)
    down = 256 * 768 / (3 * 256 * 768 + 2 * 256 * 256 + 2 * 128 * 256)
    assert units(overrides=(NVFP4,)) == pytest.approx(((1 - down) * whole, down * whole))


# How it is asked for ------------------------------------------------------------------------------


def test_words_for_floats() -> None:
    assert parse_widths("3,4,nvfp4a16") == (3, 4, "nvfp4a16")
    assert parse_override("*.down_proj:target=mxfp4a16") == OverrideConfig(pattern="*.down_proj", target="mxfp4a16")
    assert {name: mixed_target(target_scheme(name)) for name in TARGETS["w4a16"].mixed_targets} == {
        "nvfp4a16": "nvfp4a16",
        "mxfp4a16": "mxfp4a16",
    }
    assert mixed_target(TARGETS["nvfp4"].scheme or Scheme()) is None  # rounds its inputs, too
    for name, target in TARGETS.items():
        for other in target.mixed_targets:
            assert TARGETS[other].format in FORMATS, name


RECIPE = """recipe: 1
base: {base}
outputs:
  - out: OUT
    target: w4a16
    budget: 4.5bpw
    budget-bits: [3, 4, {width}]
    overrides:
      - pattern: '*.o_proj'
        target: {target}
"""


def recipe(folder: Path, base: Path, width: str = "nvfp4a16", target: str = "mxfp4a16") -> Path:
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.format(base=base, width=width, target=target))
    return file


def test_a_recipe_says_the_same(tmp_path: Path, tiny_llama: Path) -> None:
    (output,) = load_recipe(recipe(tmp_path, tiny_llama)).job.outputs
    assert output.quantization == QuantizationConfig(
        target="w4a16",
        budget=4.5,
        budget_bits=(3, 4, "nvfp4a16"),
        overrides=(OverrideConfig(pattern="*.o_proj", target="mxfp4a16"),),
    )


@pytest.mark.parametrize(("words", "message"), [
    ({"width": "nvfp4"}, r"outputs\[0\]\.budget-bits\[2\].* expected a whole number"),
    ({"target": "nvfp4"}, r"outputs\[0\]\.overrides\[0\]\.target.* no such choice: 'nvfp4'"),
])  # fmt: skip
def test_a_recipe_with_a_target_that_rounds_inputs_is_refused_at_its_place(
    tmp_path: Path, tiny_llama: Path, words: dict[str, str], message: str
) -> None:
    with pytest.raises(QconvError, match=message):
        load_recipe(recipe(tmp_path, tiny_llama, **words))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "GPTQ": (
        {"target": "gptq", "budget": 4.5, "budget_bits": (4, "nvfp4a16")},
        "--budget-bits: gptq holds integers alone, got 'nvfp4a16'; w4a16 and w8a16 hold linears in 4-bit floats",
    ),
    "GPTQ's override": (
        {"target": "gptq", "overrides": (NVFP4,)},
        r"--override '\*.down_proj': gptq holds integers alone, got 'nvfp4a16'; w4a16 and w8a16",
    ),
    "AWQ": ({"target": "awq", "overrides": (NVFP4,)}, "awq has one scheme for all linears"),
    "GGUF": ({"target": "gguf-q4_0", "budget": 4.5, "budget_bits": (4, "nvfp4a16")}, "gguf-q4_0 has one scheme"),
    "its own target": ({"target": "nvfp4a16", "overrides": (NVFP4,)}, "nvfp4a16 has one scheme for all linears"),
    "inputs, too": (
        {"target": "w4a16", "budget": 4.5, "budget_bits": (4, "nvfp4")},
        "w4a16 holds linears in the schemes of nvfp4a16 or mxfp4a16 beside its own, got 'nvfp4'",
    ),
    "no target": ({"target": "w4a16", "overrides": (parse_override("*:target=fp5"),)}, "nvfp4a16 or mxfp4a16 .*'fp5'"),
    "one": ({"target": "w4a16", "budget": 4.5, "budget_bits": ("nvfp4a16",)}, "two widths or more"),
    "twice": ({"target": "w4a16", "budget": 4.5, "budget_bits": (4, "nvfp4a16", "nvfp4a16")}, "each once"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_where_no_reader_has_it(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        QuantizationConfig(**options)


def test_a_target_and_settings_contradict_one_another() -> None:
    with pytest.raises(UsageError, match="nvfp4a16 has one scheme, and bits, group-size or symmetric say others"):
        parse_override("*:target=nvfp4a16,bits=8")
