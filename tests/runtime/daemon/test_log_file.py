"""The log: what is written is read, and a file that ends anywhere is read up to there."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatvla_edge.runtime.daemon import log_file, ros
from chatvla_edge.runtime.daemon.log_file import Channel, LogWriter, dtype_from_json, dtype_to_json
from chatvla_edge.runtime.servo_records import STATE, telemetry

ROW = telemetry(3, 2)


def write(folder, ticks=100, batch=10, **settings):
    log = LogWriter(folder, {"rig": "{}"}, **settings)
    log.declare(Channel.rows("/ticks", ROW))
    log.declare(Channel.json("/events"))
    log.declare(log_file.image_channel("/camera/top"))
    log.reopen()
    for first in range(0, ticks, batch):
        rows = np.zeros(batch, ROW)
        rows["tick"] = np.arange(first, first + batch)
        rows["raw"] = rows["tick"][:, None]
        log.write("/ticks", rows.tobytes(), 1000 + first, first)
        log.write_json("/events", {"first": first}, 1000 + first)
        log.write("/camera/top", ros.compressed_image(first, "top", b"jpeg" * first), 1000 + first)
        log.flush()
        if log.full:
            log.reopen()
    return log


def test_what_is_written_is_read(tmp_path):
    write(tmp_path).close()
    rows = log_file.rows(tmp_path, "/ticks")
    assert rows.dtype == ROW
    assert rows["tick"].tolist() == list(range(100))
    assert (rows["raw"] == rows["tick"][:, None]).all()
    events = [message.json()["first"] for message in log_file.messages(tmp_path, ("/events",))]
    assert events == list(range(0, 100, 10))
    pictures = [ros.image_data(message.data) for message in log_file.messages(tmp_path, ("/camera/top",))]
    assert pictures == [b"jpeg" * first for first in range(0, 100, 10)]
    assert log_file.metadata(tmp_path)["rig"] == "{}"


def test_times_come_back_as_host_times(tmp_path):
    write(tmp_path).close()
    assert [m.host_ns for m in log_file.messages(tmp_path, ("/events",))] == [1000 + n for n in range(0, 100, 10)]


def test_a_log_goes_on_in_the_next_file_and_is_read_as_one(tmp_path):
    log = write(tmp_path, ticks=2000, rotate_bytes=20_000)
    log.close()
    assert len(log_file.files(tmp_path)) > 3
    assert log_file.rows(tmp_path, "/ticks")["tick"].tolist() == list(range(2000))
    assert log.size == sum(path.stat().st_size for path in log_file.files(tmp_path))


def test_an_old_file_is_never_overwritten(tmp_path):
    write(tmp_path).close()
    write(tmp_path).close()
    assert len(log_file.files(tmp_path)) == 2
    assert len(log_file.rows(tmp_path, "/ticks")) == 200


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    log = write(folder)
    log._file.flush()  # as SIGKILL leaves it: no index, no end
    return (folder / "log-0000.mcap").read_bytes()


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1))
def test_a_file_that_ends_anywhere_is_read_up_to_there(whole, tmp_path_factory, share):
    folder = tmp_path_factory.mktemp("cut")
    (folder / "log-0000.mcap").write_bytes(whole[: int(share * len(whole))])
    ticks = log_file.rows(folder, "/ticks")
    found = ticks["tick"].tolist() if len(ticks) else []
    assert found == list(range(len(found)))


def test_a_killed_writer_loses_nothing_that_was_flushed(whole, tmp_path):
    (tmp_path / "log-0000.mcap").write_bytes(whole)
    assert len(log_file.rows(tmp_path, "/ticks")) == 100


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 10**9), value=st.integers(0, 255))
def test_a_damaged_file_never_crashes_the_reader(whole, tmp_path_factory, place, value):
    folder = tmp_path_factory.mktemp("damaged")
    data = bytearray(whole)
    data[place % len(data)] = value
    (folder / "log-0000.mcap").write_bytes(data)
    for message in log_file.messages(folder, ("/ticks",)):
        assert message.topic == "/ticks"


def test_no_log_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"found no log-\*\.mcap"):
        log_file.files(tmp_path)
    (tmp_path / "log-0000.mcap").write_bytes(b"something else")
    with pytest.raises(ValueError, match="no metadata record"):
        log_file.metadata(tmp_path)


@pytest.mark.parametrize("dtype", [ROW, STATE, np.dtype([("a", "<f4"), ("b", "<i8", (2, 3))])])
def test_a_dtype_goes_through_json(dtype):
    assert dtype_from_json(dtype_to_json(dtype)) == dtype


@pytest.mark.parametrize("text", [b'[["a", "O"]]', b'[["a", "M8[ns]"]]', b'[[1, "<f8"]]'])
def test_a_schema_that_is_no_dtype_of_numbers_is_refused(text):
    with pytest.raises(ValueError, match="expected"):
        dtype_from_json(text)


# ------------------------------------------------------------------------------------------------------------------ CDR


def test_a_picture_is_laid_out_as_ros_lays_it_out():
    message = ros.compressed_image(3_000_000_005, "top", b"\xff\xd8abc")
    expected = b"\x00\x01\x00\x00" + struct.pack("<iI", 3, 5) + struct.pack("<I", 4) + b"top\0"
    expected += struct.pack("<I", 5) + b"jpeg\0" + b"\0\0\0" + struct.pack("<I", 5) + b"\xff\xd8abc"
    assert message == expected
    assert ros.image_data(message) == b"\xff\xd8abc"


def test_joints_are_laid_out_as_ros_lays_them_out():
    message = ros.joint_state(1, "", ["a", "bcd"], [1.5, -2.0], [0.25])
    body = struct.pack("<iI", 0, 1) + struct.pack("<I", 1) + b"\0" + b"\0\0\0"
    body += struct.pack("<I", 2) + struct.pack("<I", 2) + b"a\0" + b"\0\0" + struct.pack("<I", 4) + b"bcd\0"
    body += struct.pack("<I", 2)
    body += bytes(-len(body) % 8) + struct.pack("<2d", 1.5, -2.0)
    body += struct.pack("<I", 1) + bytes(-(len(body) + 4) % 8) + struct.pack("<d", 0.25)
    body += struct.pack("<I", 0)
    assert message == b"\x00\x01\x00\x00" + body


@given(frame=st.text(max_size=9), data=st.binary(max_size=50))
def test_any_picture_comes_out_again(frame, data):
    assert ros.image_data(ros.compressed_image(7, frame, data)) == data


@given(cut=st.integers(0, 60))
def test_a_picture_cut_short_is_refused(cut):
    message = ros.compressed_image(7, "camera", b"0123456789")
    if cut < len(message):
        with pytest.raises(ValueError, match="expected"):
            ros.image_data(message[:cut])
