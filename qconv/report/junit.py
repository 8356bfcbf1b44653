"""The report as JUnit XML, which CI systems show as tests.

One test per gate and one per finding of severity error. An inconclusive gate is a failure of type
"inconclusive": a release must not pass because too little text was evaluated. A verdict other than a
pass that neither explains gets a test of its own, so that the suite never looks better than the report.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from qconv.report import content
from qconv.report.content import Document
from qconv.report.terminal import summary
from qconv.report.values import fact, one_line

# What XML 1.0 cannot hold, escaped or not (section 2.2).
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(document: Document) -> str:
    """One test suite named ``qconv``, well-formed whatever the texts hold."""
    gates = content.gates(document)
    errors = [finding for finding in content.findings(document) if finding.get("severity") == "error"]
    suite = ElementTree.Element("testsuite", name="qconv")
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _properties(document).items():
        ElementTree.SubElement(properties, "property", name=_clean(name), value=_clean(value))
    for gate in gates:
        _gate_case(suite, gate)
    for finding in errors:
        _finding_case(suite, finding, content.waiver_of(document, finding))
    if content.verdict(document) in ("fail", "inconclusive") and suite.find("testcase/failure") is None:
        _verdict_case(suite, document)
    ElementTree.SubElement(suite, "system-out").text = _clean(summary(document))
    suite.set("tests", str(len(suite.findall("testcase"))))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))
    suite.set("errors", "0")
    suite.set("skipped", str(len(suite.findall("testcase/skipped"))))
    if document.get("created"):
        suite.set("timestamp", _clean(str(document["created"])))
    suites = ElementTree.Element("testsuites", name="qconv")
    suites.append(suite)
    ElementTree.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"


def _gate_case(suite: ElementTree.Element, gate: Mapping[str, Any]) -> None:
    verdict = str(gate.get("verdict"))
    interval = content.gate_interval(gate)
    measured = content.gate_value(gate) + (f" (95% interval {interval})" if interval else "")
    name = f"{one_line(gate.get('name'))} {one_line(gate.get('rule'))}"
    case = ElementTree.SubElement(suite, "testcase", classname="qconv.gates", name=_clean(name), time="0")
    text = f"measured {measured}, required {one_line(gate.get('rule'))}"
    note = content.gate_note(gate)
    text += f"; {note}" if note else ""
    if verdict == "waived":
        ElementTree.SubElement(case, "skipped", message=_clean(text))
    elif verdict != "pass":
        failure = ElementTree.SubElement(case, "failure", message=_clean(f"{verdict}: {text}"), type=_clean(verdict))
        failure.text = _clean(text)


def _finding_case(suite: ElementTree.Element, finding: Mapping[str, Any], waived: str) -> None:
    name = f"{one_line(finding.get('code'))}: {one_line(finding.get('title'))}"
    case = ElementTree.SubElement(suite, "testcase", classname="qconv.findings", name=_clean(name), time="0")
    if waived:
        ElementTree.SubElement(case, "skipped", message=_clean(waived))
        return
    failure = ElementTree.SubElement(case, "failure", message=_clean(one_line(finding.get("title"))), type="finding")
    lines = [str(finding.get("message"))]
    lines += [f"tensor {one_line(tensor)}" for tensor in finding.get("tensors") or ()]
    lines += [f"file {one_line(file)}" for file in finding.get("files") or ()]
    failure.text = _clean("\n".join(lines))


def _verdict_case(suite: ElementTree.Element, document: Document) -> None:
    verdict = content.verdict(document)
    case = ElementTree.SubElement(suite, "testcase", classname="qconv", name="verdict", time="0")
    failure = ElementTree.SubElement(case, "failure", message=_clean(verdict), type=_clean(verdict))
    failure.text = _clean("\n".join(one_line(reason) for reason in document.get("reasons") or ()))


def _properties(document: Document) -> dict[str, str]:
    found = {"verdict": content.verdict(document), "command": fact(document.get("command"))}
    for prefix, part in (("subject", document.get("subject")), ("environment", document.get("environment"))):
        found |= {f"{prefix}.{key}": fact(value) for key, value in (part or {}).items() if value is not None}
    return found


def _clean(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
