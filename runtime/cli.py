"""The `chatvla-edge` command: collects what each room offers and runs it.

Rooms register a typer application under the entry-point group ``chatvla_edge.commands``. Their modules are light at
import (typer and rich only); what is heavy is imported inside the command that needs it, so `chatvla-edge --help`
works on a robot without torch.

Exit codes, for all commands: 0 ok, 1 a check failed, 2 usage.
"""

import sys
from importlib.metadata import entry_points, version

import typer
from rich.console import Console

from chatvla_edge.runtime.install import conflicts

ROOT_HELP = "Runs a trained ChatVLA-2 policy on a robot: export a checkpoint, verify it, run it at native rate."

_stderr = Console(stderr=True, highlight=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"chatvla-edge {version('chatvla-edge')}")
        raise typer.Exit


def _root(
    show_version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    if problems := conflicts():
        for problem in problems:
            _stderr.print(f"[red]error[/red] {problem}")
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
    for entry in sorted(entry_points(group="chatvla_edge.commands"), key=lambda entry: entry.name):
        app.add_typer(entry.load())
    return app


def main() -> None:
    """Console entry point.

    A missing optional library is a plain sentence that names the extra to install; `ValueError` and `OSError` carry
    messages written for the user, so they are shown without a traceback. Anything else is a defect and shows one.
    """
    try:
        application()()
    except ModuleNotFoundError as error:
        _stderr.print(f"[red]error[/red] {missing_library(error)}")
        sys.exit(1)
    except (ValueError, OSError) as error:
        _stderr.print(f"[red]error[/red] {error}", markup=True)
        sys.exit(1)


EXTRA_OF = {
    "torch": "export",
    "transformers": "export",
    "safetensors": "export",
    "PIL": "export",
    "onnx": "export",
    "onnxruntime": "cpu",
}


def missing_library(error: ModuleNotFoundError) -> str:
    """The sentence for a library that an optional extra would bring."""
    library = (error.name or "").split(".")[0]
    extra = EXTRA_OF.get(library)
    if extra is None:
        return f"the Python module {error.name!r} is missing"
    return f"this command needs {library!r}, which the extra [{extra}] brings: pip install 'chatvla-edge[{extra}]'"
