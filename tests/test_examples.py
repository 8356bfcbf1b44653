"""The examples and the commands in the documents: they parse, and name only what exists. Nothing is run.

Commands go through click's own parser, their gates through `parse_rule`; variables of a shell count as ``1``.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from qconv import errors
from qconv.cli import cli
from qconv.gate_rules import METRICS, TASK_PATTERN, default_rules, load_policy, parse_rule
from qconv.report.document import ALL_NAMES, JUNIT_NAME, MARKDOWN_NAME, load_schema

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
GITHUB = EXAMPLES / "ci" / "github-actions.yml"
GITLAB = EXAMPLES / "ci" / "gitlab-ci.yml"
VALIDATION = ROOT / "docs" / "validation.md"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL_ENDS = ("|", "||", "&&", ";", ">", ">>", "2>", "&", ")")


def _scalars(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from _scalars(value)
    elif isinstance(node, list):
        for value in node:
            yield from _scalars(value)


def _code_lines(markdown: str) -> Iterator[str]:
    """Lines of fenced and of indented code."""
    fenced = False
    for line in markdown.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line


def _commands(text: str) -> Iterator[str]:
    for line in text.replace("\\\n", " ").splitlines():
        line = line.strip().removeprefix("- ").removeprefix("$ ")
        if re.match(r"qconv\s", line):
            yield line


def commands_of(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return list(_commands("\n".join(_code_lines(text))))
    return [command for scalar in _scalars(yaml.safe_load(text)) for command in _commands(scalar)]


def parse_command(line: str) -> click.Context:
    """The context that click makes of a command line.

    Raises:
        click.UsageError: no such command or option, or a value that it does not take.
    """
    words = shlex.split(re.sub(r"\$\{?\w+\}?", "1", line), comments=True)[1:]
    end = next((index for index, word in enumerate(words) if word in SHELL_ENDS), len(words))
    name, command, arguments = cli.resolve_command(click.Context(cli), words[:end])
    assert command is not None
    return command.make_context(name, arguments, parent=click.Context(cli))


ALL_COMMANDS = [
    pytest.param(line, id=f"{path.name}:{number}")
    for path in [GITHUB, GITLAB, *DOCUMENTS]
    for number, line in enumerate(commands_of(path))
    if not line.startswith("qconv --")
]


@pytest.mark.parametrize("line", ALL_COMMANDS)
def test_a_documented_command_exists_with_its_options(line):
    context = parse_command(line)
    for gate in context.params.get("gates") or ():
        parse_rule(gate)


@pytest.mark.parametrize("line", ["qconv validat --candidate ./out", "qconv validate --gates x", "qconv merge ./base"])
def test_the_parser_of_these_tests_refuses_what_does_not_exist(line):
    with pytest.raises(click.UsageError):
        parse_command(line)


def test_every_example_and_document_on_validation_has_commands():
    assert any("merge" in line for line in commands_of(GITHUB))
    assert any("validate" in line and "--reference-cache" in line for line in commands_of(GITLAB))
    shown = {shlex.split(line)[1] for line in commands_of(VALIDATION)}
    assert {"validate", "merge", "report"} <= shown


@pytest.mark.parametrize("path", [GITHUB, GITLAB], ids=["github", "gitlab"])
def test_the_scripts_know_the_exit_codes_and_report_files(path):
    text = path.read_text(encoding="utf-8")
    judged = {int(code) for code in re.findall(r'"\$status" -eq (\d)', text)}
    assert errors.EXIT_GATE_INCONCLUSIVE in judged
    assert judged <= {errors.EXIT_GATE_FAILED, errors.EXIT_GATE_INCONCLUSIVE}
    named = set(re.findall(r"qconv-report\.\w+", text))
    assert named
    assert named <= set(ALL_NAMES)
    gate = load_schema()["$defs"]["gate"]["properties"]
    assert "tokens_to_settle" in text
    assert "tokens_to_settle" in gate


def test_github_publishes_only_after_the_gate_and_shows_the_report():
    jobs = yaml.safe_load(GITHUB.read_text(encoding="utf-8"))["jobs"]
    assert jobs["publish"]["needs"] == "gate"
    assert "if" not in jobs["publish"]  # always() there would publish what was rejected
    steps = jobs["gate"]["steps"]
    assert all("continue-on-error" not in step for step in steps)
    assert any(f"{MARKDOWN_NAME} >> " in step.get("run", "") and "GITHUB_STEP_SUMMARY" in step["run"] for step in steps)
    for step in [*steps, *jobs["publish"]["steps"]]:
        if "uses" in step:
            assert re.fullmatch(r"[\w.-]+/[\w.-]+@v\d+", step["uses"]), step["uses"]


def test_gitlab_publishes_only_after_the_gate_and_reads_the_junit_report():
    jobs = yaml.safe_load(GITLAB.read_text(encoding="utf-8"))
    assert [need["job"] for need in jobs["publish"]["needs"]] == ["gate"]
    assert "allow_failure" not in jobs["gate"]
    artifacts = jobs["gate"]["artifacts"]
    assert artifacts["when"] == "always"
    assert artifacts["reports"]["junit"] == f"report/{JUNIT_NAME}"


def test_the_example_policy_loads():
    policy = load_policy(EXAMPLES / "policy.yaml")
    assert {"kl_mean", "merge.kl_mean", "adapter_effect_retained"} <= {rule.metric for rule in policy.rules}
    assert policy.waivers == ()


def test_the_waivers_in_the_example_policy_load_once_they_are_uncommented(tmp_path):
    text = (EXAMPLES / "policy.yaml").read_text(encoding="utf-8")
    head, _, waivers = text.partition("waivers: []\n")
    waivers = "\n".join(line.removeprefix("#") for line in waivers.splitlines())
    path = tmp_path / "policy.yaml"
    path.write_text(f"{head}waivers:\n{waivers}\n".replace("YYYY-MM-DD", "2000-01-01"), encoding="utf-8")
    assert [waiver.gate for waiver in load_policy(path).waivers] == ["kl_p99", "finding:chat-template-differs"]


def test_the_document_names_every_metric_and_the_default_limits():
    text = VALIDATION.read_text(encoding="utf-8")
    bare = [name for name in METRICS if not name.startswith(("merge.", "requantization.")) and name != TASK_PATTERN]
    assert [name for name in bare if f"`{name}`" not in text] == []
    for kind in ("plain", "int8", "fp8", "int4", "int3", "int2"):
        limits = {rule.metric: rule.limit for rule in default_rules(kind, has_adapter=True)}
        (row,) = re.findall(rf"^\| `{kind}` \|(.*)$", text, re.MULTILINE)
        cells = [cell.strip() for cell in row.split("|")]
        assert [float(cell) for cell in cells[:3]] == [
            limits["kl_mean"],
            limits["merge.kl_mean"],
            limits["findings"],
        ]


def test_the_document_names_the_findings_that_exist():
    known = set()
    for path in (ROOT / "qconv" / "validate").glob("*.py"):
        source = path.read_text(encoding="utf-8")
        known |= set(re.findall(r'(?:"error"|"warning"|"note"|severity),\s*"([a-z]+(?:-[a-z]+)+)"', source))
    section = VALIDATION.read_text(encoding="utf-8").partition("## Findings")[2].partition("\n## ")[0]
    named = set(re.findall(r"^\| `([a-z-]+)` \|", section, re.MULTILINE))
    assert len(known) > 15
    assert known - named == set()
    assert named - known <= {"norm-differs", "bias-differs"}  # one of the two is chosen by an expression


def test_the_architecture_names_the_layers_that_are_held():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = project["tool"]["importlinter"]["contracts"]
    held = " > ".join(layer.replace("qconv.", "") for layer in contract["layers"])
    text = " ".join((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split())
    assert f"`{held}`" in text
