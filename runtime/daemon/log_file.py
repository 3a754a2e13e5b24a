"""A session's log: MCAP files in its folder, one after another, each whole in itself.

Channels
    /ticks            rows of the servo's telemetry, every tick, many rows in a message
    /state/ARM        rows of an arm's states with their stamps, likewise
    /camera/NAME      sensor_msgs/CompressedImage; /camera/NAME/frame: JSON with its stamps and numbers
    /joints/sent, /joints/measured   sensor_msgs/JointState, thinned out, for viewers
    /policy           JSON: each query, what it saw, said and cost, and its chunk
    /events           JSON: the arbiter's lines, starts and ends of processes
    /gaps             JSON: ticks that are not in the log, from which to which, and why

A message of rows is raw little-endian records; the channel's schema is the numpy dtype as JSON. `log_time` is wall time
in ns; host time is `log_time - clock_offset_ns` of the metadata record `session`, which also holds the rig.
"""

import json
import os
import struct
import time
from collections.abc import Container, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from mcap import records
from mcap.exceptions import McapError
from mcap.stream_reader import StreamReader
from mcap.writer import CompressionType, Writer

from chatvla_edge.runtime.daemon import ros

ROWS = "x-numpy-rows"
STAMPS = [("sequence", "<i8"), ("published_ns", "<i8"), ("captured_ns", "<i8")]


def dtype_to_json(dtype: np.dtype[Any]) -> bytes:
    """A structured dtype as the schema of a channel."""
    return json.dumps(dtype.descr).encode()


def dtype_from_json(data: bytes) -> np.dtype[Any]:
    """The way back. Raises ValueError for what is no dtype of plain numbers."""
    fields = []
    for entry in json.loads(data):
        name, code, *shape = entry
        if not isinstance(name, str) or not isinstance(code, str) or np.dtype(code).kind not in "iufbS":
            raise ValueError(f"expected [name, number code, shape], found {entry!r}")
        fields.append((name, code, *[tuple(int(side) for side in sides) for sides in shape]))
    return np.dtype(fields)


@dataclass(frozen=True)
class Channel:
    """What a channel holds."""

    topic: str
    encoding: str  # of its messages: ROWS, json or cdr
    schema: str
    schema_encoding: str
    schema_data: bytes

    @classmethod
    def rows(cls, topic: str, dtype: np.dtype[Any]) -> "Channel":
        """Raw records."""
        return cls(topic, ROWS, "chatvla_edge." + topic.strip("/").split("/")[0], ROWS, dtype_to_json(dtype))

    @classmethod
    def json(cls, topic: str) -> "Channel":
        """One JSON object per message."""
        schema = b'{"type": "object"}'
        return cls(topic, "json", "chatvla_edge." + topic.strip("/").split("/")[-1], "jsonschema", schema)

    @classmethod
    def ros(cls, topic: str, schema: str, text: str) -> "Channel":
        """A ROS 2 message."""
        return cls(topic, "cdr", schema, "ros2msg", text.encode())


def image_channel(topic: str) -> Channel:
    """Pictures."""
    return Channel.ros(topic, "sensor_msgs/msg/CompressedImage", ros.COMPRESSED_IMAGE)


def joint_channel(topic: str) -> Channel:
    """Joints."""
    return Channel.ros(topic, "sensor_msgs/msg/JointState", ros.JOINT_STATE)


class LogWriter:
    """Writes the files of one session. After an OSError (a full disk) `reopen` begins the next file.

    ``rotate_bytes``: a file that has become larger is followed by the next.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, str], rotate_bytes: int = 2**30) -> None:
        self.folder = folder
        self.metadata = dict(metadata)
        self.rotate_bytes = rotate_bytes
        self.number = 0
        self.bytes_before = 0
        self.offset_ns = time.time_ns() - time.monotonic_ns()
        self._channels: dict[str, Channel] = {}
        self._ids: dict[str, int] = {}
        self._file: IO[bytes] | None = None
        self._writer: Writer | None = None

    @property
    def size(self) -> int:
        """Bytes written to all files of this session."""
        return self.bytes_before + (self._file.tell() if self._file is not None else 0)

    def declare(self, channel: Channel) -> None:
        """A channel that will be written to, in every file."""
        self._channels[channel.topic] = channel

    def reopen(self) -> Path:
        """End the file there is and begin the next. Raises OSError."""
        self.close()
        path = self.folder / f"log-{self.number:04d}.mcap"
        while path.exists():
            self.number += 1
            path = self.folder / f"log-{self.number:04d}.mcap"
        self._file = path.open("wb")
        # Small chunks, flushed by `flush`: what is not in a finished chunk is lost when the process is killed.
        self._writer = Writer(self._file, chunk_size=2**22, compression=CompressionType.LZ4)
        self._writer.start(profile="", library="chatvla-edge")
        values = {**self.metadata, "clock_offset_ns": str(self.offset_ns), "file": str(self.number)}
        self._writer.add_metadata("session", values)
        self._ids = {}
        for channel in self._channels.values():
            schema = self._writer.register_schema(channel.schema, channel.schema_encoding, channel.schema_data)
            self._ids[channel.topic] = self._writer.register_channel(channel.topic, channel.encoding, schema)
        self.flush()
        return path

    def write(self, topic: str, data: bytes, host_ns: int, sequence: int = 0) -> None:
        """One message at a host time. Raises OSError."""
        assert self._writer is not None
        at = host_ns + self.offset_ns
        self._writer.add_message(self._ids[topic], at, data, at, sequence & 0xFFFFFFFF)

    def write_json(self, topic: str, values: Mapping[str, Any], host_ns: int, sequence: int = 0) -> None:
        """One JSON message. Raises OSError."""
        self.write(topic, json.dumps(values, separators=(",", ":")).encode(), host_ns, sequence)

    def flush(self, to_disk: bool = False) -> None:
        """Hand everything to the kernel, where it outlives this process; ``to_disk``: a power cut, too. OSError."""
        assert self._writer is not None
        assert self._file is not None
        self._writer.flush()  # type: ignore[no-untyped-call]
        self._file.flush()
        if to_disk:
            os.fdatasync(self._file.fileno())

    @property
    def full(self) -> bool:
        """Whether it is time for the next file."""
        return self._file is not None and self._file.tell() > self.rotate_bytes

    def close(self) -> None:
        """End the file with its index. A file that cannot be ended stays readable up to its last flush."""
        writer, file = self._writer, self._file
        self._writer = self._file = None
        if writer is None or file is None:
            return
        try:
            writer.finish()  # type: ignore[no-untyped-call]
            self.bytes_before += file.tell()
            file.close()
        except OSError:
            # What Python still holds cannot be written; closing the descriptor below it says so once and for all.
            self.bytes_before += os.fstat(file.fileno()).st_size
            with suppress(OSError):
                file.close()
        self.number += 1


@dataclass(frozen=True)
class Message:
    """One message of a log. ``host_ns``: host time of the recording machine."""

    topic: str
    host_ns: int
    sequence: int
    encoding: str
    schema: bytes
    data: bytes

    def rows(self) -> np.ndarray[Any, np.dtype[Any]]:
        """The records of a message of rows."""
        return np.frombuffer(self.data, dtype_from_json(self.schema))

    def json(self) -> Any:
        """The object of a JSON message."""
        return json.loads(self.data)


def files(session: Path) -> list[Path]:
    """The log files of a session's folder, or the one file itself, in order. Raises ValueError where there is none."""
    found = sorted(session.glob("log-*.mcap")) if session.is_dir() else [session]
    if not found or not all(path.is_file() for path in found):
        raise ValueError(f"{session}: found no log-*.mcap, expected a session's folder or an .mcap file")
    return found


def _records(path: Path) -> Iterator[Any]:
    """The records of a file; of one whose writer was killed, those before its end."""
    with path.open("rb") as file:
        try:
            # A record larger than a chunk can be is damage, and would be a gigabyte of it.
            yield from StreamReader(file, validate_crcs=True, record_size_limit=2**28).records
        except (McapError, EOFError, ValueError, KeyError, struct.error, RuntimeError, OverflowError, MemoryError):
            return


def metadata(session: Path) -> dict[str, str]:
    """What the first file says of the session. Raises ValueError where it says nothing."""
    path = files(session)[0]
    for record in _records(path):
        if isinstance(record, records.Metadata) and record.name == "session":
            return dict(record.metadata)
    raise ValueError(f"{path}: found no metadata record `session`, expected a log of `chatvla-edge run`")


def messages(session: Path, topics: Container[str] | None = None) -> Iterator[Message]:
    """All messages of a session in the order of writing, those of one topic in the order of time."""
    for path in files(session):
        offset = 0
        schemas: dict[int, bytes] = {}
        channels: dict[int, records.Channel] = {}
        for record in _records(path):
            if isinstance(record, records.Metadata) and record.name == "session":
                try:
                    offset = int(record.metadata["clock_offset_ns"])
                except (KeyError, ValueError):
                    break  # damage: without it no message has a time
            elif isinstance(record, records.Schema):
                schemas[record.id] = record.data
            elif isinstance(record, records.Channel):
                channels[record.id] = record
            elif isinstance(record, records.Message):
                if (channel := channels.get(record.channel_id)) is None:
                    break
                if topics is None or channel.topic in topics:
                    schema = schemas.get(channel.schema_id, b"")
                    at = record.log_time - offset
                    yield Message(channel.topic, at, record.sequence, channel.message_encoding, schema, record.data)


def rows(session: Path, topic: str) -> np.ndarray[Any, np.dtype[Any]]:
    """All rows of a topic, one array; empty, without fields, where there are none."""
    parts = [message.rows() for message in messages(session, (topic,))]
    return np.concatenate(parts) if parts else np.zeros(0)
