"""The limiter twice: compiled as it ships, and interpreted from its very source for coverage and mutation."""

import importlib.util
from pathlib import Path

from chatvla_edge.runtime import limits as compiled

SOURCE = Path(compiled.__file__).with_name("limits.py")


def interpreted():
    """The module as plain Python; needs Cython installed (its shadow of `cython.cimports`), as the build does."""
    specification = importlib.util.spec_from_file_location("limits_interpreted", SOURCE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert module.__file__.endswith(".py")
    return module


MODULES = {"interpreted": interpreted(), "compiled": compiled}
