"""Gate rules: what may be written, what it means, and what is refused with which words."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from contextlib import suppress
from datetime import date, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qconv.errors import UsageError
from qconv.gate_rules import (
    MAX_WAIVER_DAYS,
    METRICS,
    TASK_PATTERN,
    Policy,
    Rule,
    Waiver,
    artifact_kind,
    combine,
    default_rules,
    find_metric,
    load_policy,
    parse_rule,
)

TODAY = date(2026, 6, 1)
NAMED = [name for name in METRICS if name != TASK_PATTERN]


@pytest.mark.parametrize(
    ("text", "metric", "upper", "limit", "factor"),
    [
        ("kl_mean<=0.1", "kl_mean", True, 0.1, None),
        ("  kl_mean  <=  1e-3 ", "kl_mean", True, 1e-3, None),
        ("kl_max<=0", "kl_max", True, 0.0, None),
        ("top1_agreement >= 90%", "top1_agreement", False, 0.9, None),
        ("top1_agreement>=99.9 %", "top1_agreement", False, 0.999, None),
        ("perplexity_ratio<=105%", "perplexity_ratio", True, 1.05, None),
        ("log_perplexity_ratio<=-0.01", "log_perplexity_ratio", True, -0.01, None),
        ("adapter_effect_retained>=-5", "adapter_effect_retained", False, -5.0, None),
        ("block_sqnr_db_min>=20", "block_sqnr_db_min", False, 20.0, None),
        ("merge.kl_mean <= 5x floor", "merge.kl_mean", True, None, 5.0),
        ("requantization.kl_p99_9<=1.5 × floor", "requantization.kl_p99_9", True, None, 1.5),
        ("flips<=3*floor", "flips", True, None, 3.0),
        ("top5_agreement>=2X floor", "top5_agreement", False, None, 2.0),
        ("findings<=0", "findings", True, 0.0, None),
        ("task.arc_easy.acc_drop<=2%", "task.arc_easy.acc_drop", True, 0.02, None),
        ("task.mmlu.v2.acc,none_drop<=0.02", "task.mmlu.v2.acc,none_drop", True, 0.02, None),
    ],
)
def test_rules_are_read(text, metric, upper, limit, factor):
    expected = Rule(metric=metric, upper=upper, limit=limit, floor_factor=factor, origin="flag")
    assert parse_rule(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kl_mean", ["METRIC<=LIMIT", "in quotes"]),
        ("", ["METRIC<=LIMIT"]),
        ("kl_mean<0.1", ["METRIC<=LIMIT"]),
        ("kl_mean=0.1", ["METRIC<=LIMIT"]),
        ("kl_mean<=0.1<=0.2", ["METRIC<=LIMIT"]),
        ("kl_mean<=", ["expected a limit", "5x floor"]),
        ("kl_mean<=lots", ["expected a limit", "'lots'"]),
        ("kl_mean<=nan", ["expected a limit", "'nan'"]),
        ("kl_mean<=inf", ["expected a limit"]),
        ("kl_mean<=1e999", ["finite"]),
        ("kl_mean<=٣", ["expected a limit"]),
        ("kl_mean<=1_0", ["expected a limit"]),
        ("kl_mean<=-0.1", ["never below 0", "-0.1"]),
        ("kl_mean<=10%", ["nats", "not in percent"]),
        ("kl_mean>=0.1", ["smaller", "kl_mean<=LIMIT"]),
        ("top1_agreement<=0.9", ["larger", "top1_agreement>=LIMIT"]),
        ("top1_agreement>=90", ["at most 1", "%"]),
        ("flips<=-1%", ["never below 0"]),
        ("perplexity_ratio<=0", ["positive"]),
        ("adapter_effect_retained>=1.5", ["at most 1"]),
        ("kl_men<=0.1", ["unknown metric 'kl_men'", "kl_mean"]),
        ("kl<=0.1", ["did you mean kl_mean"]),
        ("merge.kl<=0.1", ["merge.kl_mean"]),
        ("KL_MEAN<=0.1", ["did you mean kl_mean"]),
        ("zzzzzz<=0.1", ["there are kl_mean", "merge.*"]),
        ("task.arc<=0.1", ["unknown metric"]),
        ("task.arc.acc<=0.1", ["unknown metric", TASK_PATTERN]),
        ("merge.kl_mean<=floor", ["expected a limit"]),
        ("merge.kl_mean<=5 floor", ["expected a limit"]),
        ("merge.kl_mean<=0.5x floor", ["at least 1", "to itself"]),
        ("merge.kl_mean<=-2x floor", ["at least 1"]),
        ("merge.kl_mean<=1e999x floor", ["finite"]),
        ("perplexity_ratio<=2x floor", ["no noise floor", "give a number"]),
        ("prompts_identical>=2x floor", ["no noise floor"]),
        ("findings<=2x floor", ["no noise floor"]),
        ("task.arc.acc_drop<=2x floor", ["no noise floor"]),
        ("block_sqnr_db_min>=20%", ["dB"]),
    ],
)
def test_what_is_no_rule_is_refused(text, words):
    with pytest.raises(UsageError) as caught:
        parse_rule(text)
    for word in [*words, repr(text)]:
        assert word in str(caught.value)


def test_a_rule_has_one_limit():
    with pytest.raises(UsageError, match="one limit"):
        Rule(metric="kl_mean", upper=True)
    with pytest.raises(UsageError, match="one limit"):
        Rule(metric="kl_mean", upper=True, limit=0.1, floor_factor=2)


@settings(deadline=None)
@given(name=st.sampled_from([*NAMED, "task.x.acc_drop"]), data=st.data())
def test_a_rule_reads_what_it_writes(name, data):
    metric = find_metric(name)
    if metric.noise_power is not None and data.draw(st.booleans()):
        limit, factor = None, data.draw(st.floats(1, 1e6))
    else:
        low, high = max(metric.lowest, -1e9), min(metric.highest, 1e9)
        limit, factor = data.draw(st.floats(low, high, exclude_min=metric.unit == "ratio")), None
    rule = Rule(metric=name, upper=not metric.larger_is_better, limit=limit, floor_factor=factor, origin="flag")
    assert parse_rule(str(rule)) == rule


@settings(deadline=None)
@given(text=st.text(alphabet="kl_mean.top1<=>0123456789%x floor-+e*", max_size=40))
def test_nonsense_is_a_usage_error_or_a_rule(text):
    try:
        rule = parse_rule(text)
    except UsageError:
        return
    assert (rule.limit is None) != (rule.floor_factor is None)
    assert math.isfinite(rule.limit if rule.limit is not None else rule.floor_factor)


def test_every_pair_metric_exists_for_both_steps():
    bare = {name for name in METRICS if "." not in name}
    alone = {"adapter_effect_retained", "block_sqnr_db_min", "prompts_identical", "findings"}
    for prefix in ("merge.", "requantization."):
        assert {name.removeprefix(prefix) for name in METRICS if name.startswith(prefix)} == bare - alone
    assert {"kl_p99_9", "reverse_kl_p99", "top5_agreement", "flips", "probability_difference_rms"} <= bare
    larger = {"top1_agreement", "top5_agreement", "adapter_effect_retained", "block_sqnr_db_min", "prompts_identical"}
    assert {name for name in bare if METRICS[name].larger_is_better} == larger


def test_rules_load_no_torch():
    """Checked in a process of its own: this one has loaded torch long ago."""
    script = "import sys, qconv.gate_rules, qconv.validate.gates; print('torch' in sys.modules, 'yaml' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# What docs/quality.md measures, mean KL of the whole and of the merge alone: sound conversions, and broken ones.
SOUND = [("plain", 0.00161, 0.00161), ("fp8", 0.02116, 0.00161), ("int8", 0.00199, 0.00161), ("int4", 0.11195, 0.00161)]
BROKEN = {
    "merged into the 16-bit base": ("plain", 0.16395, 0.16395),
    "merged in 4 bits": ("plain", 0.37813, 0.37813),
    "wrong base hidden by 4 bits": ("int4", 0.25, 0.16395),
    "round to nearest": ("int4", 0.62976, 0.00161),
    "no adapter": ("int4", 0.39185, 0.39185),
}


def passes(kind, total, merged):
    limits = {rule.metric: rule.limit for rule in default_rules(kind, has_adapter=True)}
    return total <= limits["kl_mean"] and merged <= limits["merge.kl_mean"]


@pytest.mark.parametrize("case", SOUND, ids=lambda case: case[0])
def test_defaults_admit_what_is_sound_with_room(case):
    kind, total, merged = case
    assert passes(kind, total * 2, merged * 2)


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN)
def test_defaults_refuse_what_is_broken(case):
    assert not passes(*case)


def test_defaults_without_an_adapter_do_not_ask_for_a_merge():
    plain, merged = default_rules("fp8", has_adapter=False), default_rules("fp8", has_adapter=True)
    assert [rule.metric for rule in plain] == ["kl_mean", "findings"]
    assert {rule.metric for rule in merged} - {rule.metric for rule in plain} == {"merge.kl_mean"}
    assert all(rule.origin == "default" and rule.upper for rule in merged)


@pytest.mark.parametrize(
    ("bits", "is_float", "kind"),
    [
        (None, False, "plain"),
        (16, True, "plain"),
        (8, True, "fp8"),
        (8, False, "int8"),
        (6, False, "int4"),
        (4, False, "int4"),
        (4, True, "int4"),
        (3, False, "int3"),
        (2, False, "int2"),
    ],
)
def test_artifact_kinds(bits, is_float, kind):
    assert artifact_kind(bits, is_float) == kind
    assert default_rules(kind, has_adapter=True)


@pytest.mark.parametrize(
    ("weights", "limit"),
    [
        ({"int4": 7}, 0.3),
        ({"int4": 990, "int2": 10}, 0.307),
        ({"int4": 1, "int8": 1}, 0.16),
        ({"int8": 9, "int4": 1}, 0.048),
    ],
)
def test_each_weight_brings_its_share_of_the_limit_of_its_width(weights, limit):
    rules = default_rules(weights, has_adapter=True)
    assert {rule.metric: rule.limit for rule in rules} == {"kl_mean": limit, "merge.kl_mean": 0.01, "findings": 0.0}


def test_flags_replace_the_file_which_replaces_defaults():
    defaults = default_rules("int4", has_adapter=True)
    file = [parse_rule("kl_mean<=0.2"), parse_rule("merge.kl_mean<=5x floor"), parse_rule("flips<=5%")]
    combined = combine(defaults, file, [parse_rule("kl_mean<=0.1"), parse_rule("kl_p99<=1")])
    assert [(str(rule), rule.origin) for rule in combined] == [
        ("kl_mean <= 0.1", "flag"),
        ("merge.kl_mean <= 5.0x floor", "file"),
        ("findings <= 0.0", "default"),
        ("flips <= 0.05", "file"),
        ("kl_p99 <= 1.0", "flag"),
    ]


def test_two_flags_on_one_metric_contradict_each_other():
    with pytest.raises(UsageError, match=r"two gates on kl_mean.*0\.1.*0\.2"):
        combine([], [], [parse_rule("kl_mean<=0.1"), parse_rule("kl_mean<=0.2")])


POLICY = """\
defaults: false            # only what stands here
gates:
  kl_mean: {max: 0.1}
  kl_p99: {max: 1e-3}
  merge.kl_mean: {max: 5x floor}
  adapter_effect_retained: {min: 75%}
  task.arc.acc_drop: {max: 0.02}
waivers:
  - gate: kl_p99
    reason: >
      names in code
      change
    approved_by: J. Doe
    expires: 2026-12-31
  - {gate: "finding:adapter-scale", reason: known, approved_by: J. Doe, expires: "2026-07-01"}
"""
RULES = ["kl_mean<=0.1", "kl_p99<=0.001", "merge.kl_mean<=5x floor"]
RULES += ["adapter_effect_retained>=0.75", "task.arc.acc_drop<=0.02"]
EXPECTED = Policy(
    rules=tuple(parse_rule(text, "file") for text in RULES),
    waivers=(
        Waiver(gate="kl_p99", reason="names in code change", approved_by="J. Doe", expires=date(2026, 12, 31)),
        Waiver(gate="finding:adapter-scale", reason="known", approved_by="J. Doe", expires=date(2026, 7, 1)),
    ),
    defaults=False,
)


def read(tmp_path, text, name="policy.yaml"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_policy(path, TODAY)


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_a_policy_is_read(tmp_path, prefix):
    assert read(tmp_path, prefix + POLICY.encode()) == EXPECTED


def test_json_says_the_same(tmp_path):
    """Read by Python's own YAML rules and written as JSON, numbers as numbers."""
    import yaml

    text = json.dumps(yaml.safe_load(POLICY), default=str, indent="\t")
    assert '"max": 0.1' in text
    assert read(tmp_path, text, "policy.json") == EXPECTED


def test_defaults_stay_unless_the_file_drops_them(tmp_path):
    assert read(tmp_path, "gates: {}").defaults
    assert read(tmp_path, "waivers: []") == Policy()


def waiver(**changes):
    facts = {"gate": "kl_p99", "reason": "r", "approved_by": "me", "expires": "2026-12-31", **changes}
    return json.dumps({"waivers": [{key: value for key, value in facts.items() if value is not ...}]})


BAD = {
    "empty file": ("", ["empty"]),
    "list": ("- a", ["the file", "a list"]),
    "unknown key": ("gate: {}", [".yaml:1: gate: unknown key", "did you mean gates?"]),
    "defaults": ("defaults: 1", ["defaults", "true or false"]),
    "gates list": ("gates: [kl_mean]", ["gates", "a list"]),
    "gates nothing": ("gates:", ["gates", "nothing"]),
    "unknown metric": ("gates: {kl_men: {max: 1}}", ["gates.kl_men", "kl_mean"]),
    "the pattern": (f"gates: {{{TASK_PATTERN!r}: {{max: 1}}}}", ["unknown metric"]),
    "bare limit": ("gates: {kl_mean: 0.1}", ["gates.kl_mean", "text"]),
    "both sides": ("gates: {kl_mean: {max: 1, min: 0}}", ["gates.kl_mean", "{max: LIMIT}"]),
    "no side": ("gates: {kl_mean: {}}", ["gates.kl_mean", "{max: LIMIT}"]),
    "wrong side": ("gates: {kl_mean: {min: 0.1}}", ["gates.kl_mean", "smaller", "max: LIMIT in a file"]),
    "unknown side": ("gates: {kl_mean: {maximum: 1}}", ["gates.kl_mean.maximum: unknown key", "did you mean max?"]),
    "boolean limit": ("gates: {kl_mean: {max: yes}}", ["gates.kl_mean", "max", "true or false"]),
    "null limit": ("gates: {kl_mean: {max: }}", ["gates.kl_mean", "nothing"]),
    "list limit": ("gates: {kl_mean: {max: [1]}}", ["gates.kl_mean", "a list"]),
    "infinite limit": ("gates: {kl_mean: {max: .inf}}", ["gates.kl_mean", "expected a limit"]),
    "minutes": ("gates: {kl_mean: {max: 1:30}}", ["gates.kl_mean", "1:30"]),
    "duplicate metric": ("gates:\n  kl_mean: {max: 1}\n  kl_mean: {max: 2}", [".yaml:3: ", "'kl_mean'", "twice"]),
    "duplicate section": ("gates: {}\ngates: {}", [".yaml:2: ", "twice"]),
    "alias": ("a: &a [1]\ngates: *a", [".yaml:1: ", "anchors"]),
    "alias alone": ("gates: *a", [".yaml:1: ", "aliases"]),
    "python tag": ("gates: !!python/object/apply:os.system [echo]", [".yaml:1: ", "tags"]),
    "harmless tag": ("defaults: !!str yes", ["tags"]),
    "merge key": ("<<: {gates: {}}", ["<<: unknown key"]),
    "mapping as key": ("? {a: 1}\n: 2", ["key must be a word"]),
    "two documents": ("gates: {}\n---\ngates: {}", ["not YAML"]),
    "broken": ("gates: {", ["not YAML"]),
    "deep": ("[" * 3_000, ["not YAML"]),
    "too large": ("#" * 70_000, ["64 KiB"]),
    "not text": (b"\xff\xfe\x00", ["UTF-8"]),
    "null character": ("gates: \0", ["not YAML"]),
    "waivers mapping": ("waivers: {gate: kl_mean}", ["waivers", "expected a list"]),
    "waiver text": ("waivers: [kl_mean]", ["waivers[0]", "text"]),
    "waiver key": (waiver(until="x"), ["waivers[0].until: unknown key", "expires"]),
    "no gate": (waiver(gate=...), ["waivers[0]", "gate is missing"]),
    "no reason": (waiver(reason=...), ["reason is missing"]),
    "no name": (waiver(approved_by=...), ["approved_by is missing"]),
    "no expiry": (waiver(expires=...), ["expires is missing"]),
    "blank reason": (waiver(reason="  \n "), ["waivers[0]", "reason is empty"]),
    "blank name": (waiver(approved_by=""), ["approved_by is empty"]),
    "null reason": (waiver(reason=None), ["waivers[0].reason", "nothing"]),
    "boolean name": (waiver(approved_by=True), ["waivers[0].approved_by", "true or false"]),
    "unknown gate": (waiver(gate="kl_p98"), ["waivers[0]", "kl_p99"]),
    "blanket": (waiver(gate="findings"), ["one code at a time", "finding:"]),
    "bad code": (waiver(gate="finding:"), ["finding:adapter-scale"]),
    "odd code": (waiver(gate="finding:A b"), ["finding:adapter-scale"]),
    "no such day": (waiver(expires="2026-02-30"), ["waivers[0].expires", "2026-02-30"]),
    "no date": (waiver(expires="never"), ["waivers[0].expires", "'never'"]),
    "compact date": (waiver(expires="20261231"), ["YYYY-MM-DD"]),
    "date and time": (waiver(expires="2026-12-31T00:00:00"), ["YYYY-MM-DD"]),
    "no such day unquoted": (
        "waivers: [{gate: kl_p99, reason: r, approved_by: me, expires: 2026-02-30}]",
        ["waivers[0].expires"],
    ),
    "waived twice": (
        json.dumps({"waivers": json.loads(waiver())["waivers"] * 2}),
        ["waivers[1].gate", "kl_p99", "twice"],
    ),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_a_bad_policy_is_refused_by_file_and_key(tmp_path, case):
    text, words = case
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
    for word in [*words, str(tmp_path / "policy.yaml")]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"gates": {"kl_mean": {"max": NaN}}}', ["expected a limit", "NaN"]),
        ('{"gates": {}, "gates": {}}', ["'gates'", "twice"]),
        ('{"gates": ', ["not JSON"]),
        ("[" * 60_000, ["not JSON"]),
        ('{"gates": {"kl_mean": {"max": ' + "9" * 5000 + "}}}", ["finite"]),
        ('{"defaults": "true"}', ["true or false"]),
    ],
    ids=["NaN", "duplicate", "broken", "deep", "long number", "text for boolean"],
)
def test_bad_json_is_refused(tmp_path, text, words):
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text, "policy.json")
    for word in words:
        assert word in str(caught.value)


def test_a_missing_policy_or_a_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere\.yaml: there is no such"):
        load_policy(tmp_path / "nowhere.yaml")
    with pytest.raises(UsageError, match="not a file"):
        load_policy(tmp_path)


def test_a_waiver_is_temporary(tmp_path):
    last = TODAY + timedelta(days=MAX_WAIVER_DAYS)
    assert read(tmp_path, waiver(expires=last.isoformat())).waivers[0].expires == last
    with pytest.raises(UsageError, match=r"waivers\[0\]\.expires.*366 days.*under gates"):
        read(tmp_path, waiver(expires=(last + timedelta(days=1)).isoformat()))


def test_an_expired_waiver_is_read(tmp_path):
    """It no longer counts, but the file must not stop working on the day after."""
    assert read(tmp_path, waiver(expires="2020-01-01")).waivers[0].applies(date(2020, 1, 1))
    assert not read(tmp_path, waiver(expires="2020-01-01")).waivers[0].applies(date(2020, 1, 2))


@settings(deadline=None)
@given(text=st.text(alphabet="defaults: gates{}[]kl_mean,max0.1\n-&*!'\"#|>", max_size=60))
def test_any_text_is_a_policy_or_a_usage_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text)
    with suppress(UsageError):
        assert isinstance(load_policy(path, TODAY), Policy)


def test_the_docstring_example_is_a_policy(tmp_path):
    lines = str(load_policy.__doc__).split("::\n")[1].split("Args:")[0]
    example = "\n".join(line.removeprefix("        ") for line in lines.splitlines())
    policy = read(tmp_path, example)
    assert len(policy.rules) == 3
    assert policy.waivers[0].expires == date(2026, 12, 31)
