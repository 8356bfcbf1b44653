"""Charts as inline SVG.

Horizontal positions are percentages and vertical ones pixels, so that a chart fills the width of a
phone and its text stays readable. Labels may stand outside the plot: the page leaves them room.
Every chart has a label for screen readers and every mark a title.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from qconv.report.markup import Markup, element
from qconv.report.scales import Scale, linear_ticks, power_text, tick_text
from qconv.report.values import number


def chart(label: str, height: float, *marks: object) -> Markup:
    return element(
        "svg",
        element("title", label),
        *marks,
        class_="chart",
        height=height,
        role="img",
        aria_label=label,
    )


def budget_bar(
    label: str, value: float, interval: tuple[float, float] | None, scale: Scale, *, is_context: bool
) -> Markup:
    """One bar on a scale shared with others, its 95% interval on top."""
    marks: list[Markup] = [_vertical(scale.percent(tick), 0, 22, "grid") for tick in scale.ticks()]
    width = max(scale.percent(value), 0.4)
    marks.append(
        element("rect", x="0", y=5, width=_pc(width), height=12, rx=2, class_="bar dim" if is_context else "bar")
    )
    if interval is not None:
        marks += _whisker(scale.percent(interval[0]), scale.percent(interval[1]), 11)
    return chart(label, 22, marks)


def axis(scale: Scale) -> Markup:
    """The numbers under bars; for the eye alone, every bar says its value."""
    marks = [_tick_label(scale.percent(tick), 12, tick_text(tick)) for tick in scale.ticks()]
    return element("svg", marks, class_="chart", height=16, aria_hidden="true")


def gate_bar(label: str, value: float, interval: tuple[float, float] | None, limit: float, *, upper: bool) -> Markup:
    """A value and its interval against a limit; the side that passes is shaded."""
    points = [value, limit, *(interval or ())]
    low, high = min(points), max(points)
    if low > 0 and high / low > 20:
        scale = Scale(low=low / 1.6, high=high * 1.6, is_log=True)
    else:
        room = 0.3 * (high - low) or abs(high) * 0.5 or 1.0
        scale = Scale(low=low - room, high=high + room, is_log=False)
    at_limit = scale.percent(limit)
    start, width = (0.0, at_limit) if upper else (at_limit, 100 - at_limit)
    marks = [element("rect", x=_pc(start), y=4, width=_pc(width), height=16, class_="allowed")]
    marks.append(_vertical(at_limit, 1, 23, "limit"))
    if interval is not None:
        marks += _whisker(scale.percent(interval[0]), scale.percent(interval[1]), 12)
    marks.append(element("circle", cx=_pc(scale.percent(value)), cy=12, r=4.5, class_="dot"))
    anchor = "start" if at_limit < 15 else "end" if at_limit > 85 else "middle"
    marks.append(element("text", f"limit {limit:.4g}", x=_pc(at_limit), y=35, text_anchor=anchor, class_="tick"))
    return chart(label, 38, marks)


def meter(label: str, value: float, interval: tuple[float, float] | None, limit: float | None) -> Markup:
    """A share of 1 as a filled track."""
    scale = Scale(low=min(0.0, value), high=max(1.0, value), is_log=False)
    zero, end = scale.percent(0), scale.percent(value)
    marks = [element("rect", x="0", y=6, width="100%", height=14, rx=3, class_="track")]
    marks.append(element("rect", x=_pc(min(zero, end)), y=6, width=_pc(abs(end - zero)), height=14, rx=3, class_="bar"))
    if interval is not None:
        marks += _whisker(scale.percent(interval[0]), scale.percent(interval[1]), 13)
    if limit is not None:
        marks.append(_vertical(scale.percent(limit), 2, 24, "limit"))
    for tick in sorted({scale.low, 0.0, 0.25, 0.5, 0.75, 1.0}):
        marks.append(_tick_label(scale.percent(tick), 38, f"{100 * tick:.0f}%"))
    return chart(label, 42, marks)


def histogram(
    label: str, edges: Sequence[float], counts: Sequence[int], marked: Sequence[tuple[str, float, str]]
) -> Markup:
    """Counts over log10 of a quantity, with labelled values marked.

    Args:
        edges: of the bins, in log10; one more than counts. The first bin holds everything below as well.
        marked: name, log10 position and text of every value to mark.
    """
    filled = [index for index, count in enumerate(counts) if count]
    first, last = max(0, filled[0] - 1), min(len(counts) - 1, filled[-1] + 1)
    low, high = edges[first], edges[last + 1]
    scale = Scale(low=low, high=high, is_log=False)
    room, height = 8 + 15 * len(marked), 150
    top, total = max(counts), sum(counts)
    marks: list[Markup] = []
    for tick in linear_ticks(0, top / total, 3):
        y = room + height - height * tick * total / top
        marks.append(element("line", x1="0", x2="100%", y1=_px(y), y2=_px(y), class_="grid"))
        marks.append(element("text", f"{100 * tick:g}%", x=-6, y=_px(y + 4), text_anchor="end", class_="tick"))
    for index in range(first, last + 1):
        tall = height * counts[index] / top
        left, right = scale.percent(edges[index]), scale.percent(edges[index + 1])
        below = "at most" if index == 0 else f"{number(10 ** edges[index], 2)} to"
        title = f"{below} {number(10 ** edges[index + 1], 2)}: {counts[index]:,} positions"
        shape = {"x": _pc(left + 0.15), "y": _px(room + height - tall), "width": _pc(right - left - 0.3)}
        marks.append(element("rect", element("title", title), height=_px(tall), class_="bar", **shape))
    for row, (name, position, text) in enumerate(marked):
        x = scale.percent(position)
        marks.append(_vertical(x, 6 + 15 * row, room + height, f"mark mark-{row}"))
        end = x > 70
        shift = -5 if end else 5
        anchor = "end" if end else "start"
        marks.append(
            element("text", f"{name} {text}", x=_pc(x), dx=shift, y=14 + 15 * row, text_anchor=anchor, class_="name")
        )
    step = 1 if high - low <= 7 else 2
    for exponent in range(math.ceil(low), math.floor(high) + 1, step):
        marks.append(_tick_label(scale.percent(exponent), room + height + 16, power_text(exponent)))
    return chart(label, room + height + 20, marks)


def depth_line(label: str, values: Sequence[tuple[int, float, str]]) -> Markup:
    """A value per block as a line with markers; the three largest are named.

    Args:
        values: block, value from 0 up, title.
    """
    height, room = 130, 30
    top = max(value for _, value, _ in values) or 1.0
    named = _largest(values)
    marks = _value_grid(top, room, height)
    x_of = _block_positions(values[0][0], values[-1][0])
    dots = [(block, x_of(block), room + height - height * value / top, title) for block, value, title in values]
    for (_, x1, y1, _), (_, x2, y2, _) in pairwise(dots):
        marks.append(element("line", x1=_pc(x1), x2=_pc(x2), y1=_px(y1), y2=_px(y2), class_="line"))
    for block, x, y, title in dots:
        radius = 4.5 if block in named else 2.6
        marks.append(element("circle", element("title", title), cx=_pc(x), cy=_px(y), r=radius, class_="dot"))
    marks += _names([(block, x, y - 8) for block, x, y, _ in dots if block in named])
    marks += _block_axis(values[0][0], values[-1][0], x_of, room + height + 16)
    return chart(label, room + height + 20, marks)


def depth_bars(label: str, values: Sequence[tuple[int, float, str]]) -> Markup:
    """A value per block as bars; the three largest are named."""
    height, room = 100, 30
    top = max(value for _, value, _ in values) or 1.0
    named = _largest(values)
    first, last = values[0][0], values[-1][0]
    marks = _value_grid(top, room, height)
    x_of = _block_positions(first, last)
    wide = 100 / (last - first + 1) * 0.78
    names: list[tuple[int, float, float]] = []
    for block, value, title in values:
        tall = height * value / top
        kind = "bar strong" if block in named else "bar"
        shape = {
            "x": _pc(x_of(block) - wide / 2),
            "y": _px(room + height - tall),
            "width": _pc(wide),
            "height": _px(tall),
        }
        marks.append(element("rect", element("title", title), class_=kind, **shape))
        if block in named:
            names.append((block, x_of(block), room + height - tall - 5))
    marks += _names(names)
    marks += _block_axis(first, last, x_of, room + height + 16)
    return chart(label, room + height + 20, marks)


def heat_map(label: str, rows: Sequence[tuple[str, Sequence[tuple[int, float, str]]]]) -> Markup:
    """A value per linear: one row per kind, one column per block, stronger colour is more.

    Args:
        rows: name of the kind, and block, value and title of each cell.
    """
    blocks = sorted({block for _, cells in rows for block, _, _ in cells})
    column = {block: index for index, block in enumerate(blocks)}
    top = max(value for _, cells in rows for _, value, _ in cells) or 1.0
    wide, tall = 100 / len(blocks), 18
    marks: list[Markup] = []
    for index, (name, cells) in enumerate(rows):
        marks.append(element("text", name, x=-6, y=tall * index + 13, text_anchor="end", class_="tick"))
        for block, value, title in cells:
            shape = {
                "x": _pc(wide * (column[block] + 0.04)),
                "y": tall * index + 1,
                "width": _pc(wide * 0.92),
                "height": tall - 2,
                "fill_opacity": f"{max(0.06, value / top):.2f}",
            }
            marks.append(element("rect", element("title", title), class_="bar", **shape))
    step = max(1, math.ceil(len(blocks) / 8))
    for block in blocks[::step]:
        marks.append(
            element(
                "text",
                str(block),
                x=_pc(wide * (column[block] + 0.5)),
                y=tall * len(rows) + 14,
                text_anchor="middle",
                class_="tick",
            )
        )
    return chart(label, tall * len(rows) + 18, marks)


def probability_bar(probability: float) -> Markup:
    """A bar beside a probability that stands there in words."""
    bar = element("rect", x="0", y="0", width=_pc(100 * probability), height="6", rx="2", class_="bar")
    track = element("rect", x="0", y="0", width="100%", height="6", rx="2", class_="track")
    return element("svg", track, bar, class_="probability", height=6, aria_hidden="true")


def _largest(values: Sequence[tuple[int, float, str]]) -> set[int]:
    """The blocks worth naming: up to three, of few blocks fewer."""
    num = max(1, min(3, len(values) // 4))
    return {block for block, value, _ in sorted(values, key=lambda entry: -entry[1])[:num] if value > 0}


def _names(places: Sequence[tuple[int, float, float]]) -> list[Markup]:
    """Block numbers over their marks; one that would touch the one before it stands higher."""
    marks: list[Markup] = []
    before: tuple[float, float] | None = None
    for block, x, y in places:
        if before is not None and x - before[0] < 7 and abs(y - before[1]) < 12:
            y = before[1] - 12
        marks.append(element("text", str(block), x=_pc(x), y=_px(y), text_anchor="middle", class_="name"))
        before = (x, y)
    return marks


def _block_positions(first: int, last: int) -> Callable[[int], float]:
    """Centres of equally wide columns, so that charts of lines and of bars stand over each other."""
    return lambda block: 100 * (block - first + 0.5) / (last - first + 1)


def _block_axis(first: int, last: int, x_of: Callable[[int], float], y: float) -> list[Markup]:
    step = max(1, math.ceil((last - first + 1) / 8))
    step = next(nice for nice in (1, 2, 5, 10, 20, 50, 100, 1000) if nice >= step)
    shown = [block for block in range(first, last + 1) if block % step == 0]
    return [
        element("text", str(block), x=_pc(x_of(block)), y=_px(y), text_anchor="middle", class_="tick")
        for block in shown
    ]


def _value_grid(top: float, room: float, height: float) -> list[Markup]:
    marks = []
    for tick in linear_ticks(0, top, 3):
        y = room + height - height * tick / top
        marks.append(element("line", x1="0", x2="100%", y1=_px(y), y2=_px(y), class_="grid"))
        marks.append(element("text", f"{tick:.3g}", x=-6, y=_px(y + 4), text_anchor="end", class_="tick"))
    return marks


def _whisker(low: float, high: float, y: float) -> list[Markup]:
    return [
        element("line", x1=_pc(low), x2=_pc(high), y1=y, y2=y, class_="whisker"),
        _vertical(low, y - 4, y + 4, "whisker"),
        _vertical(high, y - 4, y + 4, "whisker"),
    ]


def _vertical(x: float, top: float, bottom: float, kind: str) -> Markup:
    return element("line", x1=_pc(x), x2=_pc(x), y1=_px(top), y2=_px(bottom), class_=kind)


def _tick_label(x: float, y: float, text: str) -> Markup:
    anchor = "start" if x < 4 else "end" if x > 96 else "middle"
    return element("text", text, x=_pc(x), y=_px(y), text_anchor=anchor, class_="tick")


def _pc(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") + "%"


def _px(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")
