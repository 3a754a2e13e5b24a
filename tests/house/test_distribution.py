"""What is shipped: an sdist and the wheel built from it in isolation hold the rooms, and the wheel works elsewhere."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
ROOMS = ("export", "runtime", "drivers", "calibration", "benchmarks")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHECKOUT / "setup.py").exists(), reason="the tests run outside a checkout"),
]


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """sdist and wheel, built from a copy of the sources that holds nothing an earlier build left behind."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    shutil.copytree(
        CHECKOUT,
        source,
        symlinks=True,
        ignore=shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info", "*.so", "__pycache__"),
    )
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", folder / "dist", source],
        env=os.environ | {"PIP_CONSTRAINT": str(CHECKOUT / "constraints" / "ci.txt")},
        check=True,
    )
    return folder / "dist"


def sources(pattern: str) -> set[str]:
    return {
        path.relative_to(CHECKOUT).as_posix()
        for room in ROOMS
        for path in (CHECKOUT / room).rglob(pattern)
        if "__pycache__" not in path.parts
    }


def test_the_sdist_holds_what_it_takes_to_build(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"setup.py", "pyproject.toml", "LICENSE", "README.md"}.union(
        *(sources(pattern) for pattern in ("*.py", "*.pyx", "*.pxd", "*.pyi", "*.h", "*.c", "py.typed"))
    )
    assert wanted <= held, wanted - held


def test_the_wheel_holds_every_room_and_nothing_else(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as archive:
        held = set(archive.namelist())
    package = {name.removeprefix("chatvla_edge/") for name in held if ".dist-info/" not in name}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    compiled = {name.removesuffix(".pyx") + suffix for name in sources("*.pyx")}
    wanted = compiled.union(*(sources(pattern) for pattern in ("*.py", "*.pyx", "*.pxd", "*.pyi", "py.typed")))
    assert wanted <= package, wanted - package
    assert {f"{room}/py.typed" for room in ROOMS} <= package
    # Nothing at the top but our namespace, which holds nothing but the rooms: no tests, no setup.py, no other name.
    assert {name.split("/")[0] for name in package} == set(ROOMS), held
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in held)


@pytest.fixture(scope="module")
def elsewhere(dist, tmp_path_factory):
    """A fresh environment outside the checkout with the wheel in it; the libraries it needs are lent by this one."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    wheel = next(dist.glob("*.whl"))
    subprocess.run(
        [sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-deps", "--no-index", wheel], check=True
    )
    # A path line lends the packages in that folder, and not its .pth files: the editable checkout stays out of reach.
    where = subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True)
    Path(where.strip(), "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def test_the_installed_wheel_passes_the_fast_tests_outside_the_checkout(elsewhere, tmp_path):
    shutil.copytree(CHECKOUT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(CHECKOUT / "pyproject.toml", tmp_path)
    where = subprocess.check_output(
        [elsewhere, "-c", "import chatvla_edge.runtime.realtime as r; print(r.__file__)"], cwd=tmp_path, text=True
    )
    assert Path(where).is_relative_to(elsewhere.parents[1]), where
    answer = subprocess.run(
        [
            elsewhere,
            "-m",
            "pytest",
            "-q",
            "-n",
            "auto",
            "--maxprocesses",
            "4",
            "-m",
            "not slow",
            "-p",
            "no:cacheprovider",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
