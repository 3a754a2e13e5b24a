"""An export that was interrupted goes on where it stopped, and ends in the same bytes as one that was not."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chatvla_edge.export.checkpoint.reader import open_checkpoint
from chatvla_edge.export.checkpoint.synth import PRESETS, synthesize
from chatvla_edge.export.exporter import Settings, export
from chatvla_edge.export.robots import load
from chatvla_edge.runtime.bundle import open_bundle

ROBOT = load("arx_r5_bimanual")
INT8 = Settings(target="cpu", precision="int8", robot=ROBOT, max_reasoning=4, probes=1)
# What keys hold does not depend on the gates, and without them an export takes no time.
BARE = replace(INT8, gates=False)
STEPS = ["vision_18x22", "language", "condition", "denoise", "probes/0.npz"]
COMMAND = "import sys; from chatvla_edge.runtime.cli import main; main()"

# A process that exports and kills itself at its n-th call of the file system, n given, or prints how many there were.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from chatvla_edge.export import exporter
from chatvla_edge.export.checkpoint.reader import open_checkpoint
from chatvla_edge.export.robots import load
from chatvla_edge.runtime.bundle import ResumableWriter  # everything is imported before a call is counted

torch.set_num_threads(1)
checkpoint, destination, instants = Path(sys.argv[1]), Path(sys.argv[2]), [int(item) for item in sys.argv[3:]]
settings = exporter.Settings("cpu", "int8", load("arx_r5_bimanual"), max_reasoning=4, probes=1)
opened = open_checkpoint(checkpoint)
real = {name: getattr(os, name) for name in ("fsync", "replace", "mkdir", "rename", "chmod", "unlink")}

def one(limit, place):
    done = 0
    def counted(original):
        def call(*arguments, **named):
            nonlocal done
            done += 1
            if done == limit:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **named)
        return call
    for name, original in real.items():
        setattr(os, name, counted(original))
    exporter.export(opened, place, settings, lambda name, count: None)
    return done

for number, limit in enumerate(instants or [0]):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, str(one(limit, destination / str(number) / "b")).encode())
        finally:
            os._exit(0)
    os.close(write)
    _, status = os.waitpid(child, 0)
    print(os.read(read, 100).decode() or -os.WTERMSIG(status), flush=True)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "c"
    spec, layout, _ = PRESETS["tiny"]
    synthesize(directory, spec, layout)
    return open_checkpoint(directory)


def finish(checkpoint, destination, settings=INT8):
    """Export; returns the bundle and the steps that were taken over."""
    said: list[str] = []
    bundle = export(checkpoint, destination, settings, lambda _name, _count: None, said.append)
    return bundle, [line.partition(":")[0] for line in said if "finished earlier" in line]


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    return finish(checkpoint, tmp_path_factory.mktemp("whole") / "b")[0]


def digests(bundle):
    return {name: file.sha256 for name, file in bundle.manifest.files.items()}


def stop_at(name, monkeypatch):
    """Let the next export be interrupted when it begins this step."""
    from chatvla_edge.runtime.bundle import ResumableWriter

    real = ResumableWriter.step

    def step(self, step_name, key):
        if step_name == name:
            raise KeyboardInterrupt
        return real(self, step_name, key)

    monkeypatch.setattr(ResumableWriter, "step", step)


def interrupted(checkpoint, destination, name, settings=INT8):
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        stop_at(name, patch)
        with pytest.raises(KeyboardInterrupt):
            export(checkpoint, destination, settings, lambda _name, _count: None, said.append)
    return said


@pytest.mark.parametrize("at", [STEPS[0], STEPS[2], STEPS[-1]])
def test_steps_that_were_finished_are_not_made_again(checkpoint, whole, tmp_path, at):
    said = interrupted(checkpoint, tmp_path / "b", at)
    before = STEPS[: STEPS.index(at)]
    if before:
        assert f"stopped: {', '.join(before)} (" in said[-1]
        assert "the same call goes on from there" in said[-1]
    else:
        assert said[-1].endswith("nothing is kept")
        assert not list(tmp_path.iterdir())
    bundle, taken = finish(checkpoint, tmp_path / "b")
    assert taken == before
    assert bundle.seal == whole.seal
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def changed(checkpoint, tmp_path):
    """The same checkpoint but for one bit of one weight, under the same path, size and times."""
    directory = tmp_path / "c"
    spec, layout, _ = PRESETS["tiny"]
    synthesize(directory, spec, layout)
    (file,) = directory.glob("*.safetensors")
    status = file.stat()
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    return open_checkpoint(directory)


STALE = {
    "checkpoint": lambda checkpoint, tmp_path: (changed(checkpoint, tmp_path), BARE, []),
    "precision": lambda checkpoint, _: (checkpoint, replace(BARE, precision="int4"), []),
    "robot": lambda checkpoint, _: (
        checkpoint,
        replace(BARE, robot=ROBOT.model_copy(update={"timing": ROBOT.timing.model_copy(update={"rate_hz": 25})})),
        [],
    ),
    "max_reasoning": lambda checkpoint, _: (
        checkpoint,
        replace(BARE, max_reasoning=40),  # a longer cache is another language graph; the others hold no cache
        ["vision_18x22", "condition"],
    ),
}


@pytest.mark.parametrize("what", STALE)
def test_nothing_stale_is_taken_over(checkpoint, tmp_path, what):
    interrupted(checkpoint, tmp_path / "b", "denoise", BARE)
    (tmp_path / "other").mkdir()
    other, settings, expected = STALE[what](checkpoint, tmp_path / "other")
    bundle, taken = finish(other, tmp_path / "b", settings)
    assert taken == expected
    again, _ = finish(other, tmp_path / "fresh", settings)
    assert bundle.seal == again.seal


@pytest.mark.parametrize("what", ["tools", "source_digest"])
def test_another_version_of_the_tools_or_of_this_code_takes_nothing_over(checkpoint, tmp_path, what, monkeypatch):
    interrupted(checkpoint, tmp_path / "b", "denoise", BARE)
    from chatvla_edge.export import identity

    real = getattr(identity, what)
    monkeypatch.setattr(identity, what, lambda: {**real(), "numpy": "9"} if what == "tools" else "another")
    assert finish(checkpoint, tmp_path / "b", BARE)[1] == []


def test_a_checkpoint_that_changes_under_the_export_is_refused(tmp_path, monkeypatch):
    spec, layout, _ = PRESETS["tiny"]
    synthesize(tmp_path / "c", spec, layout)
    (file,) = (tmp_path / "c").glob("*.safetensors")

    def touch(name, _count):
        if name == "language":
            os.utime(file)

    with pytest.raises(ValueError, match="changed while it was exported"):
        export(open_checkpoint(tmp_path / "c"), tmp_path / "b", BARE, touch)


@pytest.mark.slow
def test_killed_at_any_instant_it_goes_on_to_the_same_bytes(checkpoint, whole, tmp_path):
    def run(place: Path, *instants: int) -> list[int]:
        call = [sys.executable, "-c", KILLED, checkpoint.path, place, *instants]
        for number in range(max(1, len(instants))):
            (place / str(number)).mkdir(parents=True)
        out = subprocess.run(list(map(str, call)), capture_output=True, text=True, check=True, timeout=300)
        return [int(line) for line in out.stdout.split()]

    (calls,) = run(tmp_path / "count")
    instants = [1 + calls * part // 4 for part in range(4)] + [calls]
    assert run(tmp_path / "killed", *instants) == [-signal.SIGKILL] * len(instants)
    most = 0
    for number in range(len(instants)):
        place = tmp_path / "killed" / str(number)
        for left in place.iterdir():
            if left.name != "b":  # the last kill falls behind the rename
                with pytest.raises(ValueError, match="did not finish"):
                    open_bundle(left)
        if not (place / "b").exists():
            _, taken = finish(checkpoint, place / "b")
            most = max(most, len(taken))
        with open_bundle(place / "b") as bundle:
            assert digests(bundle) == digests(whole)
            assert bundle.seal == whole.seal
        assert [path.name for path in place.iterdir()] == ["b"]
    assert most == len(STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_command_killed_or_interrupted_goes_on_when_it_is_called_again(checkpoint, tmp_path, how):
    arguments = ["export", checkpoint.path, "-o", tmp_path / "b", "--robot", "arx_r5_bimanual", "--probes", "1"]
    call = [sys.executable, "-c", COMMAND, *map(str, arguments), "--max-reasoning", "24"]
    settings = replace(INT8, max_reasoning=24)
    ledger = tmp_path / ".b.work.partial/.ledger.json"
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as first:
        while not (ledger.is_file() and "language" in ledger.read_text()) and first.poll() is None:
            time.sleep(0.002)
        first.send_signal(signal.SIGSTOP)
        while not (tmp_path / "b").exists() and "T" not in Path(f"/proc/{first.pid}/stat").read_text().split()[2]:
            time.sleep(0.002)
        if not (tmp_path / "b").exists():
            with pytest.raises(ValueError, match="another export that is writing there"):
                finish(checkpoint, tmp_path / "b", settings)
        first.send_signal(how)
        first.send_signal(signal.SIGCONT)
        said = first.stdout.read()
    if (tmp_path / "b").exists():
        pytest.skip("the export was done before the signal came")
    assert first.returncode == (-how if how == signal.SIGKILL else 130), said
    if how == signal.SIGINT:
        assert said.count("stopped: vision_18x22, language") == 1, said
        assert "Traceback" not in said
    _, taken = finish(checkpoint, tmp_path / "b", settings)
    assert taken[:2] == STEPS[:2]
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_the_digest_of_a_checkpoint_sees_every_byte_and_no_layout(checkpoint, tmp_path):
    from chatvla_edge.export.checkpoint.names import Layout
    from chatvla_edge.export.identity import checkpoint_digest

    spec, layout, _ = PRESETS["tiny"]
    assert layout != Layout()
    synthesize(tmp_path / "other", spec, Layout())
    expected = checkpoint_digest(checkpoint)
    assert checkpoint_digest(open_checkpoint(tmp_path / "other")) == expected
    assert checkpoint_digest(changed(checkpoint, tmp_path)) != expected
    synthesize(tmp_path / "fp32", spec, layout, dtype=torch.float32)
    assert checkpoint_digest(open_checkpoint(tmp_path / "fp32")) != expected
