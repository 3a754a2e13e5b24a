"""`chatvla-edge rig`: list, show and check rig files. Nothing is opened. Light at import."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from chatvla_edge.drivers.rig import Rig
    from chatvla_edge.drivers.streams import Stream

app = typer.Typer()
rigs = typer.Typer(no_args_is_help=True, help="List, show and check rig files.")
app.add_typer(rigs, name="rig")
console = Console()

RigName = Annotated[str, typer.Argument(help="A rig file, or the name of a rig that comes along.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@rigs.command("list")
def list_rigs(as_json: AsJson = False) -> None:
    """The rigs that come along."""
    from chatvla_edge.drivers import rig, yaml_source

    # Read, not checked: a rig whose driver another package brings is listed all the same.
    found = {name: yaml_source.read(rig.find(name).read_text()).values["description"] for name in rig.names()}
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table("rig", "what it is")
    for name, description in found.items():
        table.add_row(name, Text(description))
    console.print(table)


@rigs.command("drivers")
def list_drivers(as_json: AsJson = False) -> None:
    """The drivers that a rig file may name."""
    from chatvla_edge.drivers import registry

    found = {role: registry.known(role) for role in registry.ROLES}
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table("role", "driver", "class")
    for role, drivers in found.items():
        for name, place in sorted(drivers.items()):
            table.add_row(role, name, Text(place))
    console.print(table)


@rigs.command("show")
def show(name: RigName, as_json: AsJson = False) -> None:
    """Show a rig as it is understood, defaults filled in."""
    from chatvla_edge.drivers import rig
    from chatvla_edge.drivers.streams import streams

    loaded = rig.load(name)
    if as_json:
        typer.echo(loaded.model_dump_json(by_alias=True, indent=2))
        return
    about = f"{loaded.name}: {loaded.description}{' (simulated)' if loaded.simulated else ''}"
    console.print(Text(about, style="bold"))
    table = Table("stream", "driver", "rate", "max age", "required", "what")
    for stream in streams(loaded).values():
        device = getattr(loaded, stream.role)[stream.device]
        table.add_row(
            stream.name,
            device.driver,
            f"{stream.rate:g} Hz",
            f"{1e3 * stream.max_age:g} ms",
            "yes" if stream.required else "no",
            Text(_what(loaded, stream)),
        )
    console.print(table)
    servo, policy = loaded.servo, loaded.policy
    console.print(f"servo {servo.rate:g} Hz, fusion {servo.fusion}; policy {policy.rate:g} actions per second")


def _what(loaded: "Rig", stream: "Stream") -> str:
    from chatvla_edge.drivers import registry

    if stream.role == "cameras":
        camera = loaded.cameras[stream.device]
        native = camera.native
        return f"{camera.width}x{camera.height}" + (f" from {native.width}x{native.height}" if native else "")
    arm = loaded.arms[stream.device]
    axes = registry.create("arms", arm.driver, arm.options).axes
    return ", ".join(axes) + (f" of {arm.of}" if arm.of else "")


@rigs.command("check")
def check(
    name: RigName,
    bundle: Annotated[
        Path | None, typer.Option(help="Also hold it against this bundle.", exists=True, file_okay=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a rig file whole; with --bundle, whether that policy can drive it. Exit code 1 when it cannot."""
    from chatvla_edge.drivers import rig
    from chatvla_edge.runtime.rig_fit import bundle_problems, chain_problems

    try:
        loaded = rig.load(name)
        problems = [f"{rig.find(name)}: {problem}" for problem in chain_problems(loaded)]
    except rig.RigError as error:
        problems = str(error).splitlines()
    if not problems and bundle is not None:
        from chatvla_edge.runtime.bundle import open_bundle

        # What the policy asks of a rig stands in the manifest: no need to read gigabytes of stages for their digests.
        with open_bundle(bundle, verify=False) as opened:
            problems += bundle_problems(loaded, opened.manifest, str(bundle))
    if as_json:
        typer.echo(json.dumps({"ok": not problems, "problems": problems}, indent=2))
    elif problems:
        for problem in problems:
            console.print(Text.assemble(("wrong ", "red"), problem), soft_wrap=True)
    else:
        what = "the file" if bundle is None else "the file and the bundle"
        console.print(Text.assemble(("good ", "green"), f"{loaded.name}: {what}"))
    if problems:
        raise typer.Exit(1)
