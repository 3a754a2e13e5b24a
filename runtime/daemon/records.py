"""What the slow processes of a run say of themselves: fixed records, and JSON in records of fixed size."""

import json
from typing import Any

import numpy as np

# The policy process. Stamps: host time in ns, 0 for never.
POLICY = np.dtype(
    [
        ("ready", "<u8"),  # warmed up, and an instruction is there
        ("queries", "<u8"),  # answered
        ("errors", "<u8"),  # queries that failed
        ("waits", "<u8"),  # queries put off because frames were missing, old or too far apart
        ("chunk", "<u8"),  # sequence number of the newest chunk
        ("chunk_ns", "<i8"),  # when it was published
        ("begun_ns", "<i8"),  # of the query under way
        ("needed_ns", "<i8"),  # sync mode: since when a chunk is owed; otherwise 0
        ("query_ns", "<i8"),  # how long the last one took
        ("language_ns", "<i8"),
        ("passes", "<u8"),
        ("tokens", "<u8"),
    ]
)

# The recorder's process.
RECORDER = np.dtype(
    [
        ("bytes", "<u8"),  # in all files of the session
        ("ticks", "<u8"),  # logged
        ("ticks_lost", "<u8"),  # inside numbered gaps
        ("gaps", "<u8"),
        ("frames", "<u8"),
        ("frames_passed", "<u8"),  # published and not logged
        ("disk_full", "<u8"),
    ]
)

TEXT_BYTES = 4096  # of an instruction
REPORT_BYTES = 32768  # of one query's report
REPORTS = 64
EVENT_BYTES = 2048
EVENTS = 1024


def packed(values: Any, size: int) -> bytes:
    """JSON in exactly ``size`` bytes, padded with blanks. Raises ValueError where it does not fit."""
    text = json.dumps(values, separators=(",", ":")).encode()
    if len(text) > size:
        raise ValueError(f"found {len(text)} bytes of JSON, expected at most {size}")
    return text.ljust(size)


def unpacked(record: bytes | bytearray | memoryview) -> Any:
    """The values behind `packed`; None for a record of zeros."""
    text = bytes(record).strip(b" \0")
    return json.loads(text) if text else None
