"""Two ROS 2 messages in CDR, so that a log opens in any viewer that knows ROS: pictures and joints.

Layout: little-endian CDR after a four-byte encapsulation header, each number aligned to its own size counted from
behind that header; a string is its length with the closing zero, its bytes, a zero (OMG CDR, as rosbag2 writes it).
"""

import struct
from collections.abc import Sequence

_HEADER = """
================================================================================
MSG: std_msgs/Header
builtin_interfaces/Time stamp
string frame_id
================================================================================
MSG: builtin_interfaces/Time
int32 sec
uint32 nanosec
"""

COMPRESSED_IMAGE = "std_msgs/Header header\nstring format\nuint8[] data" + _HEADER
JOINT_STATE = (
    "std_msgs/Header header\nstring[] name\nfloat64[] position\nfloat64[] velocity\nfloat64[] effort" + _HEADER
)


class _Cdr:
    def __init__(self) -> None:
        self.parts = bytearray(b"\x00\x01\x00\x00")

    def align(self, size: int) -> None:
        self.parts += bytes(-(len(self.parts) - 4) % size)

    def number(self, code: str, value: int) -> None:
        size = struct.calcsize(code)
        self.align(size)
        self.parts += struct.pack("<" + code, value)

    def string(self, text: str) -> None:
        data = text.encode() + b"\0"
        self.number("I", len(data))
        self.parts += data

    def doubles(self, values: Sequence[float]) -> None:
        self.number("I", len(values))
        if values:
            self.align(8)
            self.parts += struct.pack(f"<{len(values)}d", *values)

    def header(self, stamp_ns: int, frame: str) -> None:
        self.number("i", stamp_ns // 1_000_000_000)
        self.number("I", stamp_ns % 1_000_000_000)
        self.string(frame)


def compressed_image(stamp_ns: int, frame: str, data: bytes, kind: str = "jpeg") -> bytes:
    """`sensor_msgs/msg/CompressedImage`; ``stamp_ns``: wall time."""
    cdr = _Cdr()
    cdr.header(stamp_ns, frame)
    cdr.string(kind)
    cdr.number("I", len(data))
    cdr.parts += data
    return bytes(cdr.parts)


def image_data(message: bytes) -> bytes:
    """The picture file inside of a `compressed_image`. Raises ValueError for what is none."""
    at = 4 + 8
    for _ in range(2):  # frame_id, format
        at += -(at - 4) % 4
        if at + 4 > len(message):
            raise ValueError(f"expected a CompressedImage, found {len(message)} bytes that end early")
        at += 4 + int(struct.unpack_from("<I", message, at)[0])
    at += -(at - 4) % 4
    if at + 4 > len(message):
        raise ValueError(f"expected a CompressedImage, found {len(message)} bytes that end early")
    size = int(struct.unpack_from("<I", message, at)[0])
    if at + 4 + size != len(message):
        raise ValueError(f"expected {size} bytes of picture, found {len(message) - at - 4}")
    return message[at + 4 :]


def joint_state(
    stamp_ns: int, frame: str, names: Sequence[str], position: Sequence[float], velocity: Sequence[float] = ()
) -> bytes:
    """`sensor_msgs/msg/JointState`; ``stamp_ns``: wall time."""
    cdr = _Cdr()
    cdr.header(stamp_ns, frame)
    cdr.number("I", len(names))
    for name in names:
        cdr.string(name)
    cdr.doubles(position)
    cdr.doubles(velocity)
    cdr.doubles(())
    return bytes(cdr.parts)
