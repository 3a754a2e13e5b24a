"""`./dev` on systems that lack something: what it asks for, and when it helps itself.

The systems are folders of stand-in commands, so nothing is installed here.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
LINE = "apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc libc6-dev"

pytestmark = pytest.mark.skipif(not (CHECKOUT / "dev").exists(), reason="the tests run outside a checkout")


class System:
    """A bare machine: the core utilities, a checkout that holds only `dev`, and the commands it is given."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in ("cat", "cksum", "dirname", "env", "find", "grep", "rm", "sed", "sh"):
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.log = folder / "log"
        self.log.touch()
        self.checkout = folder / "a checkout"
        self.checkout.mkdir()
        shutil.copy(CHECKOUT / "dev", self.checkout)

    def command(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>"{self.log}"\n{script}\n')
        path.chmod(0o755)

    def dev(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [self.checkout / "dev", *arguments],
            env={"PATH": str(self.bin)} | environment,
            capture_output=True,
            text=True,
        )


@pytest.fixture
def system(tmp_path):
    return System(tmp_path)


def test_without_a_command_it_says_what_it_can_do(system):
    answer = system.dev()
    assert answer.returncode == 0
    assert "./dev setup" in answer.stdout


def test_an_unknown_command_is_wrong_usage(system):
    assert system.dev("instal").returncode == 2


def test_a_user_without_rights_gets_the_exact_line(system):
    system.command("id", "echo 1000")
    system.command("apt-get", "exit 99")
    answer = system.dev("setup")
    assert answer.returncode == 1
    assert f"\n    sudo apt-get update && sudo {LINE}\n" in answer.stderr
    assert "apt-get" not in system.log.read_text()


def test_a_sudo_that_asks_for_a_password_is_no_right(system):
    system.command("id", "echo 1000")
    system.command("apt-get", "exit 99")
    system.command("sudo", "exit 1")
    assert f"sudo {LINE}" in system.dev("setup").stderr


@pytest.mark.parametrize("user", ["root", "sudo"])
def test_with_rights_it_installs_what_is_missing(system, user):
    system.command("id", "echo 0" if user == "root" else "echo 1000")
    system.command("sudo", 'shift; [ "$1" = true ] || exec "$@"')
    system.command("apt-get", "exit 0")
    (system.bin / "true").symlink_to(shutil.which("true"))
    answer = system.dev("setup")
    calls = [call for call in system.log.read_text().splitlines() if call.startswith("apt-get")]
    assert calls == ["apt-get update -q", f"{LINE} -q"]
    # The stand-in installed nothing, and that is noticed.
    assert answer.returncode == 1
    assert "no Python 3.10-3.12 on the PATH" in answer.stderr


def test_a_python_that_is_too_new_is_not_installed_again(system):
    system.command("id", "echo 0")
    system.command("apt-get", "exit 0")
    system.command("python3", "echo 3.13")
    answer = system.dev("setup")
    assert "no Python 3.10-3.12 on the PATH" in answer.stderr
    assert "apt-get" not in system.log.read_text()


def test_a_wrong_choice_of_python_is_refused(system):
    system.command("python3.9", "echo 3.9")
    answer = system.dev("setup", PYTHON="python3.9")
    assert answer.stderr == "dev: PYTHON=python3.9 is not a Python 3.10-3.12\n"


def test_a_system_that_is_not_debian_is_told_the_names(system):
    answer = system.dev("setup")
    assert "missing: python3 python3-venv python3-dev gcc libc6-dev (Debian's names" in answer.stderr
