"""The `chatvla-edge` command: collects what each room offers and runs it.

Rooms register a typer application under the entry-point group ``chatvla_edge.commands``. Their modules are light at
import (typer and rich only); what is heavy is imported inside the command that needs it, so `chatvla-edge --help`
works on a robot without torch.

Exit codes, for all commands: 0 ok, 1 a check failed or the command could not do its work, 2 usage.
"""

import sys
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from chatvla_edge.drivers.errors import DriverError
from chatvla_edge.runtime.install import conflicts

ROOT_HELP = "Runs a trained ChatVLA-2 policy on a robot: export a checkpoint, verify it, run it at native rate."

GROUP = "chatvla_edge.commands"

# Which extra brings the module that an import did not find. `onnxruntime` has two homes; the sentence names both.
EXTRAS_OF = {
    "PIL": ("jpeg",),
    "cv2": ("calibration",),
    "mujoco": ("sim",),
    "onnx": ("export",),
    "onnxruntime": ("cpu", "cuda"),
    "onnxscript": ("export",),
    "pymodbus": ("robotiq",),
    "pyrealsense2": ("realsense",),
    "safetensors": ("export",),
    "serial": ("robotiq",),
    "torch": ("export",),
    "transformers": ("export",),
}

_stderr = Console(stderr=True, highlight=False, soft_wrap=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"chatvla-edge {version('chatvla-edge')}")
        raise typer.Exit


def _root(
    _version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
    _traceback: bool = typer.Option(False, "--traceback", help="Show where in the code an error arose, for a report."),
) -> None:
    if problems := conflicts():
        for problem in problems:
            show_error(problem)
        raise typer.Exit(1)


def application() -> typer.Typer:
    """The whole command line: every room's commands side by side."""
    app = typer.Typer(
        name="chatvla-edge",
        help=ROOT_HELP,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        callback=_root,
    )
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        app.add_typer(entry.load())
    return app


def main() -> None:
    """Console entry point.

    A missing optional library is a plain sentence that names the extra to install; `ValueError`, `OSError` and
    `DriverError` carry messages written for the user, so they are shown without a traceback. Anything else is a defect
    and shows one.
    """
    try:
        application()()
    except (ModuleNotFoundError, ValueError, OSError, DriverError) as error:
        sentence = missing_library(error) if isinstance(error, ModuleNotFoundError) else str(error)
        # Read off the arguments, since an error may arise before typer has parsed them.
        if sentence is None or sys.argv[1:2] == ["--traceback"]:
            raise
        show_error(sentence)
        sys.exit(1)


def show_error(message: str) -> None:
    """Print one error on stderr, taken literally: a path or a shape may hold square brackets."""
    _stderr.print(Text.assemble(("error", "red"), " ", message))


def _is_source_only(name: str) -> bool:
    """Whether a module of ours is here as Cython source without its library, as after updating a checkout."""
    package, _, module = name.rpartition(".")
    spec = find_spec(package) if package else None
    folders = spec.submodule_search_locations if spec is not None else None
    return any((Path(folder) / f"{module}.pyx").is_file() for folder in folders or ())


def missing_library(error: ModuleNotFoundError) -> str | None:
    """The sentence for a library that an optional extra would bring; None if no extra does: then it is a defect."""
    library = (error.name or "").split(".")[0]
    if library == "chatvla_edge" and _is_source_only(str(error.name)):
        return f"the module {error.name} is not compiled yet: run ./dev setup, or install again"
    extras = EXTRAS_OF.get(library)
    if extras is None:
        return None
    which = " or ".join(f"[{extra}]" for extra in extras)
    installs = " or ".join(f"pip install 'chatvla-edge[{extra}]'" for extra in extras)
    return f"this command needs the module `{library}`, which the extra {which} brings: {installs}"
