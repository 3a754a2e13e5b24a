"""A report as one SVG: a panel of bars for each unit, the distributions that were kept, the goals. No library needed.

Where values span more than a factor of thirty the axis is logarithmic and the bars are dots, since a bar needs a zero
to grow from. The grey band is what A showed against A.
"""

from collections.abc import Callable, Iterator
from itertools import groupby
from math import ceil, floor, log10
from textwrap import wrap
from xml.sax.saxutils import escape, quoteattr

from chatvla_edge.benchmarks import machine
from chatvla_edge.benchmarks.report import Goal, Report, Row
from chatvla_edge.benchmarks.samples import percent
from chatvla_edge.benchmarks.units import readable, scale

WIDTH, MARGIN, LABELS, VALUES = 960, 28, 250, 215
LEFT, RIGHT = MARGIN + LABELS, WIDTH - MARGIN - VALUES
ROW, CURVES = 34, 240
INK, SOFT, GRID, BAND = "#1f2430", "#69707d", "#e4e7ec", "#dfe3ea"
BAR, BASE, MET, MISSED = "#0072b2", "#8d95a3", "#00805e", "#c8500a"
# Okabe and Ito: told apart by the colour-blind too.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5b5b5b")
LOGARITHMIC = 30

Scale = Callable[[float], float]


def draw(report: Report) -> str:
    """The SVG's text."""
    canvas = _Canvas()
    colours = _colours(report.rows)
    canvas.text(MARGIN, 16, report.title, size=19, weight="600")
    canvas.down(34)
    for text in (*report.method, machine.line(report.machine) if report.machine else ""):
        canvas.paragraph(text, size=11, colour=SOFT)
    if report.quick:
        canvas.paragraph("A quick run: fewer rounds, wider intervals.", size=11, colour=SOFT)
    canvas.down(10)
    for unit, rows in _panels(report.rows):
        _bars(canvas, unit, rows, report, colours)
    kept = [row for row in report.rows if row.curve]
    for unit, rows in _panels(kept):
        _curves(canvas, unit, rows, colours)
    for note in report.notes:
        canvas.paragraph(note, size=12, colour=INK)
    if report.goals:
        canvas.down(8)
    for goal in report.goals:
        canvas.paragraph(f"{goal.verdict}: {goal.text}", size=12, colour=_verdict(goal), weight="600")
    return canvas.finish(report.title)


class _Canvas:
    """Elements drawn downwards; the height is known at the end."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.y = 24.0

    def down(self, by: float) -> None:
        self.y += by

    def text(
        self, x: float, dy: float, text: str, *, size: int = 12, colour: str = INK, anchor: str = "start", **more: str
    ) -> None:
        extra = "".join(f" {name.replace('weight', 'font-weight')}={quoteattr(value)}" for name, value in more.items())
        self.parts.append(
            f'<text x="{x:.1f}" y="{self.y + dy:.1f}" font-size="{size}" fill="{colour}" '
            f'text-anchor="{anchor}"{extra}>{escape(text)}</text>'
        )

    def paragraph(self, text: str, *, size: int, colour: str, **more: str) -> None:
        for line in wrap(text, int((WIDTH - 2 * MARGIN) / (size * 0.53))):
            self.text(MARGIN, size, line, size=size, colour=colour, **more)
            self.down(size * 1.45)

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1, dash: str = "") -> None:
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<line x1="{x1:.1f}" y1="{self.y + y1:.1f}" x2="{x2:.1f}" y2="{self.y + y2:.1f}" stroke="{colour}" '
            f'stroke-width="{width:g}"{dashed}/>'
        )

    def box(self, x: float, dy: float, width: float, height: float, colour: str, opacity: float = 1) -> None:
        self.parts.append(
            f'<rect x="{x:.1f}" y="{self.y + dy:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" rx="2" '
            f'fill="{colour}" fill-opacity="{opacity:g}"/>'
        )

    def dot(self, x: float, dy: float, colour: str) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{self.y + dy:.1f}" r="5" fill="{colour}"/>')

    def path(self, points: list[tuple[float, float]], colour: str) -> None:
        steps = " ".join(f"{x:.1f},{self.y + y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{steps}" fill="none" stroke="{colour}" stroke-width="2"/>')

    def finish(self, title: str) -> str:
        height = ceil(self.y + 20)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" role="img" font-family="Inter, Segoe UI, Helvetica, Arial, sans-serif">\n'
            f'<title>{escape(title)}</title>\n<rect width="{WIDTH}" height="{height}" fill="white"/>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def _panels(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows side by side that share a unit, and are single figures or not alike."""
    for (unit, _), each in groupby(rows, key=lambda row: (row.unit, row.count > 1)):
        yield unit, list(each)


def _colours(rows: list[Row]) -> dict[str, str]:
    lines = iter(LINES * len(rows))
    bases = {row.versus.over for row in rows if row.versus}
    return {row.name: next(lines) if row.curve else BASE if row.name in bases else BAR for row in rows}


def _verdict(goal: Goal) -> str:
    return MET if goal.ok else MISSED


def _bars(canvas: _Canvas, unit: str, rows: list[Row], report: Report, colours: dict[str, str]) -> None:
    goals = {goal.row: goal for goal in report.goals if goal.row and goal.unit == unit}
    ends = [row.p99 or row.max or row.p50 for row in rows]
    starts = [row.min if row.min is not None else row.p50 for row in rows]
    marks = [goals[row.name].goal for row in rows if row.name in goals]
    to_x, ticks, shown, logarithmic = _axis(starts, [row.p50 for row in rows] + ends + marks, unit, (LEFT, RIGHT))
    height = ROW * len(rows)
    heading = "single figures"
    if rows[0].count > 1:
        heading = "median; whisker from the smallest sample to p99 (below 100 samples the largest)"
    canvas.text(MARGIN, 12, f"{heading}{f', in {shown}' if shown else ''}", size=12, weight="600")
    canvas.down(24)
    for value, label in ticks:
        canvas.line(to_x(value), 0, to_x(value), height, GRID)
        canvas.text(to_x(value), height + 14, label, size=11, colour=SOFT, anchor="middle")
    _noise_band(canvas, rows, to_x)
    for row, start, end in zip(rows, starts, ends, strict=True):
        colour = colours[row.name]
        words = wrap(row.name, 38)[:2]
        for index, part in enumerate(words):
            canvas.text(LEFT - 12, ROW / 2 + 4 + (index - (len(words) - 1) / 2) * 14, part, anchor="end")
        if logarithmic:
            canvas.line(to_x(start), ROW / 2, to_x(end), ROW / 2, colour, 2)
            canvas.dot(to_x(row.p50), ROW / 2, colour)
        else:
            base = to_x(0.0)
            canvas.box(min(base, to_x(row.p50)), 7, abs(to_x(row.p50) - base), ROW - 14, colour, 0.85)
            if row.count > 1:
                canvas.line(to_x(start), ROW / 2, to_x(end), ROW / 2, INK, 1.2)
                canvas.line(to_x(end), ROW / 2 - 4, to_x(end), ROW / 2 + 4, INK, 1.2)
        if goal := goals.get(row.name):
            canvas.line(to_x(goal.goal), 2, to_x(goal.goal), ROW - 2, _verdict(goal), 2, "4 3")
        tail = f" · p99 {readable(row.p99, unit)}" if row.p99 is not None else ""
        against = row.versus.text if row.versus else ""
        canvas.text(RIGHT + 12, ROW / 2 + (-2 if against else 4), readable(row.p50, unit) + tail)
        canvas.text(RIGHT + 12, ROW / 2 + 11, against, size=10, colour=SOFT)
        canvas.down(ROW)
    canvas.down(24)
    legend: list[str] = []
    if any(row.versus for row in rows):
        floors = [row.versus.noise.floor for row in rows if row.versus and row.versus.noise]
        over = " and ".join(dict.fromkeys(row.versus.over for row in rows if row.versus))
        legend.append(f"ratios: time over that of {over}, [95 % interval]")
        legend += [f"grey band: A/A noise {percent(max(floors))}"] if floors else []
    if goals:
        legend.append("dashed: goal")
    if legend:
        canvas.paragraph("; ".join(legend), size=11, colour=SOFT)
    canvas.down(14)


def _noise_band(canvas: _Canvas, rows: list[Row], to_x: Scale) -> None:
    """Around each baseline's median, over the rows that are compared with it."""
    medians = {row.name: row.p50 for row in rows}
    for baseline, value in medians.items():
        places = [
            (index, row.versus.noise.floor)
            for index, row in enumerate(rows)
            if row.versus and row.versus.noise and row.versus.over == baseline
        ]
        if places and value > 0:
            wide = 1 + max(noise for _, noise in places)
            indices = [index for index, _ in places] + [list(medians).index(baseline)]
            low, high = to_x(value / wide), to_x(value * wide)
            top, bottom = min(indices) * ROW, (max(indices) + 1) * ROW
            canvas.box(low, top, max(high - low, 1.5), bottom - top, BAND)


def _curves(canvas: _Canvas, unit: str, rows: list[Row], colours: dict[str, str]) -> None:
    """Value over percentile, the percentiles stretched towards the tail: 90, 99, 99.9 % at equal distances."""
    curves = {row.name: row.curve or [] for row in rows}
    nines = ceil(max(log10(1 / (1 - q)) for each in curves.values() for q, _ in each if q < 1) + 0.3)
    left, right = MARGIN + 60, WIDTH - MARGIN - 20

    def to_x(q: float) -> float:
        return left + (right - left) * min(log10(1 / max(1 - q, 1e-9)) / nines, 1.0)

    values = [value for each in curves.values() for _, value in each]
    to_y, ticks, shown, _ = _axis(values, values, unit, (CURVES, 0))
    canvas.text(MARGIN, 12, f"by percentile, in {shown}; each line ends at its maximum", size=12, weight="600")
    canvas.down(24)
    for value, label in ticks:
        canvas.line(left, to_y(value), right, to_y(value), GRID)
        canvas.text(left - 8, to_y(value) + 4, label, size=11, colour=SOFT, anchor="end")
    for q in (0.0, 0.5, 0.75, *(1 - 10.0**-power for power in range(1, nines + 1))):
        canvas.line(to_x(q), 0, to_x(q), CURVES, GRID)
        canvas.text(to_x(q), CURVES + 16, f"{q * 100:.10g} %", size=11, colour=SOFT, anchor="middle")
    for name, each in curves.items():
        # The maximum stands where its rank does, and not at 100 %, which lies infinitely far away.
        last = max(q for q, _ in each if q < 1)
        end = 1 - (1 - last) / 2
        canvas.path([(to_x(min(q, end)), to_y(value)) for q, value in each], colours[name])
    canvas.down(CURVES + 34)
    x = float(left)
    for name in curves:
        if x > left and x + 30 + 6.4 * len(name) > right:
            x = float(left)
            canvas.down(18)
        canvas.line(x, -4, x + 18, -4, colours[name], 3)
        canvas.text(x + 24, 0, name, size=12)
        x += 52 + 6.4 * len(name)
    canvas.down(22)


def _axis(
    starts: list[float], ends: list[float], unit: str, place: tuple[float, float]
) -> tuple[Scale, list[tuple[float, str]], str, bool]:
    """Where a value lies between the two ends of `place`, the labelled ticks, their unit, and if it is logarithmic.

    The smallest value decides between the two kinds, all of them decide the range.
    """
    low, high = min(*starts, *ends), max(*starts, *ends)
    middle = sorted(ends)[0]
    if low > 0 and high / middle > LOGARITHMIC:
        first, last = floor(log10(low)), ceil(log10(high))
        factor, shown = scale(10.0 ** ((first + last) / 2), unit)
        steps = [(10.0**power, f"{10.0**power / factor:.6g}") for power in range(first, last + 1)]

        def logarithmic(value: float) -> float:
            share = (log10(max(value, 10.0**first)) - first) / (last - first)
            return place[0] + (place[1] - place[0]) * share

        return logarithmic, steps, shown, True
    low, high = min(low, 0.0), max(high, 0.0)
    high = high if high > low else 1.0
    factor, shown = scale(high, unit)
    step = _step((high - low) / factor / 5) * factor
    first, last = floor(low / step), ceil(high / step - 1e-9)
    ticks = [(index * step, f"{index * step / factor:.6g}") for index in range(first, last + 1)]

    def linear(value: float) -> float:
        return place[0] + (place[1] - place[0]) * (value / step - first) / (last - first)

    return linear, ticks, shown, False


def _step(size: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** floor(log10(size))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= size * (1 - 1e-9))
