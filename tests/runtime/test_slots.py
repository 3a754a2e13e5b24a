"""Slots and rings within one process and at the exact instants at which a writer may die."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatvla_edge.runtime import segments
from chatvla_edge.runtime.realtime import now_ns
from chatvla_edge.runtime.slots import Ring, Slot, SlotBusyError

FRAME = (480, 640, 3)
FRAME_BYTES = 480 * 640 * 3


def pair(nbytes: int, cells: int = 3) -> tuple[Slot, Slot]:
    reader = Slot.create("camera top", nbytes, cells)
    return reader, Slot.attach(reader.fd, nbytes, write=True, cells=cells)


def word(value: int) -> bytes:
    return value.to_bytes(8, "little")


def guard_at(number: int, cells: int, nbytes: int) -> int:
    """Offset in the segment of the guard of publication `number`: header, line of `latest`, then the cells."""
    return 128 + (number % cells) * -(-(3 + -(-nbytes // 8)) // 8) * 64


# ------------------------------------------------------------------------------------------------------------- slots


def test_a_slot_that_was_never_written_is_empty():
    reader, _ = pair(16)
    assert reader.read() is None
    assert reader.sequence == 0


def test_a_frame_arrives_whole_with_its_number_and_stamps():
    reader, writer = pair(FRAME_BYTES)
    frame = np.random.default_rng(4).integers(0, 256, FRAME, dtype=np.uint8)
    target = np.zeros_like(frame)
    before = now_ns()
    assert writer.publish(frame, captured_ns=before - 35_000_000) == 1
    found = reader.read_into(target)
    assert (target == frame).all()
    assert found is not None
    assert found.sequence == 1
    assert found.captured_ns == before - 35_000_000
    assert before <= found.published_ns <= now_ns()


def test_the_capture_stamp_defaults_to_the_time_of_publication():
    reader, writer = pair(8)
    writer.publish(bytes(8))
    found = reader.read()
    assert found is not None
    assert found[1].captured_ns == found[1].published_ns


@pytest.mark.parametrize("nbytes", [1, 7, 8, 9, 112, 4097])
@pytest.mark.parametrize("shift", [0, 1, 5])
def test_records_of_any_size_and_alignment_keep_every_byte(nbytes, shift):
    reader, writer = pair(nbytes)
    padded = np.random.default_rng(nbytes).integers(1, 256, nbytes + 2 * shift + 8, dtype=np.uint8)
    target = np.zeros_like(padded)
    for _ in range(4):
        padded = np.roll(padded, 1)
        writer.publish(padded[shift : shift + nbytes])
        reader.read_into(target[shift : shift + nbytes])
        assert (target[shift : shift + nbytes] == padded[shift : shift + nbytes]).all()
    # Nothing beside the target is touched.
    assert not target[:shift].any()
    assert not target[shift + nbytes :].any()


@settings(deadline=None)  # a shared machine stalls for longer than any example takes
@given(st.lists(st.booleans(), max_size=60), st.integers(2, 5))
def test_a_reader_always_sees_the_newest_value(steps, cells):
    reader, writer = pair(8, cells)
    written = 0
    for write in steps:
        if write:
            written += 1
            assert writer.publish(word(written * 7)) == written
        found = reader.read()
        assert found == (None if written == 0 else (word(written * 7), found[1]))
        assert found is None or found[1].sequence == written


def test_a_restarted_writer_continues_the_sequence():
    reader, writer = pair(8)
    for value in (1, 2, 3, 4):
        writer.publish(word(value))
    del writer
    assert reader.read()[0] == word(4)
    assert Slot.attach(reader.fd, 8, write=True).publish(word(5)) == 5
    assert reader.read()[0] == word(5)


def test_a_writer_killed_in_mid_write_costs_neither_the_last_value_nor_a_number():
    reader, writer = pair(8)
    writer.publish(word(41))
    writer.publish(word(42))
    del writer
    os.pwrite(reader.fd, word(2 * 3 - 1), guard_at(3, 3, 8))  # died between the odd guard and the even one
    os.pwrite(reader.fd, word(666), guard_at(3, 3, 8) + 24)
    assert reader.read()[0] == word(42)
    writer = Slot.attach(reader.fd, 8, write=True)
    assert reader.read()[0] == word(42)
    assert writer.publish(word(43)) == 3
    assert reader.read()[0] == word(43)


def test_a_value_that_was_whole_when_its_writer_died_is_published_by_the_next_one():
    reader, writer = pair(8)
    writer.publish(word(41))
    del writer
    os.pwrite(reader.fd, word(42), guard_at(2, 3, 8) + 24)
    os.pwrite(reader.fd, word(2 * 2), guard_at(2, 3, 8))  # died between the even guard and `latest`
    assert reader.read()[0] == word(41)
    writer = Slot.attach(reader.fd, 8, write=True)
    assert reader.read()[0] == word(42)
    assert writer.publish(word(43)) == 3  # were 2 used twice, one guard would stand for two values


def test_a_reader_that_cannot_get_a_whole_value_is_told_so_and_does_not_hang():
    reader, writer = pair(8)
    writer.publish(word(1))
    os.pwrite(reader.fd, word(2 * 4 - 1), guard_at(1, 3, 8))  # as if the writer were a lap ahead, time after time
    with pytest.raises(SlotBusyError, match="camera top: no consistent value in 4 copies"):
        reader.read()


def test_sizes_that_differ_are_refused_with_both_named():
    reader, writer = pair(FRAME_BYTES)
    with pytest.raises(ValueError, match=r"camera top .*\(921600, 3, .*expected a slot of geometry \(100, 3,"):
        Slot.attach(reader.fd, 100)
    with pytest.raises(ValueError, match="expected a slot of geometry"):
        Slot.attach(reader.fd, FRAME_BYTES, cells=4)
    with pytest.raises(ValueError, match=r"found a slot .* expected a ring"):
        Ring.attach(reader.fd, FRAME_BYTES, 3)
    with pytest.raises(ValueError, match="camera top: a buffer of 10 bytes; expected 921600"):
        writer.publish(bytes(10))
    with pytest.raises(ValueError, match="camera top: a buffer of 10 bytes; expected 921600"):
        reader.read_into(bytearray(10))
    with pytest.raises(BufferError):
        reader.read_into(bytes(FRAME_BYTES))
    with pytest.raises(ValueError, match="0 bytes; expected at least 1"):
        Slot.create("nothing", 0)
    with pytest.raises(ValueError, match="1 cells; expected at least 2"):
        Slot.create("one", 8, cells=1)


def test_a_reader_cannot_publish():
    reader, _ = pair(8)
    with pytest.raises(PermissionError, match="attached for reading"):
        reader.publish(bytes(8))


def test_a_second_writer_is_refused_with_the_pid_of_the_first():
    reader, writer = pair(8)
    with pytest.raises(BlockingIOError, match=rf"camera top has a writer already \(process {os.getpid()}\)"):
        Slot.attach(reader.fd, 8, write=True)
    # A reader that comes and goes in the writer's process does not take the lock with it.
    Slot.attach(reader.fd, 8)
    with pytest.raises(BlockingIOError):
        Slot.attach(reader.fd, 8, write=True)
    assert reader.writer_pid == writer.writer_pid == os.getpid()


WRITER = """
import sys
from chatvla_edge.runtime.slots import Slot
writer = Slot.attach(int(sys.argv[1]), 8, write=True)
writer.publish(bytes([9] * 8))
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_child_with_its_own_interpreter_writes_and_its_death_frees_the_slot():
    reader = Slot.create("camera top", 8)
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(reader.fd)],
        pass_fds=[reader.fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert child.stdout.readline() == b"ready\n"
        assert reader.read()[0] == bytes([9] * 8)
        with pytest.raises(BlockingIOError, match=f"process {child.pid}"):
            Slot.attach(reader.fd, 8, write=True)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert Slot.attach(reader.fd, 8, write=True).publish(bytes(8)) == 2


# ---------------------------------------------------------------------------------------------------------- segments


def test_a_segment_can_be_neither_shrunk_nor_grown_nor_unsealed():
    reader, _ = pair(8)
    for size in (0, 100, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(reader.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(reader.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_segments_have_no_name_in_the_file_system():
    before = set(Path("/dev/shm").iterdir())
    reader, _ = pair(8)
    assert set(Path("/dev/shm").iterdir()) == before
    assert str(Path(f"/proc/self/fd/{reader.fd}").readlink()).startswith("/memfd:chatvla-edge camera top")


def test_descriptors_are_not_inherited_unless_passed():
    reader, writer = pair(8)
    assert not os.get_inheritable(reader.fd)
    assert not os.get_inheritable(writer.fd)


def test_what_is_no_segment_is_refused_with_what_to_do(tmp_path):
    with (tmp_path / "file").open("w+b") as file, pytest.raises(OSError, match=r"no shared segment .*pass_fds"):
        Slot.attach(file.fileno(), 8)
    with pytest.raises(OSError, match="descriptor 987 is no shared segment"):
        Slot.attach(987, 8)
    fd = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    with pytest.raises(ValueError, match="can still shrink"):
        Slot.attach(fd, 8)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, segments.SEALS)
    with pytest.raises(ValueError, match="no segment of this layout"):
        Slot.attach(fd, 8)
    os.close(fd)


def test_nothing_is_leaked():
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(50):
        reader, writer = pair(8)
        with pytest.raises(ValueError, match="expected a slot"):
            Slot.attach(reader.fd, 9)
        with pytest.raises(BlockingIOError):
            Slot.attach(reader.fd, 8, write=True)
        del reader, writer
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# ------------------------------------------------------------------------------------------------------------- rings


@settings(deadline=None)  # a shared machine stalls for longer than any example takes
@given(
    st.integers(2, 9),
    st.lists(st.one_of(st.tuples(st.sampled_from(["write", "read", "last"]), st.integers(0, 12))), max_size=40),
    st.booleans(),
    st.integers(0, 12),
)
def test_a_ring_equals_a_plain_list_that_forgets(capacity, steps, from_oldest, written_before):
    ring = Ring.create("state", 8, capacity)
    writer = Ring.attach(ring.fd, 8, capacity, write=True)
    written: list[int] = []

    def append() -> None:
        written.append(len(written) * 31)
        assert writer.append(word(written[-1]), captured_ns=-len(written)) == len(written)

    for _ in range(written_before):
        append()
    reader = ring.reader(from_oldest)
    start = cursor = max(0, len(written) - capacity) if from_oldest else len(written)
    dropped = total = 0
    for step, count in steps:
        target = np.zeros(count, np.uint64)
        stamps = np.zeros((count, 3), np.int64)
        if step == "write":
            for _ in range(count):
                append()
        elif step == "read":
            got = reader.read(target, stamps)
            lost = max(0, len(written) - capacity - cursor)
            expected = written[cursor + lost :][:count]
            assert target[:got].tolist() == expected
            assert stamps[:got, 0].tolist() == list(range(cursor + lost + 1, cursor + lost + 1 + got))
            assert stamps[:got, 2].tolist() == (-stamps[:got, 0]).tolist()
            dropped, cursor, total = dropped + lost, cursor + lost + got, total + got
            assert (reader.cursor, reader.dropped) == (cursor, dropped)
            assert total + reader.dropped == reader.cursor - start
        else:
            got = ring.last(target, stamps)
            expected = written[-capacity:][-count:] if count else []
            assert target[count - got :].tolist() == expected
            assert stamps[count - got :, 0].tolist() == list(range(len(written) - got + 1, len(written) + 1))


def test_a_record_that_a_killed_writer_was_overwriting_is_counted_and_only_that_one():
    ring = Ring.create("state", 8, 4)
    writer = Ring.attach(ring.fd, 8, 4, write=True)
    reader = ring.reader()
    for value in range(1, 7):
        writer.append(word(value))
    del writer
    os.pwrite(ring.fd, word(2 * 7 - 1), guard_at(7, 4, 8))  # died on record 7, which lies where 3 lay
    target = np.zeros(4, np.uint64)
    assert ring.last(target) == 3
    assert target.tolist() == [0, 4, 5, 6]
    assert reader.read(target) == 3
    assert target.tolist()[:3] == [4, 5, 6]
    assert reader.dropped == 3
    assert Ring.attach(ring.fd, 8, 4, write=True).append(word(7)) == 7
    assert reader.read(target) == 1
    assert target[0] == 7
    assert reader.dropped == 3


def test_a_gap_never_lies_inside_a_batch():
    ring = Ring.create("state", 8, 4)
    writer = Ring.attach(ring.fd, 8, 4, write=True)
    reader = ring.reader()
    for value in range(1, 5):
        writer.append(word(value))
    os.pwrite(ring.fd, word(2 * 7 - 1), guard_at(3, 4, 8))  # 3 is being overwritten, 1 and 2 are not
    target = np.zeros(4, np.uint64)
    assert reader.read(target) == 2
    assert (target[:2].tolist(), reader.dropped) == ([1, 2], 0)
    assert reader.read(target) == 1
    assert (target[0], reader.dropped, reader.cursor) == (4, 1, 4)


def test_ring_targets_hold_whole_records_and_stamps_fit_them():
    ring = Ring.create("state", 8, 4)
    with pytest.raises(ValueError, match="state: a target of 12 bytes; expected whole records of 8 bytes"):
        ring.last(bytearray(12))
    with pytest.raises(ValueError, match=r"stamps of shape \(2, 3\); expected \(1, 3\)"):
        ring.reader().read(bytearray(8), np.zeros((2, 3), np.int64))
    with pytest.raises(PermissionError):
        ring.append(bytes(8))


# ------------------------------------------------------------------------------------- real processes, random instants


def test_writers_killed_at_random_instants_tear_nothing_and_lose_nothing(tmp_path):
    script = Path(__file__).with_name("torture_slots.py")
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, script, "--rounds", "150", "--json", str(tmp_path / "tally.json")],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout, f"{time.monotonic() - began:.1f} s")
    # The kills have to land where it hurts, or the test proves nothing.
    assert "killed_in_mid_write 0," not in done.stdout.splitlines()[1]
