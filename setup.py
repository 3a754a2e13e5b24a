"""Package map and Cython extensions; everything declarative stands in pyproject.toml.

Each top-level folder is a room of the house and installs as ``chatvla_edge.<room>``; ``chatvla_edge`` itself is a
namespace without code, so no room can hide anything in it.
"""

from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, find_packages, setup

ROOMS = ("export", "runtime", "drivers", "calibration", "benchmarks")

# Modules written in Cython's pure-Python mode: they run interpreted (for coverage and mutation) and compiled.
PURE_MODE: tuple[str, ...] = ("runtime/limits.py",)

# -ffp-contract=off: a fused multiply-add rounds once where the interpreted twin rounds twice, and the two must agree
# to the last bit. No -march, no -ffast-math: a wheel runs on any machine of its architecture with the same numbers.
COMPILE_ARGS = ["-O2", "-ffp-contract=off", "-fno-math-errno"]


def import_names() -> str:
    """A folder that shows Cython, mypy and editors the rooms under their import names.

    `cimport chatvla_edge.runtime.slots` is looked up as a path, and no folder `chatvla_edge` holds the rooms. It lies
    in `build`, which a source distribution leaves out: elsewhere the headers found through it would be packed twice.
    """
    names = Path("build", "import-names")
    package = names / "chatvla_edge"
    package.mkdir(parents=True, exist_ok=True)
    for room in ROOMS:
        link = package / room
        if not link.is_symlink():
            link.symlink_to(Path("..", "..", "..", room), target_is_directory=True)
    return str(names)


def extensions() -> list[Extension]:
    sources = [path for room in ROOMS for path in sorted(Path(room).rglob("*.pyx"))]
    sources += [Path(path) for path in PURE_MODE]
    return [
        Extension(
            "chatvla_edge." + ".".join(path.with_suffix("").parts),
            [str(path)],
            include_dirs=[numpy.get_include()],
            define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
            extra_compile_args=COMPILE_ARGS,
        )
        for path in sources
    ]


setup(
    options={"build_ext": {"parallel": True}},  # one compiler per core
    packages=[
        name
        for room in ROOMS
        for name in (f"chatvla_edge.{room}", *(f"chatvla_edge.{room}.{sub}" for sub in find_packages(room)))
    ],
    package_dir={f"chatvla_edge.{room}": room for room in ROOMS},
    ext_modules=cythonize(
        extensions(),
        build_dir="build/cython",
        include_path=[import_names()],
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "freethreading_compatible": False,
        },
    ),
)
