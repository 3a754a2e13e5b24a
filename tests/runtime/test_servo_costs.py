"""What a tick may not do: allocate, or touch a Python object."""

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.virtual_rig import VirtualRig, joint_plan

import chatvla_edge.runtime.servo as servo_module

RUNTIME = Path(servo_module.__file__).parent

# Functions that a tick runs, by module; `c_run` is the loop around it.
IN_A_TICK = {
    "servo": (
        "c_tick", "c_run", "_gate", "_arm", "_take_chunk", "_wanted_rate", "_fuse", "_limit", "_finish_approach",
        "_doing", "_report",
    ),
    "chunk_inbox": ("take", "due", "ahead"),
    "servo_reports": ("account", "publish_status", "publish_telemetry", "publish_prefix"),
    "arm_servo": (
        "read_state", "condition", "age_ns", "faults", "start", "locate", "aim", "slow", "track", "arrived", "limit",
        "brake", "publish", "report",
    ),
    "devices": ("c_step", "_hear", "_fits", "_brake", "_braked"),
}  # fmt: skip


class MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


@pytest.fixture(scope="module")
def in_use():
    """Bytes that malloc has given out, of all arenas and of its mapped blocks (glibc)."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        pytest.skip("mallinfo2 needs glibc 2.33")
    mallinfo2.restype = MallInfo

    def ask():
        info = mallinfo2()
        return info.uordblks + info.hblkhd

    return ask


def test_ticks_leave_malloc_as_it_was(in_use):
    rig = VirtualRig(joint_plan(arms=2, axes=7, rate=1000.0))
    rig.start_tracking([[0.01 * i] * 14 for i in range(50)])

    def growth(ticks):
        before = in_use()
        rig.servo.run(ticks=ticks)
        return in_use() - before

    growth(1)
    # The call and the asking take a little; what 500 ticks take beyond what one does is theirs.
    assert growth(500) - growth(1) <= 64


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """The C of each module, as this Cython makes it of these sources."""
    folder = tmp_path_factory.mktemp("c")
    names = folder / "names" / "chatvla_edge"
    names.mkdir(parents=True)
    (names / "runtime").symlink_to(RUNTIME)
    found = {}
    for module in IN_A_TICK:
        target = folder / f"{module}.c"
        subprocess.run(
            [
                sys.executable, "-m", "cython", "-3", "-I", str(names.parent), "--module-name",
                f"chatvla_edge.runtime.{module}", "-X", "boundscheck=False,wraparound=False,cdivision=True,"
                "initializedcheck=False", "-o", str(target), str(RUNTIME / f"{module}.pyx"),
            ],
            check=True,
            capture_output=True,
        )  # fmt: skip
        found[module] = target.read_text()
    return found


def body_of(source, name):
    """The text of the C function made of the method ``name``, without comments."""
    found = re.search(rf"^static [^\n;]*__pyx_f_\w+_{name}\([^;{{]*\) {{\n(.*?)^}}", source, re.S | re.M)
    assert found, f"no C function for {name}"
    return re.sub(r"/\*.*?\*/", "", found.group(1), flags=re.S)


@pytest.mark.parametrize(("module", "name"), [(m, name) for m, names in IN_A_TICK.items() for name in names])
def test_a_tick_calls_nothing_of_python(generated, module, name):
    body = body_of(generated[module], name)
    called = set(re.findall(r"\b(_?_?Py\w+|__Pyx_\w+|malloc|calloc|realloc|free)\s*\(", body))
    # Inlined division helpers are plain arithmetic.
    assert not {call for call in called if not call.startswith("__Pyx_div")}
