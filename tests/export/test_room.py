"""An export that this machine cannot finish is refused before it begins, with the figures."""

import platform
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest

from chatvla_edge.export import room
from chatvla_edge.export.checkpoint.reader import open_checkpoint
from chatvla_edge.export.checkpoint.synth import PRESETS, synthesize
from chatvla_edge.export.exporter import Settings, export, plan
from chatvla_edge.export.robots import load

INT8 = Settings(target="cpu", precision="int8", robot=load("arx_r5_bimanual"), max_reasoning=4, probes=1)
Disk = namedtuple("Disk", "total used free")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "c"
    spec, layout, _ = PRESETS["tiny"]
    synthesize(directory, spec, layout)
    return open_checkpoint(directory)


def refused(checkpoint, place):
    told: list[str] = []
    with pytest.raises(ValueError, match="found") as error:
        export(checkpoint, place / "b", INT8, lambda name, _count: told.append(name))
    assert not told
    assert not list(place.iterdir())
    return str(error.value)


def test_too_little_memory_is_said_before_a_byte_is_read(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "available_memory", lambda: 1 << 20)
    monkeypatch.setattr(room, "_resident", lambda: 0)
    said = refused(checkpoint, tmp_path)
    assert "found 0.0 GB of memory for this export" in said
    assert "export on another machine" in said


def test_memory_for_writing_alone_is_worth_an_advice(checkpoint, tmp_path, monkeypatch):
    graphs = plan(checkpoint, INT8).graphs
    writing, judging = (room.memory(graphs, checkpoint, gates)[0] for gates in (False, True))
    assert writing < judging
    monkeypatch.setattr(room, "available_memory", lambda: writing)
    monkeypatch.setattr(room, "_resident", lambda: 0)
    assert "--no-gates" in refused(checkpoint, tmp_path)


def test_too_little_disk_is_said_and_what_is_kept_counts(checkpoint, tmp_path, monkeypatch):
    graphs = plan(checkpoint, INT8).graphs
    size = sum(graph.weight_bytes for graph in graphs) + room.EXTRA_DISK
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(size, 1, size - 1))
    assert " GB free, expected" in refused(checkpoint, tmp_path)
    room.require(graphs, checkpoint, True, tmp_path / "b", kept=1)


def test_a_table_is_not_packed_and_what_is_multiplied_is(checkpoint):
    language = next(graph for graph in plan(checkpoint, INT8).graphs if graph.name == "language")
    table = language.weights["backbone.language.embed_tokens.weight.stored"].nbytes
    packed = room.engine_bytes(language)
    assert packed <= language.weight_bytes - table
    assert packed >= sum(weight.nbytes for name, weight in language.weights.items() if name.endswith(".codes"))


def test_this_machine_says_how_much_it_has():
    found = room.available_memory()
    assert found is None or 1 << 20 < found < 1 << 50


HOLES = """
from chatvla_edge.export import room
del [bytearray(4 << 20)][0]  # from here on malloc keeps blocks of this size in its heap
before = room._resident()
# Blocks with something small between them: a heap of holes when they go.
pairs = [(bytearray(1 << 20), bytes(3000)) for _ in range(200)]
pins = [pin for _, pin in pairs]
held = room._resident() - before
del pairs
left = room._resident() - before
room.give_back()
print(held, left, room._resident() - before, len(pins))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_memory_that_engines_leave_behind_is_given_back():
    out = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    held, left, after, _ = map(int, out.stdout.split())
    assert held > 150 << 20
    assert left > 100 << 20, "or there is nothing to give back"
    assert after < 50 << 20
