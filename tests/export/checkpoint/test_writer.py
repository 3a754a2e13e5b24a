"""The streaming writer: what it writes loads everywhere, what it does not finish loads nowhere."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from chatvla_edge.export.checkpoint.tensors import CheckpointError, from_tensors, open_tensors
from chatvla_edge.export.checkpoint.writer import PlannedTensor, SafetensorsWriter, plan_of


def write(directory, weights, **options):
    with SafetensorsWriter(directory, plan_of(from_tensors(weights)), **options) as writer:
        for name, tensor in weights.items():
            writer.write(name, tensor)


def test_a_single_file_is_read_by_the_formats_own_library(tmp_path, weights):
    write(tmp_path, weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert set(loaded) == set(weights)
    for name, tensor in weights.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_shards_and_their_index_follow_the_public_layout(tmp_path, weights):
    write(tmp_path, weights, max_shard_bytes=60)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    loaded = {name: tensor for shard in shards for name, tensor in load_file(tmp_path / shard).items()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    source = open_tensors(tmp_path)
    assert source.names == tuple(weights)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in weights.items())


def test_the_files_say_which_framework_they_are_for(tmp_path):
    write(tmp_path, {"w": torch.ones(1)})
    data = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}


def test_a_tensor_larger_than_a_shard_has_one_to_itself(tmp_path):
    weights = {"a": torch.ones(1), "b": torch.ones(100), "c": torch.ones(1)}
    write(tmp_path, weights, max_shard_bytes=8)
    table = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(table.values())) == 3


def test_tensors_may_come_in_any_order_and_in_row_blocks(tmp_path):
    matrix, vector = torch.randn(10, 3), torch.randn(4).bfloat16()
    plan = [PlannedTensor("m", (10, 3), torch.float32), PlannedTensor("v", (4,), torch.bfloat16)]
    with SafetensorsWriter(tmp_path, plan) as writer:
        writer.write("v", vector)
        writer.write_rows("m", (block for block in matrix.split(4)))
    loaded = load_file(tmp_path / "model.safetensors")
    assert torch.equal(loaded["m"], matrix)
    assert torch.equal(loaded["v"], vector)


def test_progress_counts_every_byte_once(tmp_path, weights):
    counts = []
    write(tmp_path, weights, progress=counts.append)
    assert sum(counts) == sum(tensor.nbytes for tensor in weights.values())


PLAN = [PlannedTensor("a", (4, 2), torch.float32), PlannedTensor("b", (2,), torch.bfloat16)]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (lambda w: w.write("a", torch.zeros(4, 2)), "'b': found 1 of 2 planned tensors never written"),
        (lambda w: w.write("c", torch.zeros(1)), "'c': found a tensor that was not planned"),
        (
            lambda w: [w.write("b", torch.zeros(2).bfloat16())] * 2 + [w.write("b", torch.zeros(2).bfloat16())],
            "a second",
        ),
        (lambda w: w.write("a", torch.zeros(8)), r"'a': found float32 \[8\]"),
        (lambda w: w.write("a", torch.zeros(4, 2).half()), r"'a': found float16 \[4, 2\]"),
        (lambda w: w.write_rows("a", [torch.zeros(3, 2)]), "'a': found 3 rows"),
        (lambda w: w.write_rows("a", [torch.zeros(3, 2)] * 2), "'a': found at least 6 rows"),
        (lambda w: w.write_rows("a", [torch.zeros(4, 3)]), "'a': found rows as"),
        (lambda w: w.write_rows("a", [torch.tensor(1.0)]), "'a': found rows as"),
    ],
)
def test_what_differs_from_the_plan_is_refused_and_leaves_nothing(tmp_path, steps, message):
    with pytest.raises(CheckpointError, match=message), SafetensorsWriter(tmp_path / "out", PLAN) as writer:
        steps(writer)
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([], "an empty plan"),
        ([PLAN[0], PLAN[0]], "'a': found a name planned twice"),
        ([PlannedTensor("__metadata__", (1,), torch.float32)], "'__metadata__'"),
        ([PlannedTensor("a", (1,), torch.complex64)], "dtype torch.complex64"),
    ],
)
def test_a_plan_that_cannot_be_written_is_refused(tmp_path, plan, message):
    with pytest.raises(CheckpointError, match=message):
        SafetensorsWriter(tmp_path, plan)


def test_existing_weights_are_never_overwritten(tmp_path, weights):
    write(tmp_path, {"w": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"found model\.safetensors; expected a directory without weights"):
        write(tmp_path, weights)
    assert torch.equal(open_tensors(tmp_path).read("w"), torch.ones(1))


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path):
    plan = [PlannedTensor("w", (1 << 50,), torch.float32)]
    with pytest.raises(CheckpointError, match="GB free"), SafetensorsWriter(tmp_path, plan):
        pass
    assert not any(tmp_path.iterdir())


def test_an_error_while_writing_leaves_nothing(tmp_path):
    def interrupted(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), SafetensorsWriter(tmp_path, PLAN, progress=interrupted) as writer:
        writer.write("a", torch.zeros(4, 2))
    assert not any(tmp_path.iterdir())


def test_an_error_while_starting_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"), SafetensorsWriter(tmp_path, PLAN):
        pass
    assert not any(tmp_path.iterdir())


KILLED = """
import sys, torch
from chatvla_edge.export.checkpoint.writer import PlannedTensor, SafetensorsWriter
plan = [PlannedTensor(str(k), (1000,), torch.float32) for k in range(4)]
with SafetensorsWriter(sys.argv[1], plan, max_shard_bytes=8000) as writer:
    writer.write("0", torch.zeros(1000))
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_killed_write_leaves_nothing_that_loads_and_does_not_hinder_the_next(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert all(path.name.endswith(".partial") for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="none of them weights"):
        open_tensors(tmp_path)
    write(tmp_path, {"w": torch.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


MEASURED = """
import resource, sys, torch
from chatvla_edge.export.checkpoint.tensors import open_tensors
from chatvla_edge.export.checkpoint.writer import PlannedTensor, SafetensorsWriter
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
block = torch.zeros(1024, 1024)
torch.aminmax(block)
before = peak()
plan = [PlannedTensor(f"t{k}", (10 * 1024, 1024), torch.float32) for k in range(5)]
with SafetensorsWriter(sys.argv[1], plan) as writer:
    for item in plan:
        writer.write_rows(item.name, (block for _ in range(10)))
written = peak()
source = open_tensors(sys.argv[1])
for name in source.names:
    source.read(name)
print(written - before, peak() - before)
"""


def test_200_mb_are_written_and_read_without_being_held_in_memory(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True, text=True, check=True, env=os.environ
    )
    written, read = map(int, result.stdout.split())
    assert (tmp_path / "model.safetensors").stat().st_size > 200_000_000
    assert written < 20  # MB; one block is 4 MB
    assert read < 60  # MB; one tensor is 42 MB
