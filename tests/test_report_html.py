"""The page: parsed by html.parser, and measured in a real browser where there is one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qconv.report import charts, scales
from qconv.report.document import finite
from qconv.report.html import to_html
from qconv.report.markup import Markup, element, join
from qconv.report.page_measured import token_text
from qconv.report.page_summary import gate_limit
from tests.report_cases import CASES

VOID = {"meta", "link", "br"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (360, 1280)
SCHEMES = {"dark": 0, "light": 1}  # as --blink-settings=preferredColorScheme counts them


def page(name: str) -> str:
    return to_html(finite(CASES[name]()))


class Outline(HTMLParser):
    """Checks that every element is closed where it should be, and collects what a page holds."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.headings: list[int] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.texts.append(data)


def outline(text: str) -> Outline:
    parser = Outline()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


@pytest.mark.parametrize("name", CASES)
def test_page_is_balanced_self_contained_and_small(name):
    text = page(name)
    parsed = outline(text)
    assert len(text.encode("utf-8")) < 400_000
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "iframe", "img", "object", "embed", "form", "base", "video", "audio", "image", "use"}
    for tag, attributes in parsed.elements:
        assert not [key for key in attributes if key.startswith("on") or key in ("src", "srcset", "action", "style")]
        if "href" in attributes:
            assert (attributes["href"] or "").startswith("#") or (tag, attributes["href"]) == ("link", "data:,")
    assert not re.search(r"url\(|@import|@font-face|https?://", text.split("</style>")[0])
    policy = [attributes["content"] for tag, attributes in parsed.elements if "http-equiv" in attributes]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


@pytest.mark.parametrize("name", CASES)
def test_page_serves_screen_readers(name):
    parsed = outline(page(name))
    assert parsed.headings[0] == 1
    assert parsed.headings.count(1) == 1
    steps = zip(parsed.headings, parsed.headings[1:], strict=False)
    assert all(after <= before + 1 for before, after in steps), parsed.headings
    identities = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(identities) == len(set(identities))
    for _, attributes in parsed.elements:
        for key, mark in (("href", "#"), ("aria-labelledby", "")):
            target = attributes.get(key)
            assert target is None or target == "data:," or target.removeprefix(mark) in identities
    for tag, attributes in parsed.elements:
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or (
                attributes.get("role") == "img" and attributes.get("aria-label")
            )
        if tag == "th":
            assert attributes.get("scope") in ("row", "col")
    tables = sum(tag == "table" for tag, _ in parsed.elements)
    assert tables == sum(tag == "caption" for tag, _ in parsed.elements)
    assert ("html", {"lang": "en"}) in parsed.elements


def test_first_screen_says_the_verdict_and_why():
    text = " ".join(" ".join(outline(page("full")).texts).split())
    order = ["FAIL", "kl_mean <= 0.05 fails", "KL mean 0.0612", "85.2%", "./base-nf4", "Gates", "Findings"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    for expected in (
        "about 125,000 tokens would settle it",
        "waived by R. M. until 2026-12-31",
        "logarithmic scale",
        "model.layers.8",
        "␣nothing",
        "since↵↵Cork, said",
        "diverges at token 6",
        "61.3%",
        "-1.25 pp",
        "NVIDIA H100",
        "07" * 32,
        "Made with qconv 0.1.0",
    ):
        assert expected in text, expected


def test_parts_that_were_not_measured_are_left_out():
    text = page("minimal")
    parsed = outline(text)
    assert "NOT GATED" in parsed.texts
    sections = {attributes.get("id") for tag, attributes in parsed.elements if tag == "section"}
    assert sections == {"environment"}
    sparse = {attributes.get("id") for tag, attributes in outline(page("sparse")).elements if tag == "section"}
    assert sparse == {"gates", "method", "environment"}
    assert "None" not in text + page("sparse")
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+", "", " ".join(parsed.texts).lower())


def test_what_a_stage_says_of_each_linear_is_a_table():
    texts = outline(page("full")).texts
    place = texts.index("Budget: linears")
    after = [text for text in texts[place + 1 :] if text.strip()]
    assert after[:3] == ["linears", "bits", "cost at 4 bits"]
    assert after[3:6] == ["model.layers.0.mlp.down_proj", "4", "0.000400"]


def test_hostile_texts_stay_texts():
    text = page("nasty")
    assert "<script" not in text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
    texts = "".join(outline(text).texts)
    assert texts.count('<script>alert("x")</script>') > 40
    assert "日本語" in texts


def test_few_worst_tokens_are_shown_and_the_rest_folded():
    text = page("full")
    section = text[text.index('<section id="tokens"') :]
    section = section[: section.index("</section>")]
    assert "<summary>1 more</summary>" in section
    assert section.index("2.20 nats") < section.index("<details>") < section.index("2.10 nats")


def test_divergence_marks_what_differs_and_only_that():
    text = page("full")
    assert "The sea is a vast <mark>body of salt water↵that covers" in text
    assert "The sea is a vast <mark>expanse of blue↵that sailors" in text


def test_markup_escapes_by_construction():
    assert element("p", "<b>", Markup("<i></i>"), class_='a"b') == '<p class="a&quot;b">&lt;b&gt;<i></i></p>'
    assert join(["a & b", None, [Markup("<br>"), "<"]]) == "a &amp; b<br>&lt;"
    assert element("p", hidden=True, title=None, lang=False) == "<p hidden></p>"


def test_token_text_shows_spaces_at_the_ends():
    assert [token_text(t) for t in (" the", "a b", "  ", "", "\n", "x ")] == ["␣the", "a b", "␣␣", "(empty)", "↵", "x␣"]


@pytest.mark.parametrize(
    ("rule", "limit"),
    [
        ("<= 0.1", 0.1),
        (">= 90%", 0.9),
        ("<= 3 x floor = 0.0012", 0.0012),
        ("<= 5.0x floor = 3.6e-05", 3.6e-05),
        ("<= 3 x floor", None),
        ("text", None),
    ],
)
def test_limit_of_a_rule(rule, limit):
    assert gate_limit({"rule": rule}) == limit


def test_scales():
    linear = scales.decade_scale([0.02, 0.1])
    assert not linear.is_log
    assert linear.percent(0) == 0
    assert linear.percent(0.0525) == pytest.approx(50)
    log = scales.decade_scale([0.0, 1e-5, 0.3])
    assert log.is_log
    assert (log.low, log.high) == pytest.approx((1e-6, 1))
    assert log.percent(1e-3) == pytest.approx(50)
    assert log.percent(0) == 0
    assert scales.linear_ticks(0, 0.164, 3) == [0, 0.05, 0.1, 0.15]
    assert scales.decade_scale([0.0]).percent(0) == 0
    assert [scales.tick_text(v) for v in (1e-5, 0.01, 1, 1000)] == ["10⁻⁵", "0.01", "1", "10³"]


def test_gate_bar_shades_the_side_that_passes():
    upper = charts.gate_bar("x", 0.06, (0.05, 0.07), 0.1, upper=True)
    lower = charts.gate_bar("x", 0.06, (0.05, 0.07), 0.1, upper=False)
    x, width = re.search(r'<rect x="([\d.]+)%" y="4" width="([\d.]+)%"', upper).groups()
    assert (float(x), float(width) > 50) == (0, True)
    x, width = re.search(r'<rect x="([\d.]+)%" y="4" width="([\d.]+)%"', lower).groups()
    assert float(x) + float(width) == pytest.approx(100, abs=0.02)
    assert float(width) < 50


MEASURE = """
function composite(top, under) {
  const a = top[3]; return [0, 1, 2].map(i => top[i] * a + under[i] * (1 - a)).concat([1]);
}
function parse(colour) {
  const n = colour.match(/[\\d.]+/g).map(Number);
  if (colour.startsWith('color(srgb')) return [n[0] * 255, n[1] * 255, n[2] * 255, n.length > 3 ? n[3] : 1];
  return [n[0], n[1], n[2], n.length > 3 ? n[3] : 1];
}
function luminance(c) {
  const f = c.slice(0, 3).map(v => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
  return 0.2126 * f[0] + 0.7152 * f[1] + 0.0722 * f[2];
}
function contrast(a, b) {
  const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05);
}
function background(element, view) {
  const layers = [];
  for (let e = element; e; e = e.parentElement) layers.push(parse(view.getComputedStyle(e).backgroundColor));
  return layers.reverse().reduce((under, top) => composite(top, under), [255, 255, 255, 1]);
}
function measure(frame) {
  const doc = frame.contentDocument, view = frame.contentWindow, root = doc.documentElement;
  doc.querySelectorAll('details').forEach(d => { d.open = true; });
  const out = { scroll: root.scrollWidth, width: root.clientWidth, outside: [], pale: [], flat: [], charts: 0, texts: 0,
    body: view.getComputedStyle(doc.body).backgroundColor, verdict: null };
  for (const e of doc.body.querySelectorAll('*')) {
    if (e.closest('.unseen') || e.localName === 'title') continue;
    const box = e.getBoundingClientRect();
    if (e.localName === 'svg') out.charts++;
    if (e.localName === 'svg' && Math.min(box.width, box.height) < 5) out.flat.push(e.outerHTML.slice(0, 90));
    if (!e.closest('.scroll') && (box.right > root.clientWidth + 0.5 || box.left < -0.5))
      out.outside.push([e.localName, e.textContent.slice(0, 40), box.left, box.right]);
    const text = [...e.childNodes].filter(n => n.nodeType === 3 && n.data.trim()).length;
    if (!text || !e.checkVisibility()) continue;
    out.texts++;
    const style = view.getComputedStyle(e);
    const ratio = contrast(parse(e.closest('svg') ? style.fill : style.color), background(e, view));
    if (ratio < 4.5) out.pale.push([e.localName, e.textContent.slice(0, 40), ratio]);
    if (e.localName === 'h1') out.verdict = ratio;
  }
  return out;
}
addEventListener('load', () => {
  const all = {};
  for (const frame of document.querySelectorAll('iframe')) all[frame.name] = measure(frame);
  document.getElementById('measured').textContent = JSON.stringify(all);
});
"""
PLANTED = """<!DOCTYPE html><html lang="en"><head>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"></head>
<body><p style="color:#999;background:#fff">pale</p><div style="width:2000px">wide</div>
<svg width="0" height="0"></svg><h1 style="color:#000;background:#fff">x</h1><script>1</script></body></html>"""


@pytest.fixture(scope="module", params=SCHEMES)
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any], list[str]]:
    """Every page in frames of every width, in one browser: scheme, measurements by name, and console messages.

    Frames, because no browser makes a window as narrow as a phone's. The pages are unchanged, their
    security policy included; the measuring runs outside them.
    """
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on PATH")
    folder: Path = tmp_path_factory.mktemp("browser")
    pages = {f"{name} {width}": (page(name), width) for name in CASES for width in WIDTHS} | {"planted": (PLANTED, 360)}
    frames = [
        f'<iframe name="{name}" srcdoc="{html.escape(text)}" style="border:0;width:{width}px;height:800px"></iframe>'
        for name, (text, width) in pages.items()
    ]
    harness = folder / "harness.html"
    harness.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><link rel="icon" href="data:,"><pre id="measured"></pre>'
        f"{''.join(frames)}<script>{MEASURE}</script>",
        encoding="utf-8",
    )
    quiet = ("background-networking", "component-update", "sync", "extensions", "default-apps", "dev-shm-usage")
    command = [
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr"),
        *(f"--disable-{name}" for name in quiet),
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={SCHEMES[request.param]}",
        *("--window-size=1400,900", "--virtual-time-budget=2000", "--dump-dom", harness.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
    found = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"the browser wrote no page: {done.stderr[-2000:]}"
    assert found[1], f"nothing was measured: {done.stderr[-2000:]}"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return request.param, json.loads(html.unescape(found[1])), console


def test_page_in_a_browser(measured):
    scheme, pages, _ = measured
    for name in CASES:
        for width in WIDTHS:
            found = pages[f"{name} {width}"]
            where = f"{name}, {width} px, {scheme}"
            assert found["width"] in range(width - 20, width + 1), where  # less the scroll bar
            assert found["scroll"] <= found["width"], f"{where}: the page scrolls sideways"
            assert found["outside"] == [], where
            assert found["pale"] == [], where
            assert found["flat"] == [], where
            assert found["verdict"] >= 4.5, where
            assert found["texts"] >= 15, where
            if name in ("full", "nasty", "eighty_blocks"):
                assert found["charts"] >= 20, where
    backgrounds = {found["body"] for name, found in pages.items() if name != "planted"}
    assert backgrounds == {"rgb(17, 21, 26)" if scheme == "dark" else "rgb(243, 245, 248)"}


def test_page_logs_nothing_to_the_console(measured):
    _, _, console = measured
    # The planted page's script is the one thing that a security policy had to stop.
    assert [line for line in console if "Content Security Policy" not in line] == []
    assert len(console) == 1, console


def test_measuring_finds_what_is_planted(measured):
    _, pages, _ = measured
    planted = pages["planted"]
    assert planted["scroll"] > planted["width"]
    assert [entry[0] for entry in planted["outside"]] == ["div"]
    assert [entry[1] for entry in planted["pale"]] == ["pale"]
    assert len(planted["flat"]) == 1
    assert planted["verdict"] == pytest.approx(21)
