"""The arbiter's table as Markdown. ``python -m support.safety_table`` (in tests/) writes it into docs/SAFETY.md."""

from pathlib import Path

from chatvla_edge.runtime.conditions import ALWAYS, TABLE, Condition, Unit
from chatvla_edge.runtime.modes import ARMED, MS, Clears, Mode, Reaction, S

DOCUMENT = Path(__file__).parents[2] / "docs" / "SAFETY.md"
BEGIN, END = "<!-- conditions: written by tests/support/safety_table.py -->", "<!-- end of conditions -->"
SEEN = {
    ALWAYS: "always",
    ARMED: "armed",
    ALWAYS - ARMED: "unarmed",
    frozenset({Mode.ACTIVE, Mode.HOLD}): "ACTIVE, HOLD",
}
DOES = {
    Reaction.NOTE: "note",
    Reaction.REFUSE: "refuse `arm`",
    Reaction.HOLD: "hold",
    Reaction.SOFT_STOP: "soft stop",
    Reaction.FAULT: "fault",
}


def time(ns: float) -> str:
    return f"{ns / S:g} s" if ns >= S else f"{ns / MS:g} ms"


def budget(row: Condition) -> str:
    said = ""
    if row.unit is Unit.TIME:
        said = time(row.at_least) if row.at_least else "0"
    elif row.unit is Unit.LENGTH:
        said = f"{row.at_least:g} rad (gripper: m)"
    if row.periods:
        said = f"{row.periods} periods, at least {said}"
    if row.lasting_ns:
        said = f"{said} for {time(row.lasting_ns)}" if said else time(row.lasting_ns)
    return said or "none"


def clears(row: Condition) -> str:
    return f"by itself, {time(row.settle_ns)} later" if row.clears is Clears.BY_ITSELF else row.clears.value


def markdown() -> str:
    lines = [
        "| condition | judged | of errands | budget | because | reaction | refuses `arm` | motion again |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in reversed(TABLE):
        judged = SEEN.get(row.judged_in) or ", ".join(mode.value for mode in row.judged_in)
        refuses = "yes" if row.blocks_arming else "no"
        errands = "yes" if row.of_errands else "no"
        cells = (row.name, judged, errands, budget(row), row.why, DOES[row.reaction], refuses, clears(row))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{markdown()}\n{END}{tail}"


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
