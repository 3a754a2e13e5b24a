"""`chatvla-edge bench`: lists the benchmarks, runs one, draws a kept result. Light at import."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

app = typer.Typer()


# Whatever follows NAME belongs to the benchmark, `--help` too.
@app.command("bench", context_settings={"allow_interspersed_args": False})
def bench(
    name: Annotated[str | None, typer.Argument(help="The benchmark to run; without it all are listed.")] = None,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(help="--quick, --json FILE, --plot FILE.svg, and its own: bench NAME --help.", metavar="[...]"),
    ] = None,
    draw: Annotated[
        Path | None,
        typer.Option(help="Draw a result kept with --json, into the file beside it that ends in .svg.", exists=True),
    ] = None,
) -> None:
    """Measure: list the benchmarks with the goals that their last committed results met, or run one.

    Exit code 1 where a goal is missed or could not be measured.
    """
    from chatvla_edge.benchmarks import plot, script
    from chatvla_edge.benchmarks.report import Report

    if draw is not None:
        if name is not None:
            raise typer.BadParameter(f"draws a kept result and runs nothing, found {name!r} too", param_hint="--draw")
        target = draw.with_suffix(".svg")
        target.write_text(plot.draw(Report.read(draw)))
        typer.echo(target)
    elif name is None:
        _list()
    elif (name := name.replace("-", "_")) not in (known := script.discover()):
        raise typer.BadParameter(f"found {name!r}, expected one of: {', '.join(known)}", param_hint="NAME")
    else:
        sys.exit(script.run(name, arguments or [], f"chatvla-edge bench {name}"))


def _list() -> None:
    from chatvla_edge.benchmarks import script

    table = Table(box=box.SIMPLE_HEAD)
    for title in ("benchmark", "measures", "last committed result"):
        table.add_column(title, overflow="fold")
    for name, summary in script.discover().items():
        last = script.last_result(name)
        told = Text("none", style="dim") if last is None else Text(f"{str(last.machine.get('date', ''))[:10]}")
        for goal in last.goals if last else ():
            told.append(f"\n{goal.verdict}", style="green" if goal.ok else "red").append(f" {goal.text}")
        table.add_row(Text(name, style="cyan"), Text(summary), told)
    console = Console()
    console.print(table)
    console.print("run one: chatvla-edge bench NAME --quick --json FILE --plot FILE.svg", style="dim")
