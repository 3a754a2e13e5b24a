"""Commands of the drivers. Light at import."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

app = typer.Typer()
console = Console()


@app.command("doctor")
def doctor(
    name: Annotated[
        str | None, typer.Argument(metavar="[RIG]", help="A rig file or name: check its devices, too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say whether this computer is fit to run a robot, and what to do about what is not. Exit code 1 on a failure."""
    from chatvla_edge.drivers import rig
    from chatvla_edge.drivers.doctor import examine

    lines = examine(None if name is None else rig.load(name))
    if as_json:
        typer.echo(json.dumps([asdict(line) for line in lines], indent=2))
    else:
        table = Table("check", "", "found", "what to do")
        colours = {"ok": "green", "warn": "yellow", "fail": "red"}
        for line in lines:
            verdict = Text(line.verdict, style=colours[line.verdict])
            table.add_row(Text(line.check), verdict, Text(line.found), Text(line.remedy))
        console.print(table)
    if any(line.verdict == "fail" for line in lines):
        raise typer.Exit(1)
