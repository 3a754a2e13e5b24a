"""The command line: exit codes, sentences for users, tracebacks for defects, commands found by entry point."""

import subprocess
import sys
from importlib.metadata import entry_points, metadata
from pathlib import Path

import pytest
import typer

from chatvla_edge.runtime import cli


class Entry:
    """What `entry_points()` yields for one room, around a function."""

    name = "probe"

    def __init__(self, command):
        self.command = command

    def load(self):
        app = typer.Typer()
        app.command("probe")(self.command)
        return app


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line with one extra command `probe`; the exit code, stdout and stderr."""

    def run(*arguments, probe=lambda: None):
        monkeypatch.setattr(cli, "entry_points", lambda group: [Entry(probe)])
        monkeypatch.setattr(sys, "argv", ["chatvla-edge", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        return exit_.value.code, out, err

    return run


def raises(error):
    def command() -> None:
        raise error

    return command


def test_a_command_that_returns_exits_0(run):
    code, _, err = run("probe")
    assert (code, err) == (0, "")


def test_help_and_version_exit_0(run):
    assert run("--help")[0] == 0
    code, out, _ = run("--version")
    assert (code, out) == (0, f"chatvla-edge {metadata('chatvla-edge')['Version']}\n")


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["probe", "--no-such-option"]])
def test_wrong_usage_exits_2(run, arguments):
    assert run(*arguments)[0] == 2


def test_a_failed_check_exits_1(run):
    assert run("probe", probe=raises(typer.Exit(1)))[0] == 1


def test_an_error_for_the_user_is_one_sentence_taken_literally(run):
    code, out, err = run("probe", probe=raises(ValueError("shape [2, 3] in [/bold] file[red].safetensors")))
    assert (code, out, err) == (1, "", "error shape [2, 3] in [/bold] file[red].safetensors\n")


def test_traceback_shows_where_such_an_error_arose(run):
    with pytest.raises(ValueError, match="shape"):
        run("--traceback", "probe", probe=raises(ValueError("shape")))


def test_a_long_error_is_not_broken_into_lines(run):
    # A path that is cut in two can neither be copied nor searched for.
    assert run("probe", probe=raises(OSError("x" * 300)))[2] == f"error {'x' * 300}\n"


def test_a_missing_optional_library_names_the_extra(run):
    code, _, err = run("probe", probe=raises(ModuleNotFoundError("...", name="transformers.models")))
    assert code == 1
    assert "needs the module `transformers`" in err
    assert "pip install 'chatvla-edge[export]'" in err


def test_onnxruntime_may_come_from_either_extra(run):
    err = run("probe", probe=raises(ModuleNotFoundError("...", name="onnxruntime")))[2]
    assert "pip install 'chatvla-edge[cpu]' or pip install 'chatvla-edge[cuda]'" in err


@pytest.mark.parametrize("error", [ModuleNotFoundError("...", name="chatvla_edge.gone"), KeyError("x")])
def test_a_defect_keeps_its_traceback(run, error):
    with pytest.raises(type(error)):
        run("probe", probe=raises(error))


def test_conflicting_installations_stop_every_command(run, monkeypatch):
    monkeypatch.setattr(cli, "conflicts", lambda: ["two [owners] of one module"])
    code, _, err = run("probe", probe=raises(AssertionError("never reached")))
    assert (code, err) == (1, "error two [owners] of one module\n")


def test_every_extra_that_a_sentence_names_exists():
    offered = set(metadata("chatvla-edge").get_all("Provides-Extra"))
    assert {extra for extras in cli.EXTRAS_OF.values() for extra in extras} <= offered


def test_every_room_with_commands_is_found_and_loads():
    rooms = {entry.name: entry.load() for entry in entry_points(group=cli.GROUP)}
    assert "export" in rooms
    assert all(isinstance(app, typer.Typer) for app in rooms.values())


def test_the_installed_command_answers():
    command = Path(sys.executable).parent / "chatvla-edge"
    answer = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("chatvla-edge ")
