"""`chatvla-edge camera`: how a rig's cameras do, and whether they see what they saw in training. Light at import."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from chatvla_edge.drivers import protocols, rig
    from chatvla_edge.drivers.protocols import Image

app = typer.Typer()
camera = typer.Typer(help="Look at a rig's cameras.", no_args_is_help=True)
app.add_typer(camera, name="camera")
console = Console()

RigName = Annotated[str, typer.Argument(help="A rig's name or file.")]
CameraName = Annotated[str, typer.Argument(help="A camera of the rig.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SETTLE = 1.0  # s: automatic exposure finds its value
PATIENCE = 5.0  # s for a first frame


@contextmanager
def _opened(name: str, description: "rig.Camera") -> "Iterator[protocols.Camera]":
    """A camera of a rig. A driver's error becomes a ValueError, which the command line shows as a sentence."""
    from chatvla_edge.drivers import registry
    from chatvla_edge.drivers.errors import DriverError

    device: protocols.Camera = registry.create("cameras", description.driver, description.options)
    try:
        device.open(description.height, description.width, description.rate)
        yield device
    except DriverError as error:
        raise ValueError(f"camera {name}: {error}") from error
    finally:
        device.close()


def _frames(device: "protocols.Camera", seconds: float) -> "Iterator[protocols.Frame]":
    """What comes in that time; the first one may take longer. Raises ValueError where none comes."""
    end = time.monotonic() + PATIENCE
    first = True
    while time.monotonic() < end:
        try:
            frame = device.read(0.2)
        except TimeoutError:
            continue
        if first:
            first, end = False, time.monotonic() + seconds
        yield frame
    if first:
        raise ValueError(f"no frame within {PATIENCE:g} s")


def _camera_of(rig_name: str, name: str) -> "rig.Camera":
    from chatvla_edge.drivers import rig

    cameras = rig.load(rig_name).cameras
    if name not in cameras:
        raise ValueError(f"found no camera {name!r} in {rig_name}, expected one of: {', '.join(sorted(cameras))}")
    return cameras[name]


def _look(name: str, description: "rig.Camera") -> "Image":
    """A picture after the exposure has settled."""
    with _opened(name, description) as device:
        picture: Image | None = None
        for frame in _frames(device, SETTLE):
            picture = frame.image.copy()
        assert picture is not None
        return picture


@camera.command("show")
def show(
    rig_name: RigName,
    seconds: Annotated[float, typer.Option(help="How long each camera is watched.", min=0.2)] = 2.0,
    as_json: AsJson = False,
) -> None:
    """Open each camera and say what it delivers: rate, age, lost frames. Exit code 1 where one does not work."""
    from chatvla_edge.drivers import rig

    rows = {name: _watched(name, description, seconds) for name, description in rig.load(rig_name).cameras.items()}
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        _table(rows)
    if any(not row["ok"] for row in rows.values()):
        raise typer.Exit(1)


def _watched(name: str, description: "rig.Camera", seconds: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "driver": description.driver,
        "asked": f"{description.width}x{description.height} at {description.rate:g}",
    }
    ages: list[float] = []
    arrivals: list[int] = []
    clocks: set[str] = set()
    try:
        with _opened(name, description) as device:
            for frame in _frames(device, seconds):
                ages.append((frame.received_ns - frame.captured_ns) * 1e-9)
                arrivals.append(frame.received_ns)
                clocks.add(frame.clock)
            health = device.health()
    except ValueError as error:
        return row | {"ok": False, "error": str(error)}
    rate = (len(arrivals) - 1) / max((arrivals[-1] - arrivals[0]) * 1e-9, 1e-9) if len(arrivals) > 1 else 0.0
    return row | {
        "ok": rate >= 0.9 * description.rate and median(ages) <= description.max_age,
        "rate": round(rate, 2),
        "age_s": round(median(ages), 4),
        "oldest_s": round(max(ages), 4),
        "clock": "/".join(sorted(clocks)),
        "frames": health.frames,
        "lost": health.lost,
        "repeated": health.repeated,
        "clock_steps": health.clock_steps,
        "facts": dict(health.facts),
    }


def _table(rows: dict[str, dict[str, Any]]) -> None:
    table = Table("camera", "driver", "asked", "rate", "age ms", "lost", "repeated", "clock", "")
    for name, row in rows.items():
        if "error" in row:
            table.add_row(Text(name), Text(row["driver"]), row["asked"], "", "", "", "", "", Text("fail", style="red"))
            continue
        verdict = Text("ok", style="green") if row["ok"] else Text("slow or old", style="red")
        numbers = (f"{row['rate']:.1f}", f"{1e3 * row['age_s']:.1f}", str(row["lost"]), str(row["repeated"]))
        table.add_row(Text(name), Text(row["driver"]), row["asked"], *numbers, row["clock"], verdict)
    console.print(table)
    for name, row in rows.items():
        if "error" in row:
            console.print(Text(row["error"], style="red"), soft_wrap=True)
        else:
            console.print(Text(f"{name}: {', '.join(f'{key} {value}' for key, value in row['facts'].items())}"))


@camera.command("save-reference")
def save_reference(
    rig_name: RigName,
    name: CameraName,
    reference: Annotated[Path, typer.Option(help="Where to: .npy, or .png with the extra `jpeg`.")],
) -> None:
    """Keep a picture of what a camera sees now, for `camera check`."""
    description = _camera_of(rig_name, name)
    if not reference.parent.is_dir():
        raise typer.BadParameter(f"{reference.parent} is no folder", param_hint="--reference")
    if reference.suffix not in (".npy", ".png"):
        raise typer.BadParameter(f"found {reference.name}, expected .npy or .png", param_hint="--reference")
    picture = _look(name, description)
    if reference.suffix == ".npy":
        np.save(reference, picture, allow_pickle=False)
    else:
        from PIL import Image

        Image.fromarray(picture).save(reference)
    console.print(f"{reference}: {picture.shape[1]}x{picture.shape[0]}", soft_wrap=True)


@camera.command("check")
def check(
    rig_name: RigName,
    name: CameraName,
    reference: Annotated[Path, typer.Option(help="What it saw in training.", exists=True, dir_okay=False)],
    as_json: AsJson = False,
) -> None:
    """Compare what a camera sees with a kept picture: shift, rotation, light, focus. Exit code 1 where they differ."""
    from chatvla_edge.drivers.cameras.view import check_view

    description = _camera_of(rig_name, name)
    known = _read(reference)
    shape = (description.height, description.width, 3)
    if known.shape != shape or known.dtype != np.uint8:
        raise ValueError(f"{reference}: found {known.shape} {known.dtype}, expected {shape} uint8")
    report = check_view(_look(name, description), known)
    if as_json:
        typer.echo(json.dumps(asdict(report) | {"ok": report.ok}, indent=2))
    else:
        table = Table("", "found", title=f"{name} beside {reference.name}")
        table.add_row("shift", f"{report.shift[0]:+.1f} px right, {report.shift[1]:+.1f} px down")
        table.add_row("rotation", f"{report.rotation_deg:+.2f} degrees counter-clockwise")
        table.add_row("scale", f"{report.scale:.3f}")
        table.add_row("brightness", f"{report.brightness:.2f} of the reference's")
        table.add_row("red, blue over green", f"{report.colour[0]:.2f}, {report.colour[1]:.2f} of the reference's")
        table.add_row("sharpness", f"{report.sharpness:.2f} of the reference's")
        table.add_row("structure", f"{report.structure:.2f}")
        console.print(table)
        for problem in report.problems:
            console.print(Text(problem, style="red"), soft_wrap=True)
        if report.ok:
            console.print("[green]the camera sees what it saw[/green]")
    if not report.ok:
        raise typer.Exit(1)


def _read(path: Path) -> "Image":
    if path.suffix == ".npy":
        return np.asarray(np.load(path, allow_pickle=False))
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise ValueError(f"{path}: expected a picture, found: {error}") from None
