"""What a benchmark hands back: rows, goals, notes. Printed as a table, kept as JSON, drawn from the JSON.

A script writes

    report = Report(title="A frame from the camera to the policy")
    report.add(timed)  # a Comparison: a row for each candidate, with its ratio to the baseline
    report.add(Samples.of("cyclictest", run1, run2, scale=1e-6), curve=True)  # samples from elsewhere
    report.figure("read bandwidth", 17.9, "GB/s")  # a single number
    report.goal("frame visible, p99", p99_s, "<=", 1e-3, unit="s", row="frame hand-off")
    report.note("half of this is the machine's share")

and returns the report.
"""

import json
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from chatvla_edge.benchmarks import machine
from chatvla_edge.benchmarks.method import Comparison
from chatvla_edge.benchmarks.samples import Noise, Ratio, Samples, curve, median_interval
from chatvla_edge.benchmarks.units import digits, readable, scale

Direction = Literal["<=", ">=", "=="]


def _finite(value: float) -> float:
    """JSON has no NaN; one that reaches a report is a mistake in the script."""
    if not isfinite(value):
        raise ValueError(f"found {value}, expected a finite number")
    return value


Finite = Annotated[float, AfterValidator(_finite)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class Row(_Part):
    """The distribution of one thing; a single figure has a median and nothing else.

    A percentile for which too few samples were taken is None: the p99 of 50 samples would be their maximum.
    """

    name: str
    unit: str
    count: int = 1
    rounds: int = 1
    p50: Finite
    p50_low: Finite | None = None
    p50_high: Finite | None = None
    min: Finite | None = None
    p90: Finite | None = None
    p99: Finite | None = None
    p999: Finite | None = None
    max: Finite | None = None
    mean: Finite | None = None
    versus: Ratio | None = None
    curve: list[tuple[float, float]] | None = None


class Goal(_Part):
    """A number to reach. `ok` is None where it could not be measured here, and `reason` says why: that is not met."""

    name: str
    value: Finite | None
    goal: Finite
    direction: Direction
    ok: bool | None
    unit: str = ""
    row: str | None = None
    reason: str | None = None

    @property
    def verdict(self) -> str:
        """One word or two: met, MISSED, NOT MEASURED."""
        return {True: "met", False: "MISSED", None: "NOT MEASURED"}[self.ok]

    @property
    def text(self) -> str:
        """The goal beside what was found."""
        found = f"not measured: {self.reason}" if self.value is None else readable(self.value, self.unit)
        return f"{self.name}: {found} (goal {self.direction} {readable(self.goal, self.unit)})"


class Report(_Part):
    """One benchmark's result. `benchmark`, `quick` and `machine` are filled in by the runner."""

    schema_version: Literal[1] = 1
    title: str
    benchmark: str = ""
    quick: bool = False
    method: list[str] = Field(default_factory=list)
    rows: list[Row] = Field(default_factory=list)
    goals: list[Goal] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    machine: dict[str, Any] = Field(default_factory=dict)

    def add(self, found: Comparison | Samples, *, curve: bool = False, versus: Ratio | None = None) -> None:
        """A row for samples from elsewhere, or one for each candidate of a comparison beside its ratio to the baseline.

        `curve` keeps the distribution, which the plot then shows. `versus` is the time of the row over another's.
        """
        if isinstance(found, Samples):
            self._append(_row(found, curve, versus))
            return
        alone = len(found.samples) == 1
        for name, samples in found.samples.items():
            against = None if name == found.baseline and not alone else found.ratio(name, over=found.baseline)
            self._append(_row(samples, curve, None if alone else against))
        self.method.append(found.method)

    def figure(self, name: str, value: float, unit: str) -> None:
        """A row that is a single number: a rate, a size, a count, a share."""
        self._append(Row(name=name, unit=unit, p50=value))

    def goal(
        self,
        name: str,
        value: float | None,
        direction: Direction,
        goal: float,
        *,
        unit: str = "",
        row: str | None = None,
        reason: str | None = None,
    ) -> None:
        """A number to reach. A `value` of None needs the `reason` why it was not measured; `row` draws it as a line."""
        if (value is None) != (reason is not None):
            raise ValueError(f"goal {name}: found value {value} and reason {reason!r}, expected one of them")
        if row is not None and row not in (known := [one.name for one in self.rows]):
            raise ValueError(f"goal {name}: found row {row!r}, expected one of {known}")
        ok = None if value is None else {"<=": value <= goal, ">=": value >= goal, "==": value == goal}[direction]
        self.goals.append(
            Goal(name=name, value=value, goal=goal, direction=direction, ok=ok, unit=unit, row=row, reason=reason)
        )

    def note(self, text: str) -> None:
        """A sentence below the table."""
        self.notes.append(text)

    @property
    def ok(self) -> bool:
        """Whether every goal was measured and met."""
        return all(goal.ok for goal in self.goals)

    @property
    def noise(self) -> Noise | None:
        """The widest A/A noise among the rows."""
        found = [row.versus.noise for row in self.rows if row.versus and row.versus.noise]
        return max(found, key=lambda noise: noise.floor, default=None)

    def _append(self, row: Row) -> None:
        if any(row.name == known.name for known in self.rows):
            raise ValueError(f"found a second row {row.name!r}, expected each name once")
        self.rows.append(row)

    def write(self, path: Path) -> None:
        """Keep it as JSON."""
        path.write_text(json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Report":
        """The report that `write` kept; `ValueError` names the file where it is not one."""
        try:
            return cls.model_validate_json(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not a benchmark's result of schema 1: {error}") from error

    def show(self, console: Console) -> None:
        """The tables, the notes, the method, and the goals last."""
        spread = [row for row in self.rows if row.count > 1]
        single = [row for row in self.rows if row.count == 1]
        console.print(Text(self.title, style="bold"))
        if spread:
            console.print(_distributions(spread))
        if single:
            console.print(_figures(single))
        for text in self.notes:
            console.print(Text(text))
        for text in filter(None, (*self.method, machine.line(self.machine) if self.machine else "")):
            console.print(Text(text, style="dim"))
        for goal in self.goals:
            style = {True: "green", False: "bold red", None: "bold yellow"}[goal.ok]
            console.print(Text.assemble((f"{goal.verdict:<6}", style), " ", goal.text))


def _row(samples: Samples, keep_curve: bool, versus: Ratio | None) -> Row:
    values = samples.values
    p50 = float(np.median(values))
    # Samples of one round resemble each other, so the interval is that of the rounds' medians, where there are rounds.
    middle = median_interval(samples.by_round() if len(samples.rounds) > 1 else values)
    return Row(
        name=samples.name,
        unit=samples.unit,
        count=values.size,
        rounds=len(samples.rounds),
        p50=p50,
        p50_low=min(middle.low, p50),
        p50_high=max(middle.high, p50),
        min=float(values.min()),
        p90=samples.quantile(0.9),
        p99=samples.quantile(0.99),
        p999=samples.quantile(0.999),
        max=float(values.max()),
        mean=float(values.mean()),
        versus=versus,
        curve=curve(values) if keep_curve else None,
    )


def _distributions(rows: list[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    table.add_column("unit")
    for name in ("min", "p50", "p90", "p99", "max"):
        table.add_column(name, justify="right")
    bases = {row.versus.over for row in rows if row.versus}
    if bases:
        table.add_column("ratio", no_wrap=len(bases) == 1)
        if len(bases) == 1:
            table.caption = f"ratio: time over that of '{escape(next(iter(bases)))}', [95 % interval]"
            table.caption_justify = "left"
    for row in rows:
        factor, unit = scale(row.p50, row.unit)
        figures = (row.min, row.p50, row.p90, row.p99, row.max)
        cells = [digits(None if figure is None else figure / factor) for figure in figures]
        if row.versus:
            cells.append(escape(row.versus.text if len(bases) == 1 else f"{row.versus.text} of {row.versus.over}"))
        table.add_row(Text(row.name), unit, *cells)
    return table


def _figures(rows: list[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for row in rows:
        table.add_row(Text(row.name), readable(row.p50, row.unit))
    return table
