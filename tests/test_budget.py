"""A budget for the size: what is chosen keeps it to the byte, and is better than what chance or one width would do."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from qconv import allocation, pipeline
from qconv.allocation import Option, allocate
from qconv.checkpoint import open_checkpoint
from qconv.config import CalibrationConfig, MergeJob, OutputConfig, ValidationConfig
from qconv.convert import DequantizedCheckpoint, dequantize
from qconv.errors import QconvError, UsageError
from qconv.overrides import OverrideConfig, parse_override
from qconv.plan import make_plan
from qconv.progress import QUIET
from qconv.quantization_config import QuantizationConfig, parse_budget, parse_widths
from qconv.sensitivity import split_rows
from qconv.size_budget import together
from tests.cli_cases import stored_tensors
from tests.test_mixed_schemes import check_logits

BUDGET = 4.6
CALIBRATION = CalibrationConfig(samples=12, seq_len=64)


# Spending a budget --------------------------------------------------------------------------------


def options(sizes: st.SearchStrategy[int]) -> st.SearchStrategy[list[list[Option]]]:
    option = st.builds(Option, num_bytes=sizes, cost=st.floats(0, 1))
    return st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=5)


def totals(items: list[list[Option]], numbers: tuple[int, ...] | list[int]) -> tuple[int, float]:
    taken = [row[number] for row, number in zip(items, numbers, strict=True)]
    return sum(option.num_bytes for option in taken), sum(option.cost for option in taken)


@settings(max_examples=150, deadline=None)
@given(options(st.integers(0, 30).map(lambda n: 6 * n)), st.integers(0, 800))
def test_no_other_choice_within_the_limit_costs_less(items: list[list[Option]], limit: int) -> None:
    every = [totals(items, numbers) for numbers in itertools.product(*(range(len(row)) for row in items))]
    fitting = [cost for num_bytes, cost in every if num_bytes <= limit]
    if not fitting:
        with pytest.raises(ValueError, match="the smallest options take"):
            allocate(items, limit)
        return
    num_bytes, cost = totals(items, allocate(items, limit))
    assert num_bytes <= limit
    assert cost == pytest.approx(min(fitting), abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(options(st.integers(0, 1000)), st.integers(0, 4000))
def test_coarse_cells_keep_the_limit(items: list[list[Option]], limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "MAX_CELLS", 20)
        smallest = sum(min(option.num_bytes for option in row) for row in items)
        if smallest <= limit:
            assert totals(items, allocate(items, limit))[0] <= limit


def test_many_units_end_near_reverse_water_filling() -> None:
    """Cover and Thomas 2006, theorem 10.3.3: bits of any fraction would end at the geometric mean of the sensitivities.

    Whole bits end up to (2 - 1/2) / ln 4 = 1.082 above it.
    """
    dice = random.Random(1)
    sensitivities = [math.exp(dice.gauss(0, 1.5)) for _ in range(400)]
    items = [[Option(num_bytes=bits, cost=s * 4.0**-bits) for bits in range(1, 17)] for s in sensitivities]
    _, cost = totals(items, allocate(items, 6 * len(items)))
    bound = len(items) * math.exp(sum(map(math.log, sensitivities)) / len(items)) * 4.0**-6
    assert bound < cost < 1.1 * bound


# What is written ----------------------------------------------------------------------------------


def quantize(model: Path, out: Path, **config: Any) -> dict[str, Any]:
    job = MergeJob(
        base=str(model),
        outputs=(OutputConfig(out=out, quantization=QuantizationConfig(target="w4a16", **config)),),
        calibration=CALIBRATION,
        validation=None,
        device="cpu",
    )
    (outcome,) = pipeline.run(job)
    return outcome.document


def reopened(folder: Path) -> DequantizedCheckpoint:
    return dequantize(open_checkpoint(folder))


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("budget") / "out"
    document = quantize(tiny_llama, out, budget=BUDGET, group_size=128)
    return out, document["stages"]["budget"]


@pytest.fixture(scope="module")
def uniform(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("uniform")
    for bits in (4, 8):
        overrides = (OverrideConfig(pattern="*", bits=bits),)
        quantize(tiny_llama, folder / str(bits), group_size=128, overrides=overrides)
    return {bits: folder / str(bits) for bits in (4, 8)}


@pytest.fixture(scope="module")
def with_groups(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[Path, dict[str, Any]]:
    """Group sizes are chosen, too."""
    out = tmp_path_factory.mktemp("groups") / "out"
    document = quantize(tiny_llama, out, budget=BUDGET)
    return out, document["stages"]["budget"]


def bytes_of_linears(folder: Path) -> int:
    modules = reopened(folder).quantized_modules
    tensors = stored_tensors(folder)
    return sum(t.numel() * t.element_size() for name, t in tensors.items() if name.rpartition(".")[0] in modules)


@pytest.mark.parametrize("made", ["chosen", "with_groups"])
def test_the_budget_is_kept_to_the_byte(made: str, request: pytest.FixtureRequest) -> None:
    folder, facts = request.getfixturevalue(made)
    view = reopened(folder)
    num_weights = sum(prod(view.specs()[f"{module}.weight"].shape) for module in view.quantized_modules)
    stored = bytes_of_linears(folder)
    assert facts["bytes of quantized linears"] == stored
    assert facts["bits per weight"] == pytest.approx(8 * stored / num_weights, abs=1e-4)
    assert 8 * stored <= BUDGET * num_weights
    # What is left is less than the smallest linear would take more of.
    assert BUDGET * num_weights - 8 * stored < 4 * max(unit["weights"] for unit in facts["linears"].values())


@pytest.mark.parametrize("made", ["chosen", "with_groups"])
def test_what_is_reported_is_what_is_stored(made: str, request: pytest.FixtureRequest) -> None:
    folder, facts = request.getfixturevalue(made)
    schemes = reopened(folder).schemes
    units = together(list(schemes))
    assert list(units) == list(facts["linears"])
    assert len(units) == 16  # of 28 linears
    for name, modules in units.items():
        unit = facts["linears"][name]
        assert {(schemes[m].bits, schemes[m].group_size) for m in modules} == {(unit["bits"], unit["group size"])}
    assert {unit["bits"] for unit in facts["linears"].values()} == {4, 8}
    sizes = {unit["group size"] for unit in facts["linears"].values()}
    assert sizes == {128} if made == "chosen" else {-1, 64} < sizes <= {-1, 32, 64, 128}
    check_logits(folder)


@pytest.mark.parametrize("made", ["chosen", "with_groups"])
def test_the_overrides_of_the_report_give_the_same_bytes(
    made: str, request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path
) -> None:
    folder, facts = request.getfixturevalue(made)
    overrides = tuple(parse_override(text) for text in facts["as overrides"])
    size = facts["group size of what no override is about"]
    quantize(tiny_llama, tmp_path / "again", group_size=size, overrides=overrides)
    own, again = stored_tensors(folder), stored_tensors(tmp_path / "again")
    assert own.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in own.items())


def weights_of(folder: Path) -> dict[str, Tensor]:
    view = reopened(folder)
    return {f"{module}.weight": view.read(f"{module}.weight").float() for module in view.quantized_modules}


class Whole:
    """transformers' own model in float32, whose weights can be exchanged."""

    def __init__(self, folder: Path, ids_BS: Tensor):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.own = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.ids_BS = ids_BS
        self.reference = self.log_probabilities({})

    def log_probabilities(self, weights: Mapping[str, Tensor]) -> Tensor:
        self.model.load_state_dict({**self.own, **weights}, strict=True)
        with torch.no_grad():
            return torch.log_softmax(self.model(self.ids_BS).logits.double(), -1)[:, :-1]

    def kl(self, weights: Mapping[str, Tensor]) -> float:
        other = self.log_probabilities(weights)
        return float((self.reference.exp() * (self.reference - other)).sum(-1).mean())


def test_the_choice_beats_one_width_and_chance(
    chosen: tuple[Path, dict[str, Any]], uniform: dict[int, Path], tiny_llama: Path
) -> None:
    """On text that was neither calibrated nor measured on; all with the same two sets of weights."""
    _, facts = chosen
    ids = make_plan(job_of(tiny_llama, CalibrationConfig(samples=8, seq_len=64, seed=5)), QUIET).calibration
    assert ids is not None
    model = Whole(tiny_llama, ids)
    weights = {bits: weights_of(folder) for bits, folder in uniform.items()}
    modules = together([name.removesuffix(".weight") for name in weights[4]])

    def kl(widths: Mapping[str, int]) -> float:
        taken = {f"{m}.weight": weights[widths[unit]][f"{m}.weight"] for unit, ms in modules.items() for m in ms}
        return model.kl(taken)

    own = kl({name: unit["bits"] for name, unit in facts["linears"].items()})
    assert own < 0.85 * kl(dict.fromkeys(modules, 4))
    dice = random.Random(0)
    room = sum(unit["weights"] for unit in facts["linears"].values() if unit["bits"] == 8)
    by_chance = []
    for _ in range(12):
        order, widths, left = dice.sample(list(modules), len(modules)), dict.fromkeys(modules, 4), room
        for name in order:
            if facts["linears"][name]["weights"] <= left:
                widths[name], left = 8, left - facts["linears"][name]["weights"]
        by_chance.append(kl(widths))
    assert own < min(by_chance)


def test_groups_that_are_chosen_beat_groups_that_are_given(
    chosen: tuple[Path, dict[str, Any]], with_groups: tuple[Path, dict[str, Any]], tiny_llama: Path
) -> None:
    """The same widths, algorithm, calibration and budget; on text that nothing saw."""
    ids = make_plan(job_of(tiny_llama, CalibrationConfig(samples=16, seq_len=64, seed=5)), QUIET).calibration
    assert ids is not None
    model = Whole(tiny_llama, ids)
    own, given = (model.kl(weights_of(folder)) for folder, _ in (with_groups, chosen))
    assert own < 0.95 * given


def job_of(model: Path, calibration: CalibrationConfig, target: str = "w4a16", **config: Any) -> MergeJob:
    return MergeJob(
        base=str(model),
        outputs=(OutputConfig(out=model.parent / "nowhere", quantization=QuantizationConfig(target=target, **config)),),
        calibration=calibration,
        validation=None,
        device="cpu",
    )


# What is measured ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_costs_are_those_of_transformers_with_that_part_exchanged(
    tmp_path: Path, random_model: Callable[..., Path], family: str
) -> None:
    """Round-to-nearest chooses codes by the weights alone, so the same ones come from a run in 4 bits."""
    model = random_model(family)
    document = quantize(model, tmp_path / "out", budget=6.0, algorithm="rtn", group_size=32)
    quantize(model, tmp_path / "four", algorithm="rtn", group_size=32)
    calibration = make_plan(job_of(model, CALIBRATION), QUIET).calibration
    assert calibration is not None
    whole, four = Whole(model, split_rows(calibration)[1]), weights_of(tmp_path / "four")
    facts = document["stages"]["budget"]["linears"]
    units = together([name.removesuffix(".weight") for name in four])
    assert list(units) == list(facts)
    for name, modules in units.items():
        exchanged = {f"{module}.weight": four[f"{module}.weight"] for module in modules}
        expected = whole.kl(exchanged if family == "llama" else in_parameters(exchanged, whole.own))
        assert facts[name]["cost at 4 bits"] == pytest.approx(expected, rel=2e-3, abs=1e-7), name
    assert all(unit["cost at 4 bits"] > 0 for unit in facts.values())


def test_costs_of_what_was_chosen_follow_from_the_sample(tmp_path: Path, tiny_llama: Path) -> None:
    """One unit was measured in 4 bits and one size of groups; what else was chosen costs what transformers finds."""
    widths = (3, 4, 5, 6, 8)
    document = quantize(tiny_llama, tmp_path / "out", budget=BUDGET, budget_bits=widths, algorithm="rtn")
    facts, stored = document["stages"]["budget"]["linears"], weights_of(tmp_path / "out")
    calibration = make_plan(job_of(tiny_llama, CALIBRATION), QUIET).calibration
    assert calibration is not None
    whole = Whole(tiny_llama, split_rows(calibration)[1])
    others = {name: unit for name, unit in facts.items() if (unit["bits"], unit["group size"]) != (4, 128)}
    assert len({(unit["bits"], unit["group size"]) for unit in others.values()}) > 3
    modules = together([name.removesuffix(".weight") for name in stored])
    ratios = [
        whole.kl({f"{module}.weight": stored[f"{module}.weight"] for module in modules[name]}) / unit["cost"]
        for name, unit in others.items()
    ]
    assert 0.8 < math.prod(ratios) ** (1 / len(ratios)) < 1.25
    assert all(0.5 < ratio < 2 for ratio in ratios)


def in_parameters(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Experts as transformers holds them: gate above up, all experts in one tensor."""
    result = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    experts = {name for name in weights if ".experts." in name}
    for layer in {name.partition(".experts.")[0] + ".experts" for name in experts}:
        num = len(own[f"{layer}.down_proj"])
        parts = {
            role: torch.stack([weights[f"{layer}.{number}.{role}.weight"] for number in range(num)])
            for role in ("gate_proj", "up_proj", "down_proj")
        }
        result[f"{layer}.gate_up_proj"] = torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1)
        result[f"{layer}.down_proj"] = parts["down_proj"]
    return result


def test_text_that_is_compared_is_not_calibrated_on() -> None:
    rows = torch.arange(16 * 300).view(16, 300)
    calibrated, compared = split_rows(rows)
    assert calibrated.shape == (12, 300)
    assert [len(part) for part in split_rows(rows[:, :64])] == [12, 4]  # a quarter at most
    assert [len(part) for part in split_rows(rows.reshape(150, 32))] == [113, 37]
    assert [len(part) for part in split_rows(rows.reshape(300, 16))] == [225, 75]
    assert [len(part) for part in split_rows(rows.reshape(600, 8).repeat(2, 1))] == [944, 256]  # 2048 tokens
    assert torch.equal(compared, rows[12:, :256])
    assert [len(part) for part in split_rows(rows[:2])] == [1, 1]
    assert [len(part) for part in split_rows(rows[:1])] == [1, 1]  # there is no other


def test_all_experts_of_a_layer_get_one_width() -> None:
    parent = "model.layers.0.mlp.experts"
    experts = [f"{parent}.{number}.{role}" for number in range(2) for role in ("gate_proj", "up_proj", "down_proj")]
    assert together(["model.layers.0.self_attn.o_proj", *experts]) == {
        "model.layers.0.self_attn.o_proj": ["model.layers.0.self_attn.o_proj"],
        parent: experts,
    }


def test_what_engines_run_as_one_gets_one_width() -> None:
    attention = "model.layers.0.self_attn"
    latent = [f"{attention}.{role}" for role in ("q_a_proj", "kv_a_proj_with_mqa")]  # vLLM's fused_qkv_a_proj
    assert list(together([*latent, f"{attention}.q_b_proj"]).values()) == [latent, [f"{attention}.q_b_proj"]]
    linear = "model.layers.1.linear_attn"
    for pair in (("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a")):
        modules = [f"{linear}.{role}" for role in pair]
        assert list(together(modules).values()) == [modules]


# With other options -------------------------------------------------------------------------------


def test_overrides_keep_what_they_say_and_count(tmp_path: Path, tiny_llama: Path) -> None:
    overrides = (OverrideConfig(pattern="*.down_proj", bits=8, group_size=32),)
    document = quantize(tiny_llama, tmp_path / "out", budget=6.0, budget_bits=(3, 4, 6), overrides=overrides)
    facts, view = document["stages"]["budget"], reopened(tmp_path / "out")
    assert {(s.bits, s.group_size) for m, s in view.schemes.items() if m.endswith("down_proj")} == {(8, 32)}
    assert {s.bits for m, s in view.schemes.items() if not m.endswith("down_proj")} <= {3, 4, 6}
    assert facts["linears that keep their scheme"] == [f"model.layers.{n}.mlp.down_proj" for n in range(4)]
    assert facts["bytes of quantized linears"] == bytes_of_linears(tmp_path / "out")
    num_weights = sum(prod(view.specs()[f"{module}.weight"].shape) for module in view.quantized_modules)
    assert 8 * bytes_of_linears(tmp_path / "out") <= 6.0 * num_weights
    assert facts["cost measured"].startswith("KL of the model with one unit at 4 bits in groups of 128 by gptq, ")


def test_a_validated_run_with_folds_is_near_what_was_expected(tmp_path: Path, tiny_llama: Path) -> None:
    """AWQ's scales: measured with GPTQ, written with both."""
    job = MergeJob(
        base=str(tiny_llama),
        outputs=(
            OutputConfig(
                out=tmp_path / "out",
                quantization=QuantizationConfig(target="w4a16", algorithm="awq+gptq", budget=5.0, group_size=128),
            ),
        ),
        calibration=CALIBRATION,
        validation=ValidationConfig(tokens=512, seq_len=64, attribution="never"),
        device="cpu",
    )
    (outcome,) = pipeline.run(job)
    facts = outcome.document["stages"]["budget"]
    kl = outcome.document["fidelity"]["total"]["kl"]["mean"]
    alike = facts["with one width for all"]
    assert alike["8 bits"]["sum of costs"] < facts["sum of costs as chosen"] < alike["4 bits"]["sum of costs"]
    assert [round(row["bits per weight"], 2) for row in alike.values()] == [4.13, 8.13]
    measured = sum(unit["cost at 4 bits"] for unit in facts["linears"].values())
    assert alike["4 bits"]["sum of costs"] == pytest.approx(measured)
    assert 0.3 < kl / facts["sum of costs as chosen"] < 3  # beside it, rounding activations to bfloat16
    assert outcome.document["verdict"] == "pass"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too little": (
        {"budget": 4.0},
        r"--budget 4bpw: .*4 or 8 bits for each.* take 4\.05\d+ to 8\.5\d+ bits per weight",
    ),
    "too little for groups": (
        {"budget": 4.1, "group_size": 128},
        r"4 or 8 bits in groups of 128 for each linear.* take 4\.12\d+ to 8\.12\d+ bits per weight",
    ),
    "too much": ({"budget": 9.0}, r"take 4\.05\d+ to 8\.5\d+ bits per weight, scales included; give a budget"),
    "other widths": ({"budget": 3.0, "budget_bits": (3, 5)}, r"3 or 5 bits.* take 3\.05\d+ to 5\.5\d+"),
    "nothing to choose": ({"budget": 8.0, "overrides": (OverrideConfig(pattern="*", bits=8),)}, "nothing to choose"),
    "bits, too": ({"budget": 4.5, "bits": 4}, "--bits 4 says them; drop one"),
    "one width": ({"budget": 4.5, "budget_bits": (4,)}, "two widths or more"),
    "a width twice": ({"budget": 4.5, "budget_bits": (4, 4, 8)}, "each once"),
    "a width that no reader has": ({"budget": 4.5, "budget_bits": (2, 4)}, "w4a16 has bits 3 or 4 or 5 or 6 or 8"),
    "widths alone": ({"budget_bits": (4, 8)}, "that a --budget chooses from"),
    "no number of bits": ({"budget": 45.0}, "such as 4.5bpw, got 45"),
    "one scheme for all": ({"budget": 4.5, "target": "awq"}, "awq has one scheme for all linears; gptq, gptq_v2"),
}


def test_stored_orders_of_columns_have_groups(tiny_llama: Path) -> None:
    """One scale for each row makes an order needless, which is stored for each linear all the same."""
    (layout,) = make_plan(job_of(tiny_llama, CALIBRATION, target="gptq", budget=4.2), QUIET).layouts
    assert -1 in {scheme.group_size for scheme in layout.schemes.values()}
    with pytest.raises(UsageError, match=r"take 4\.2\d+ to"):
        make_plan(job_of(tiny_llama, CALIBRATION, target="gptq", budget=4.2, desc_act=True), QUIET)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(tiny_llama: Path, case: str) -> None:
    config, words = REFUSED[case]
    with pytest.raises(UsageError, match=words):
        make_plan(job_of(tiny_llama, CALIBRATION, **config), QUIET)


def test_the_ends_of_the_reach_can_be_asked_for(tiny_llama: Path) -> None:
    with pytest.raises(QconvError) as caught:
        make_plan(job_of(tiny_llama, CALIBRATION, budget=1.0), QUIET)
    least, _, most = str(caught.value).partition(" take ")[2].split()[:3]
    for budget, bits in ((least, 4), (most, 8)):
        (layout,) = make_plan(job_of(tiny_llama, CALIBRATION, budget=float(budget)), QUIET).layouts
        assert {scheme.bits for scheme in layout.schemes.values()} == {bits}


def test_how_a_budget_is_written() -> None:
    assert [parse_budget(text) for text in ("4.5bpw", "4.5", "5 bpw")] == [4.5, 4.5, 5.0]
    assert parse_widths("4,5,8") == (4, 5, 8)
    for text in ("4.5 bits", "bpw", "-1", "1e1bpw"):
        with pytest.raises(UsageError, match=r"such as 4\.5bpw"):
            parse_budget(text)
    with pytest.raises(UsageError, match="commas between"):
        parse_widths("4 8")
