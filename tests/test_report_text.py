"""Terminal, Markdown, JUnit, difference and model card; YAML is read by PyYAML, XML by the standard library."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from markdown_it import MarkdownIt

from qconv import report
from qconv.report.difference import compare_reports, difference_markdown, difference_text
from qconv.report.document import finite
from qconv.report.junit import to_junit
from qconv.report.markdown import to_markdown
from qconv.report.markdown_text import code, escape
from qconv.report.model_card import is_hub_id, model_card
from qconv.report.terminal import summary
from tests.report_cases import CASES, NASTY, gate, pair

CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def document(name: str) -> dict:
    return finite(CASES[name]())


def cells(line: str) -> list[str]:
    return re.split(r"(?<!\\)\|", line.strip())[1:-1]


def check_tables(text: str) -> int:
    """Every row of every table has as many cells as its heading; returns the number of tables."""
    num, width = 0, 0
    fenced = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if fenced or not line.startswith("|"):
            width = 0
            continue
        if not width:
            width, num = len(cells(line)), num + 1
        assert len(cells(line)) == width, line
    return num


@pytest.mark.parametrize("name", CASES)
def test_markdown_is_well_formed(name):
    text = to_markdown(document(name))
    tables = check_tables(text)
    assert tables >= {"minimal": 2, "sparse": 4}.get(name, 8)
    assert not CONTROL.search(text)
    # No HTML but what the report itself writes, whatever the texts hold.
    outside_code = re.sub(r"`[^`\n]*`", "", text)
    assert set(re.findall(r"</?([a-zA-Z]+)", outside_code)) <= {"details", "summary", "code"}
    assert text.count("<details>") == text.count("</details>")
    assert "<script" not in outside_code
    assert len(text.encode()) < 1_000_000  # a GitHub step summary holds 1 MiB


def test_markdown_says_the_verdict_and_why_first():
    lines = to_markdown(document("full")).splitlines()
    assert lines[0] == "# ❌ qconv: FAIL"
    assert lines[2].startswith("- kl_mean &#60;= 0.05 fails")
    text = "\n".join(lines)
    order = ["## Gates", "## Findings", "## Where the error comes from", "## Statistics", "## Tasks", "Provenance"]
    places = [text.index(heading) for heading in order]
    assert places == sorted(places)
    assert "| **Merge** | 0.00163 |" in text
    assert "| **Total** | 0.0612 | 0.0551 to 0.0685 | 85.2% | 53.63 |" in text
    assert text.index("| ❌ FAIL | `kl_mean`") < text.index("| ✅ PASS |")  # what stops a release comes first
    assert text.index("error: The chat template") < text.index("warning: generation_config")


def test_what_a_stage_says_of_each_linear_is_a_table():
    tokens = MarkdownIt("commonmark").enable("table").parse(to_markdown(document("full")))
    rows, row = [], []
    for token in tokens:
        if token.type == "tr_open":
            row = []
            rows.append(row)
        elif token.type == "inline":
            row.append("".join(child.content for child in token.children if child.type != "html_inline"))
    assert ["linears", "bits", "cost at 4 bits"] in rows
    assert ["model.layers.1.mlp.down_proj", "8", "0.000200"] in rows
    assert ["bits per weight", "4.79"] in rows


@pytest.mark.parametrize("name", CASES)
def test_markdown_parses_to_what_was_meant(name):
    """Against markdown-it: every hostile text comes out as text, and nothing but the report's own HTML as HTML."""
    found = document(name)
    tokens = MarkdownIt("commonmark").enable("table").parse(to_markdown(found))
    inline = [child for token in tokens for child in token.children or ()]
    html = [token.content for token in (*tokens, *inline) if token.type.startswith("html")]
    assert all(re.fullmatch(r"(</?(details|code)>|<summary>[^<]*</summary>|\s)+", entry) for entry in html), html
    assert not [token for token in inline if token.type in ("link_open", "image")]
    rows = [token for token in tokens if token.type == "tr_open"]
    assert len(rows) > len(found["gates"]) + len(found["tasks"])
    text = "".join(child.content for child in inline if child.type in ("text", "code_inline", "text_special"))
    assert ('<script>alert("x")</script> & | `a` *b*' in text) == (name == "nasty")


def test_markdown_escapes():
    assert escape("a|b <x> *c* `d` @e #1 [f](g) $h$ _i_ j_k") == (
        "a&#124;b &#60;x&#62; &#42;c&#42; &#96;d&#96; &#64;e &#35;1 &#91;f&#93;(g) &#36;h&#36; &#95;i&#95; j_k"
    )
    assert code("model.layers.0") == "`model.layers.0`"
    assert code("a|b`c") == "<code>a&#124;b&#96;c</code>"
    assert code(" a\n") == "<code>␣a↵</code>"


@pytest.mark.parametrize("name", CASES)
def test_terminal_summary_is_short_and_harmless(name):
    text = summary(document(name))
    assert not CONTROL.search(text)
    assert len(text.splitlines()) <= 22
    assert text.splitlines()[0].split()[0] == "verdict"


def test_terminal_summary_says_what_matters():
    text = summary(document("full"))
    for expected in (
        "verdict     FAIL",
        "KL mean     0.0612 nats per token [0.0551 to 0.0685], p99 0.637",
        "budgets     merge 0.00163, requantization 0.0598, total 0.0612",
        "top-1       85.2% agreement [84.8% to 85.5%]",
        "perplexity  53.63 (reference 52.56)",
        "effect      84.4% of the adapter retained [82.8% to 85.7%]",
        "model.layers.3.mlp.down_proj.weight",
        "gate        fail: kl_mean <= 0.05, measured 0.0612 [0.0551 to 0.0685]",
        "about 125,000 tokens would settle it",
        "waived by R. M. until 2026-12-31: 16-bit merge, accepted for this release",
    ):
        assert expected in text
    assert summary(document("minimal")) == "verdict     NOT GATED"


def test_terminal_summary_folds_many_gates_but_never_one_that_does_not_pass():
    found = document("full")
    found["gates"] += [gate(f"extra_{i}", "<= 1", 0.5, [0.4, 0.6], "pass") for i in range(20)]
    text = summary(found)
    assert "gate        pass: top1_agreement, perplexity_ratio, extra_0," in text
    assert text.count("\ngate ") == 4
    assert "inconclusive: adapter_effect_retained" in text


def suite_of(found: dict) -> ElementTree.Element:
    root = ElementTree.fromstring(to_junit(found).encode("utf-8"))
    suites = root.findall("testsuite")
    assert [suite.get("name") for suite in suites] == ["qconv"]
    suite = suites[0]
    for attribute, path in (("tests", "testcase"), ("failures", "testcase/failure"), ("skipped", "testcase/skipped")):
        assert int(suite.get(attribute, "")) == len(suite.findall(path))
    return suite


@pytest.mark.parametrize("name", CASES)
def test_junit_is_well_formed_and_has_a_test_per_gate_and_error(name):
    found = document(name)
    suite = suite_of(found)
    errors = [finding for finding in found["findings"] if finding["severity"] == "error"]
    assert len(suite.findall("testcase")) == len(found["gates"]) + len(errors)
    stops = [entry for entry in found["gates"] if entry["verdict"] in ("fail", "inconclusive")]
    assert len(suite.findall("testcase/failure")) == len(stops) + len(errors)
    assert "verdict" in suite.findtext("system-out", "")
    properties = {entry.get("name"): entry.get("value") for entry in suite.findall("properties/property")}
    assert properties["verdict"] == found["verdict"]
    if name != "nasty":
        assert properties["environment.torch"] == "2.13.0"


def test_junit_fails_closed():
    suite = suite_of(document("full"))
    kinds = {case.get("name"): [(child.tag, child.get("type")) for child in case] for case in suite.findall("testcase")}
    assert kinds["adapter_effect_retained >= 0.85"] == [("failure", "inconclusive")]
    assert kinds["kl_mean <= 0.05"] == [("failure", "fail")]
    assert kinds["top1_agreement >= 0.8"] == []
    (skipped,) = suite.findall("testcase/skipped")
    assert "accepted for this release" in skipped.get("message", "")
    assert "2026-12-31" in skipped.get("message", "")
    # A verdict that no gate and no finding explains is a failure all the same.
    bare = document("minimal") | {"verdict": "fail", "reasons": ["the tasks got worse"]}
    assert suite_of(bare).findtext("testcase/failure") == "the tasks got worse"
    assert suite_of(document("minimal")).findall("testcase") == []


def test_waived_finding_is_skipped_with_its_reason():
    found = document("full")
    waiver = {"reason": "base model without a template", "expires": "2027-01-31", "approved_by": None}
    found["gates"].append(gate("finding:chat-template-missing", "<= 0", 1.0, None, "waived", waiver=waiver))
    case = next(c for c in suite_of(found).findall("testcase") if c.get("name", "").startswith("chat-template"))
    assert [child.tag for child in case] == ["skipped"]
    assert "waived until 2027-01-31: base model without a template" in to_markdown(found)


def test_findings_that_a_gate_accepts_are_skipped():
    found = document("full")
    found["gates"].append(gate("findings", "<= 5", 2.0, [2.0, 2.0], "pass"))
    cases = [c for c in suite_of(found).findall("testcase") if c.get("classname") == "qconv.findings"]
    assert [[child.tag for child in case] for case in cases] == [["skipped"], ["skipped"]]
    found["gates"][-1] = gate("findings", "<= 0", 2.0, [2.0, 2.0], "fail")
    cases = [c for c in suite_of(found).findall("testcase") if c.get("classname") == "qconv.findings"]
    assert [[child.tag for child in case] for case in cases] == [["failure"], ["failure"]]
    assert "gate        fail: findings <= 0, measured 2\n" in summary(found)


def test_tasks_are_shares_or_numbers():
    text = to_markdown(document("full"))
    assert "| 400 | 61.3% | 60.0% | -1.25 pp | -3.50 pp to +1.00 pp | 14 / 9 | 0.405 |" in text
    assert "| 62 | 23.4 | 24.0 | +0.560 | 0.310 to 0.840 | – / – | – |" in text
    a, b = document("full"), document("full")
    b["tasks"][2] |= {"difference": 2.0, "interval_95": [1.5, 2.5]}
    rows = {row["name"]: row for row in compare_reports(a, b)["rows"]}
    assert rows["task letters: word_perplexity, change to reference"]["conclusion"] == "worse"


def test_difference_tells_clear_changes_from_noise():
    a, b = document("full"), document("full")
    b["fidelity"]["total"] = finite(pair(0.031, seed=9))
    b["fidelity"]["merge"]["kl"] |= {"mean": 0.0017, "interval_95": [0.0015, 0.0019]}
    b["fidelity"]["adapter_effect_retained"] = {"value": 0.7, "interval_95": [0.69, 0.71]}
    b["gates"][1] |= {"verdict": "pass", "value": 0.031}
    b["findings"] = [b["findings"][0] | {"message": "another"}, b["findings"][1], b["findings"][3] | {"code": "other"}]
    b["environment"]["torch"] = "2.14.0"
    diff = compare_reports(a, b)
    assert diff["is_comparable"]
    rows = {row["name"]: row for row in diff["rows"]}
    assert rows["KL mean (nats per token)"]["conclusion"] == "better"
    assert rows["KL mean (nats per token)"]["change"] == pytest.approx(0.031 - 0.0612)
    assert rows["merge: KL mean (nats per token)"]["conclusion"] == "no clear change"
    assert rows["adapter effect retained"]["conclusion"] == "worse"
    assert rows["KL max (nats)"]["conclusion"] == "no interval"
    assert [entry["name"] for entry in diff["gates"]] == ["kl_mean"]
    codes = {key: [finding["code"] for finding in found] for key, found in diff["findings"].items()}
    assert codes == {
        "new": ["other"],
        "gone": ["adapter-not-applied", "tied-embeddings"],
        "changed": ["generation-config-differs"],
    }
    assert diff["environment"] == [{"name": "torch", "a": "2.13.0", "b": "2.14.0"}]
    assert "NOT COMPARABLE" not in difference_text(diff) + difference_markdown(diff)
    assert compare_reports(b, a)["rows"][0]["conclusion"] == "worse"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [("sha256", "0" * 64, "different tokens"), ("seq_len", 2048, "rows differ in length")],
)
def test_difference_of_other_evaluations_says_so_loudly(key, value, says):
    a, b = document("full"), document("full")
    b["fidelity"]["evaluation"][key] = value
    b["fidelity"]["total"] = finite(pair(0.031, seed=9))
    diff = compare_reports(a, b)
    assert not diff["is_comparable"]
    assert {row["conclusion"] for row in diff["rows"] if not row["name"].startswith("task")} == {"not comparable"}
    for text in (difference_text(diff), difference_markdown(diff)):
        assert "NOT COMPARABLE" in text
        assert says in text


def test_difference_names_other_references():
    a, b = document("full"), document("full")
    b["provenance"]["adapter"]["adapter_model.safetensors"] = "00" * 32
    diff = compare_reports(a, b)
    assert diff["is_comparable"]
    assert ["adapter_model.safetensors" in caution for caution in diff["cautions"]] == [True]
    assert diff["cautions"][0] in difference_text(diff)


@pytest.mark.parametrize("left", CASES)
@pytest.mark.parametrize("right", CASES)
def test_difference_of_any_two_is_well_formed(left, right):
    diff = compare_reports(document(left), document(right))
    text = difference_markdown(diff)
    assert check_tables(text) >= 1
    assert not CONTROL.search(text + difference_text(diff))
    assert set(re.findall(r"</?([a-zA-Z]+)", re.sub(r"`[^`\n]*`", "", text))) <= {"code"}
    if left == right:
        assert diff["gates"] == diff["environment"] == []
        assert not any(diff["findings"].values())
        assert {row["change"] for row in diff["rows"]} <= {0, None}


def front_matter(text: str) -> dict:
    _, matter, _ = text.split("---\n", 2)
    return yaml.safe_load(matter)


def test_model_card_front_matter():
    text = model_card(
        document("full"),
        base_model="HuggingFaceTB/SmolLM2-135M",
        adapter="me/adapter",
        license="apache-2.0",
        relation="quantized",
        tags=["qlora"],
    )
    assert front_matter(text) == {
        "base_model": ["HuggingFaceTB/SmolLM2-135M"],
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "apache-2.0",
        "tags": ["qlora", "qconv", "w4a16"],
    }
    assert check_tables(text) == 3
    for expected in (
        "# SmolLM2-135M, quantized",
        "**FAIL**",
        "0.0551 to 0.0685",
        "vllm serve",
        "Made with qconv 0.1.0",
    ):
        assert expected in text
    refused = model_card(
        document("full"), base_model=None, adapter=None, license=None, relation="quantized", in_vllm=False
    )
    assert "vllm" not in refused
    merged = model_card(document("full"), base_model="a/b", adapter="c/d", license=None, relation="merge")
    assert front_matter(merged)["base_model"] == ["a/b", "c/d"]
    assert "license" not in front_matter(merged)


@pytest.mark.parametrize(
    "text",
    [
        NASTY,
        "yes",
        "null",
        "1.0",
        "2026-01-01",
        "a: b",
        "- x",
        "#c",
        "&a",
        "*a",
        "",
        "'",
        '"',
        "{a}",
        "a\nb",
        "~",
        "0x1f",
    ],
)
def test_model_card_front_matter_is_yaml_whatever_the_strings(text):
    found = document("nasty")
    card = model_card(found, base_model=text, adapter=text, license=text, relation="quantized", tags=[text, text])
    matter = front_matter(card)
    assert "base_model" not in matter
    assert all(isinstance(tag, str) for tag in matter["tags"])
    assert "qconv" in matter["tags"]
    if text.isprintable() and text == " ".join(text.split()):
        assert matter.get("license", "") == text
        assert matter["tags"][0] == text
    check_tables(card)
    assert not CONTROL.search(card)


@pytest.mark.parametrize("name", CASES)
def test_model_card_of_every_variant(name):
    card = model_card(document(name), base_model="./base", adapter=None, license=None, relation="merge")
    assert "base_model" not in front_matter(card)
    if name == "minimal":
        assert "Not measured." in card


def test_hub_ids():
    for text in ("org/name", "meta-llama/Llama-3.1-8B", "a/b_c.d", "0x/y"):
        assert is_hub_id(text), text
    for text in (
        "./base",
        "/tmp/model",
        "base",
        "a/b/c",
        "../x",
        "~/x",
        "a b/c",
        "org/",
        "C:\\x/y",
        "a/.b",
        None,
        "a/b--c",
    ):
        assert not is_hub_id(text), text


def test_sources_carry_no_markup_of_their_own_texts():
    """The renderers build tables through one function, so a cell that is not escaped cannot slip in elsewhere."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in Path(report.__file__).parent.glob("*.py")}
    assert '"| ' not in "".join(text for name, text in sources.items() if name != "markdown_text.py")
    assert "f\"| {' | '.join" in sources["markdown_text.py"]
