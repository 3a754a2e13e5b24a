"""What each arm's driver does with its motors, as Markdown; ``python -m support.manners_table`` in tests/ writes it."""

from chatvla_edge.drivers import registry
from support.safety_table import DOCUMENT

BEGIN, END = "<!-- manners: written by tests/support/manners_table.py -->", "<!-- end of manners -->"


def markdown() -> str:
    lines = [
        "| driver | stop action | its process starts | it ends | it is killed | paced by |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(registry.OURS["arms"]):
        manners = registry.load("arms", name).MANNERS
        stop = manners.stop.replace("_", " ")
        cells = (f"`{name}`", stop, manners.on_open, manners.on_close, manners.on_death, manners.pacing)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_manners(text: str) -> str:
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{markdown()}\n{END}{tail}"


if __name__ == "__main__":
    DOCUMENT.write_text(with_manners(DOCUMENT.read_text()))
