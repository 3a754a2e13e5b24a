"""The part of the kernel's V4L2 interface that a camera needs: structures, requests, a node to send them to.

Source: include/uapi/linux/videodev2.h, in its 64-bit layout (x86-64 and aarch64 agree); a test compiles the header and
compares every size, offset and number used here.
"""

import ctypes
import fcntl
import mmap
import os
import select

UINT = ctypes.c_uint32


class Capability(ctypes.Structure):
    """struct v4l2_capability."""

    _fields_ = (
        ("driver", ctypes.c_char * 16),
        ("card", ctypes.c_char * 32),
        ("bus_info", ctypes.c_char * 32),
        ("version", UINT),
        ("capabilities", UINT),
        ("device_caps", UINT),
        ("reserved", UINT * 3),
    )


class PixelFormat(ctypes.Structure):
    """struct v4l2_pix_format."""

    _fields_ = (
        ("width", UINT),
        ("height", UINT),
        ("pixelformat", UINT),
        ("field", UINT),
        ("bytesperline", UINT),
        ("sizeimage", UINT),
        ("colorspace", UINT),
        ("priv", UINT),
        ("flags", UINT),
        ("ycbcr_enc", UINT),
        ("quantization", UINT),
        ("xfer_func", UINT),
    )


class _FormatUnion(ctypes.Union):
    _fields_ = (("pix", PixelFormat), ("raw_data", ctypes.c_uint8 * 200), ("align", ctypes.c_void_p))


class Format(ctypes.Structure):
    """struct v4l2_format."""

    _fields_ = (("type", UINT), ("fmt", _FormatUnion))


class Fraction(ctypes.Structure):
    """struct v4l2_fract."""

    _fields_ = (("numerator", UINT), ("denominator", UINT))


class CaptureParameters(ctypes.Structure):
    """struct v4l2_captureparm."""

    _fields_ = (
        ("capability", UINT),
        ("capturemode", UINT),
        ("timeperframe", Fraction),
        ("extendedmode", UINT),
        ("readbuffers", UINT),
        ("reserved", UINT * 4),
    )


class _ParametersUnion(ctypes.Union):
    _fields_ = (("capture", CaptureParameters), ("raw_data", ctypes.c_uint8 * 200))


class StreamParameters(ctypes.Structure):
    """struct v4l2_streamparm."""

    _fields_ = (("type", UINT), ("parm", _ParametersUnion))


class RequestBuffers(ctypes.Structure):
    """struct v4l2_requestbuffers; the byte of flags is among the reserved ones."""

    _fields_ = (
        ("count", UINT),
        ("type", UINT),
        ("memory", UINT),
        ("capabilities", UINT),
        ("reserved", UINT),
    )


class Timeval(ctypes.Structure):
    """struct timeval."""

    _fields_ = (("tv_sec", ctypes.c_long), ("tv_usec", ctypes.c_long))


class _BufferUnion(ctypes.Union):
    _fields_ = (("offset", UINT), ("userptr", ctypes.c_ulong), ("fd", ctypes.c_int32))


class Buffer(ctypes.Structure):
    """struct v4l2_buffer."""

    _fields_ = (
        ("index", UINT),
        ("type", UINT),
        ("bytesused", UINT),
        ("flags", UINT),
        ("field", UINT),
        ("timestamp", Timeval),
        ("timecode", UINT * 4),
        ("sequence", UINT),
        ("memory", UINT),
        ("m", _BufferUnion),
        ("length", UINT),
        ("reserved2", UINT),
        ("request_fd", ctypes.c_int32),
    )


class QueryControl(ctypes.Structure):
    """struct v4l2_queryctrl."""

    _fields_ = (
        ("id", UINT),
        ("type", UINT),
        ("name", ctypes.c_char * 32),
        ("minimum", ctypes.c_int32),
        ("maximum", ctypes.c_int32),
        ("step", ctypes.c_int32),
        ("default_value", ctypes.c_int32),
        ("flags", UINT),
        ("reserved", UINT * 2),
    )


class Control(ctypes.Structure):
    """struct v4l2_control."""

    _fields_ = (("id", UINT), ("value", ctypes.c_int32))


class FrameSize(ctypes.Structure):
    """struct v4l2_frmsizeenum; width and height of a discrete size, or least and most of a range."""

    _fields_ = (("index", UINT), ("pixel_format", UINT), ("type", UINT), ("numbers", UINT * 6), ("reserved", UINT * 2))


class FrameInterval(ctypes.Structure):
    """struct v4l2_frmivalenum; the first fraction is a discrete interval."""

    _fields_ = (
        ("index", UINT),
        ("pixel_format", UINT),
        ("width", UINT),
        ("height", UINT),
        ("type", UINT),
        ("fractions", Fraction * 3),
        ("reserved", UINT * 2),
    )


READ, WRITE = 2, 1  # of _IOC's direction


def request(direction: int, number: int, size: int) -> int:
    """_IOC of asm-generic/ioctl.h, type 'V'; x86 and Arm agree."""
    return direction << 30 | size << 16 | ord("V") << 8 | number


def _both(number: int, structure: type[ctypes.Structure]) -> int:
    return request(READ | WRITE, number, ctypes.sizeof(structure))


QUERYCAP = request(READ, 0, ctypes.sizeof(Capability))
S_FMT = _both(5, Format)
REQBUFS = _both(8, RequestBuffers)
QUERYBUF = _both(9, Buffer)
QBUF = _both(15, Buffer)
DQBUF = _both(17, Buffer)
STREAMON = request(WRITE, 18, 4)
STREAMOFF = request(WRITE, 19, 4)
S_PARM = _both(22, StreamParameters)
G_CTRL = _both(27, Control)
S_CTRL = _both(28, Control)
QUERYCTRL = _both(36, QueryControl)
ENUM_FRAMESIZES = _both(74, FrameSize)
ENUM_FRAMEINTERVALS = _both(75, FrameInterval)

VIDEO_CAPTURE = 1  # V4L2_BUF_TYPE_VIDEO_CAPTURE
MMAP = 1  # V4L2_MEMORY_MMAP
FIELD_NONE = 1
FIELD_ANY = 0
CAP_VIDEO_CAPTURE = 0x1
CAP_STREAMING = 0x04000000
CAP_DEVICE_CAPS = 0x80000000
BUF_FLAG_ERROR = 0x40
BUF_FLAG_TIMESTAMP_MASK = 0xE000
BUF_FLAG_TIMESTAMP_MONOTONIC = 0x2000
CTRL_FLAG_DISABLED = 0x1
DISCRETE = 1  # V4L2_FRMSIZE_TYPE_DISCRETE and V4L2_FRMIVAL_TYPE_DISCRETE

AUTO_WHITE_BALANCE = 0x0098090C
GAIN = 0x00980913
WHITE_BALANCE_TEMPERATURE = 0x0098091A
EXPOSURE_AUTO = 0x009A0901
EXPOSURE_ABSOLUTE = 0x009A0902
EXPOSURE_AUTO_PRIORITY = 0x009A0903
EXPOSURE_MANUAL = 1  # of the menu of EXPOSURE_AUTO
EXPOSURE_APERTURE_PRIORITY = 3


def fourcc(code: str) -> int:
    """Four characters as the number of a pixel format."""
    return int.from_bytes(code.encode("ascii"), "little")


class Node:
    """An open `/dev/videoN`. Every call raises OSError as the kernel answers."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def ioctl(self, number: int, argument: ctypes.Structure | ctypes.c_int) -> None:
        """One request; the structure is filled in."""
        fcntl.ioctl(self._fd, number, argument)

    def map(self, length: int, offset: int) -> mmap.mmap:
        """A buffer of the driver's."""
        return mmap.mmap(self._fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)

    def wait(self, seconds: float) -> bool:
        """Whether a buffer is ready, or the device has something to say, within that time."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(max(0.0, seconds) * 1000))

    def close(self) -> None:
        """Let go."""
        os.close(self._fd)
