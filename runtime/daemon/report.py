"""One self-contained HTML page of a session: rates, latencies, joints, the arbiter's timeline, pictures with reasoning.

Plain SVG and the log's own JPEGs: no script, nothing fetched, so that it opens in ten years and on a machine without a
network.
"""

import base64
import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.runtime.daemon import log_file, ros
from chatvla_edge.runtime.servo_records import REASONS, SERVO_DOING, names

Float = NDArray[np.float64]

PICTURES = 16  # along the time axis
POINTS = 600  # of a line: more than a screen shows
WIDTH, MARGIN = 1160, 60

COLOURS = {
    "DISARMED": "#9aa0a6",
    "READY": "#4fb3bf",
    "ACTIVE": "#3c9d4e",
    "HOLD": "#e0b400",
    "SOFT_STOP": "#a457c9",
    "FAULT": "#d23f31",
}
LINES = {"raw": "#b0b7bf", "fused": "#e0a030", "limited": "#7a56c2", "sent": "#2f6fde", "measured": "#2a8f4e"}

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1200px; margin: 24px auto; padding: 0 16px; color: #202428; }
h1 { font-size: 24px; } h2 { font-size: 18px; margin-top: 32px; }
table { border-collapse: collapse; } td, th { padding: 3px 12px 3px 0; text-align: left; vertical-align: top; }
th { font-weight: 600; } .number { text-align: right; font-variant-numeric: tabular-nums; }
svg { display: block; } svg text { font: 11px system-ui, sans-serif; fill: #555; }
.badge { background: #4fb3bf; color: white; border-radius: 4px; padding: 2px 8px; font-size: 13px; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 12px; }
.strip figure { margin: 0; } .strip img { width: 100%; border-radius: 4px; }
.strip figcaption { font-size: 12px; overflow-wrap: anywhere; } .muted { color: #6a7077; } .bad { color: #d23f31; }
details { margin: 8px 0; }
"""


@dataclass(frozen=True)
class Session:
    """What the log holds, read once. Times in s since the first tick (or event)."""

    about: dict[str, str]
    ticks: Any
    events: list[dict[str, Any]]
    gaps: list[dict[str, Any]]
    queries: list[dict[str, Any]]
    frames: dict[str, list[dict[str, Any]]]
    pictures: dict[str, list[tuple[int, bytes]]]
    begin_ns: int
    end_ns: int

    def seconds(self, host_ns: int) -> float:
        """Since the beginning."""
        return 1e-9 * (host_ns - self.begin_ns)

    @property
    def length(self) -> float:
        """Seconds from the first to the last."""
        return max(1e-9, self.seconds(self.end_ns))


def read(session: Path) -> Session:
    """Read a session's folder or file. Raises ValueError where there is no log."""
    about = log_file.metadata(session)
    rig = json.loads(about["rig"])
    events, gaps, queries = [], [], []
    frames: dict[str, list[dict[str, Any]]] = {name: [] for name in rig["cameras"]}
    pictures: dict[str, list[tuple[int, bytes]]] = {name: [] for name in rig["cameras"]}
    parts = []
    for message in log_file.messages(session):
        topic = message.topic
        if topic == "/ticks":
            parts.append(message.rows())
        elif topic == "/events":
            events.append(message.json())
        elif topic == "/gaps":
            gaps.append(message.json())
        elif topic == "/policy":
            report = message.json()
            queries += [report] if "text" in report else []
        elif topic.endswith("/frame"):
            frames[topic.split("/")[2]].append(message.json())
        elif topic.startswith("/camera/"):
            pictures[topic.split("/")[2]].append((message.host_ns, message.data))
    ticks = np.concatenate(parts) if parts else None
    stamps = [event["at_ns"] for event in events]
    if ticks is not None:
        stamps += [int(ticks["tick_ns"][0]), int(ticks["tick_ns"][-1])]
    if not stamps:
        raise ValueError(f"{session}: found neither ticks nor events in the log, expected a session that ran")
    return Session(about, ticks, events, gaps, queries, frames, pictures, min(stamps), max(stamps))


def write(session: Path, output: Path) -> None:
    """Write the page. Raises ValueError, OSError."""
    output.write_text(page(read(session)), encoding="utf-8")


def page(session: Session) -> str:
    """The whole page."""
    about = session.about
    rig = json.loads(about["rig"])
    simulated = '<span class="badge">simulated: nothing real moved</span>' if rig["simulated"] else ""
    sections = [
        f"<h1>{_text(rig['name'])} {simulated}</h1>",
        f"<p>{_text(rig['description'])}. {session.length:.1f} s, {_text(json.loads(about['kind']))} run of "
        f"{_text(json.loads(about['variant']))}, bundle {_text(json.loads(about['bundle'])[:12])}.</p>",
        "<h2>Rates</h2>" + _rates(session, rig),
        "<h2>What the arbiter decided</h2>" + _timeline(session),
        "<h2>Seen and thought</h2>" + _strip(session),
        "<h2>Latencies</h2>" + _latencies(session),
        "<h2>Axes</h2>" + _axes(session, rig),
        "<h2>Gaps of the log</h2>" + _gaps(session),
    ]
    title = f"{rig['name']}: session report"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


# ------------------------------------------------------------------------------------------------------------- sections


def _rates(session: Session, rig: dict[str, Any]) -> str:
    rows = []

    def row(name: str, declared: float, count: int, seconds: float, note: str = "") -> None:
        rate = (count - 1) / seconds if count > 1 and seconds > 0 else 0.0
        rows.append([name, f"{declared:g} Hz", f"{rate:.2f} Hz", f"{rate / declared:.4f}", note])

    if session.ticks is not None and len(session.ticks) > 1:
        numbers, stamps = session.ticks["tick"].astype(np.int64), session.ticks["tick_ns"]
        row("servo", rig["servo"]["rate"], int(numbers[-1] - numbers[0]) + 1, 1e-9 * float(stamps[-1] - stamps[0]))
    for name, frames in session.frames.items():
        if len(frames) > 1:
            # By the publications' own numbers: the log may be thinner than the camera.
            count = frames[-1]["number"] - frames[0]["number"] + 1
            seconds = 1e-9 * (frames[-1]["published_ns"] - frames[0]["published_ns"])
            row(f"camera {name}", rig["cameras"][name]["rate"], count, seconds, f"{len(frames)} pictures in the log")
    if len(session.queries) > 1:
        seconds = 1e-9 * (session.queries[-1]["done_ns"] - session.queries[0]["done_ns"])
        row("policy", 1.0 / rig["policy"]["cycle"], len(session.queries), seconds)
    return _table(["stream", "declared", "measured", "share", ""], rows)


def _timeline(session: Session) -> str:
    modes = [event for event in session.events if event["kind"] == "mode"]
    begin, name, spans = 0.0, "DISARMED", []
    for event in modes:
        at = session.seconds(event["at_ns"])
        spans.append((begin, at, name))
        begin, name = at, event["name"]
    spans.append((begin, session.length, name))
    scale = (WIDTH - 2 * MARGIN) / session.length
    bars = "".join(
        f'<rect x="{MARGIN + scale * start:.1f}" y="4" width="{max(0.5, scale * (end - start)):.1f}" height="26" '
        f'fill="{COLOURS[mode]}"><title>{mode} {start:.2f} to {end:.2f} s</title></rect>'
        for start, end, mode in spans
    )
    legend = " ".join(f'<span style="color:{colour}">&#9632;</span> {mode}' for mode, colour in COLOURS.items())
    rows = [[f"{session.seconds(event['at_ns']):.2f} s", event["kind"], event["text"]] for event in session.events]
    return (
        f'<svg width="{WIDTH}" height="54">{bars}{_time_axis(session.length, 30)}</svg><p class="muted">{legend}</p>'
        f"<details><summary>{len(rows)} events</summary>{_table(['at', 'kind', ''], rows)}</details>"
    )


def _strip(session: Session) -> str:
    figures = []
    texts = session.queries
    for name, taken in session.pictures.items():
        for index in _spread(len(taken), PICTURES):
            at, message = taken[index]
            said = next(
                (q for q in reversed(texts) if q["frames"].get(name, {}).get("captured_ns", 1 << 62) <= at), None
            )
            words = _text(said["text"]) if said else '<span class="muted">no answer yet</span>'
            data = base64.b64encode(ros.image_data(message)).decode()
            figures.append(
                f'<figure><img alt="{_text(name)}" src="data:image/jpeg;base64,{data}">'
                f"<figcaption><b>{session.seconds(at):.1f} s</b> {words}</figcaption></figure>"
            )
    if not figures:
        return "<p class='muted'>no pictures in this log</p>" + _table(
            ["at", "reasoning"], [[f"{session.seconds(q['done_ns']):.1f} s", q["text"]] for q in texts[:50]]
        )
    return f'<div class="strip">{"".join(figures)}</div>'


def _latencies(session: Session) -> str:
    blocks = []
    if session.ticks is not None:
        blocks.append(_histogram("servo: wake-up late", 1e-3 * session.ticks["late_ns"].astype(float), "us"))
        blocks.append(_histogram("servo: cost of a tick", 1e-3 * session.ticks["cost_ns"].astype(float), "us"))
    if session.queries:
        took = np.array([1e-6 * (query["done_ns"] - query["begun_ns"]) for query in session.queries])
        blocks.append(_histogram("policy: query", took, "ms"))
        ages = [
            1e-6 * (query["done_ns"] - min(frame["captured_ns"] for frame in query["frames"].values()))
            for query in session.queries
        ]
        blocks.append(_histogram("chunk: age of its frames when published", np.array(ages), "ms"))
        stages = sorted({stage for query in session.queries for stage in query["seconds"]})
        rows = []
        for stage in stages:
            values = np.array([1e3 * query["seconds"].get(stage, 0.0) for query in session.queries])
            rows.append([stage, *(f"{np.percentile(values, p):.2f}" for p in (50, 95, 100))])
        blocks.append(_table(["stage", "p50 ms", "p95 ms", "worst ms"], rows))
    return "".join(blocks)


def _axes(session: Session, rig: dict[str, Any]) -> str:
    if session.ticks is None:
        return "<p class='muted'>no ticks</p>"
    ticks = session.ticks
    plan = json.loads(session.about["plan"])
    times = 1e-9 * (ticks["tick_ns"] - session.begin_ns).astype(float)
    legend = " ".join(f'<span style="color:{colour}">&#9632;</span> {name}' for name, colour in LINES.items())
    blocks, at = [f'<p class="muted">{legend}. Before a chunk and at rest, raw and fused are not shown.</p>'], 0
    for arm in plan["arms"]:
        direct = {axis["axis"]: axis for axis in arm["direct"]}
        for axis in range(len(arm["limits"]["lower"])):
            lines = {name: ticks[name][:, at + axis] for name in ("limited", "sent", "measured")}
            if axis in direct:
                rule = direct[axis]
                awake = (ticks["doing"] > 0) & (ticks["chunk"] > 0)
                for name in ("raw", "fused"):
                    values = rule["scale"] * ticks[name][:, rule["component"]] + rule["offset"]
                    lines[name] = np.where(awake, values, np.nan)
            blocks.append(_plot(f"{arm['name']} axis {axis + 1}", times, lines))
        at += len(arm["limits"]["lower"])
    doing = [SERVO_DOING[int(code)] for code in np.unique(ticks["doing"])]
    bits = int(np.bitwise_or.reduce(ticks["reasons"].astype(np.uint64)))
    blocks.append(f"<p class='muted'>servo: {', '.join(doing)}; reasons met: {', '.join(names(bits, REASONS))}</p>")
    return "".join(blocks)


def _gaps(session: Session) -> str:
    if not session.gaps:
        return "<p>none: every tick since the recorder began is in the log</p>"
    rows = [[str(gap["number"]), str(gap["from"]), str(gap["to"]), gap["why"]] for gap in session.gaps]
    return _table(["", "from tick", "to", "because"], rows)


# -------------------------------------------------------------------------------------------------------------- drawing


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _spread(count: int, most: int) -> list[int]:
    """At most ``most`` indices, evenly over ``count``."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))}) if count else []


def _time_axis(length: float, y: float) -> str:
    marks = np.linspace(0, length, 7)
    scale = (WIDTH - 2 * MARGIN) / length
    return "".join(
        f'<text x="{MARGIN + scale * at:.1f}" y="{y + 16}" text-anchor="middle">{at:.1f} s</text>' for at in marks
    )


def _histogram(title: str, values: Float, unit: str) -> str:
    """Logarithmic counts: what is rare is what one looks for."""
    values = values[np.isfinite(values)]
    if not len(values):
        return ""
    top = max(float(np.percentile(values, 99.9)), 1e-9)
    counts, edges = np.histogram(np.clip(values, 0, top), bins=60, range=(0, top))
    heights = np.log1p(counts) / np.log1p(max(1, counts.max())) * 70
    wide = 560 / len(counts)
    bars = "".join(
        f'<rect x="{MARGIN + wide * i:.1f}" y="{84 - height:.1f}" width="{wide - 1:.1f}" height="{height:.1f}" '
        f'fill="#2f6fde"><title>{edges[i]:.2f} to {edges[i + 1]:.2f} {unit}: {count}</title></rect>'
        for i, (count, height) in enumerate(zip(counts, heights, strict=True))
        if count
    )
    said = (
        ", ".join(f"p{p:g} {np.percentile(values, p):.1f}" for p in (50, 99, 99.9))
        + f", worst {values.max():.1f} {unit}"
    )
    return (
        f"<p><b>{_text(title)}</b> <span class='muted'>{said} ({len(values)} of them; heights logarithmic)</span></p>"
        f'<svg width="680" height="104">{bars}<text x="{MARGIN}" y="100">0</text>'
        f'<text x="{MARGIN + 560}" y="100" text-anchor="end">{top:.1f} {unit}</text></svg>'
    )


def _plot(title: str, times: Float, lines: dict[str, Float]) -> str:
    """Lines over time, drawn as the least and the most of each column, so that no spike is lost."""
    known = np.concatenate([values[np.isfinite(values)] for values in lines.values()])
    if not len(known):
        return f"<p class='muted'>{_text(title)}: never known</p>"
    low, high = float(known.min()), float(known.max())
    if high - low < 1e-6:
        low, high = low - 1e-3, high + 1e-3
    tall, wide = 92.0, WIDTH - 2 * MARGIN
    span = max(1e-9, float(times[-1] - times[0]))
    bins = np.minimum((POINTS * (times - times[0]) / span).astype(int), POINTS - 1)
    starts = np.searchsorted(bins, np.arange(POINTS))
    drawn = []
    for name in (name for name in LINES if name in lines):
        values = lines[name]
        points = []
        for i in range(POINTS):
            part = values[starts[i] : starts[i + 1] if i + 1 < POINTS else len(values)]
            part = part[np.isfinite(part)]
            if len(part):
                x = MARGIN + wide * i / POINTS
                ends = (float(part[0]),) if part[0] == part[-1] else (float(part.min()), float(part.max()))
                points += [f"{x:.1f},{6 + tall * (high - value) / (high - low):.1f}" for value in ends]
        drawn.append(f'<polyline fill="none" stroke="{LINES[name]}" stroke-width="1.2" points="{" ".join(points)}"/>')
    return (
        f'<svg width="{WIDTH}" height="112"><text x="{MARGIN}" y="12" font-weight="600">{_text(title)}</text>'
        f'<text x="{MARGIN - 6}" y="14" text-anchor="end">{high:.3f}</text>'
        f'<text x="{MARGIN - 6}" y="98" text-anchor="end">{low:.3f}</text>{"".join(drawn)}</svg>'
    )
