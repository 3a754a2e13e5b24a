"""The kernel's side of a V4L2 camera, as its documentation describes it, behind `v4l2.Node`'s methods.

No device and no virtual driver exists on the machines that run the tests: this stands in for both, and holds the driver
to the protocol (a buffer is the driver's or the camera's, never both; streaming needs queued buffers; EAGAIN, ENODEV).
"""

import ctypes
import errno
import mmap
import os
import time

import numpy as np

from chatvla_edge.drivers.cameras import v4l2


def padded(packed):
    """YUYV `[H, W, 2]` as the camera below lays it: each line with 32 bytes behind it."""
    height, width, _ = packed.shape
    lines = np.zeros((height, 2 * width + 32), np.uint8)
    lines[:, : 2 * width] = packed.reshape(height, -1)
    return lines.tobytes()


class KernelCamera:
    """640x480 and 320x240, YUYV and MJPG, at 30 and 15; `frames` yields the bytes of each frame, or an OSError."""

    def __init__(self, frames, controls=None, caps=v4l2.CAP_VIDEO_CAPTURE | v4l2.CAP_STREAMING, sizes=None):
        self.frames = iter(frames)
        self.caps = caps
        self.sizes = sizes or [(640, 480), (320, 240)]
        self.controls = dict(controls or {})
        self.history = []
        self.streaming = self.closed = False
        self.queue, self.ready, self.out = [], [], set()
        self.memory, self.size = None, 0
        self.sequence = -1
        self.flags = v4l2.BUF_FLAG_TIMESTAMP_MONOTONIC
        self.image = 0

    # ------------------------------------------------------------------------------------------------------ v4l2.Node

    def ioctl(self, number, argument):
        assert not self.closed
        names = {value: name for name, value in vars(v4l2).items() if name.isupper() and isinstance(value, int)}
        getattr(self, "do_" + names[number].lower())(argument)

    def map(self, length, offset):
        memory = mmap.mmap(-1, length)
        self.memory[offset // 4096] = memory
        return memory

    def wait(self, seconds):
        if self.streaming:
            self.deliver()
        return bool(self.ready)

    def close(self):
        assert not self.streaming
        self.closed = True

    # ------------------------------------------------------------------------------------------------------- requests

    def do_querycap(self, cap):
        cap.card, cap.bus_info = b"Kernel camera", b"usb-0000:00:14.0-1"
        cap.capabilities, cap.device_caps = v4l2.CAP_DEVICE_CAPS | 0xFF, self.caps

    def do_s_fmt(self, fmt):
        pix = fmt.fmt.pix
        assert fmt.type == v4l2.VIDEO_CAPTURE
        if (pix.width, pix.height) not in self.sizes:
            pix.width, pix.height = self.sizes[0]
        self.format = (pix.width, pix.height)
        pix.bytesperline = 2 * pix.width + 32 if pix.pixelformat == v4l2.fourcc("YUYV") else 0  # padded lines
        pix.sizeimage = self.size = 4 * pix.width * pix.height
        self.line = pix.bytesperline

    def do_s_parm(self, parm):
        interval = parm.parm.capture.timeperframe
        asked = interval.denominator / interval.numerator
        rate = min((30, 15), key=lambda rate: abs(rate - asked))
        interval.numerator, interval.denominator = 1, rate

    def do_enum_framesizes(self, size):
        if size.index >= len(self.sizes):
            raise OSError(errno.EINVAL, "no more")
        size.type = v4l2.DISCRETE
        size.numbers[0], size.numbers[1] = self.sizes[size.index]

    def do_enum_frameintervals(self, interval):
        if interval.index >= 2:
            raise OSError(errno.EINVAL, "no more")
        interval.type = v4l2.DISCRETE
        interval.fractions[0].numerator, interval.fractions[0].denominator = 1, (30, 15)[interval.index]

    def do_reqbufs(self, wanted):
        assert wanted.memory == v4l2.MMAP
        self.memory = [None] * wanted.count

    def do_querybuf(self, buffer):
        buffer.length, buffer.m.offset = self.size, 4096 * buffer.index

    def do_qbuf(self, buffer):
        assert buffer.index not in self.queue
        assert not self.streaming or buffer.index in self.out, "a buffer that is not the driver's"
        self.out.discard(buffer.index)
        self.queue.append(buffer.index)

    def do_streamon(self, kind):
        assert ctypes.c_int(v4l2.VIDEO_CAPTURE).value == kind.value
        assert self.queue
        self.streaming = True

    def do_streamoff(self, kind):
        self.streaming = False

    def do_dqbuf(self, buffer):
        if not self.ready:
            raise BlockingIOError(errno.EAGAIN, "none is ready")
        found = self.ready.pop(0)
        if isinstance(found, OSError):
            raise found
        index, used, sequence, flags, stamp = found
        self.out.add(index)
        buffer.index, buffer.bytesused, buffer.sequence, buffer.flags = index, used, sequence, flags
        buffer.timestamp.tv_sec, buffer.timestamp.tv_usec = divmod(stamp // 1000, 1_000_000)

    def do_queryctrl(self, query):
        if query.id not in self.controls:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        query.name, query.minimum, query.maximum = b"Control", 0, 10000

    def do_g_ctrl(self, control):
        control.value = self.controls[control.id]

    def do_s_ctrl(self, control):
        self.controls[control.id] = control.value
        self.history.append((control.id, control.value))

    # ------------------------------------------------------------------------------------------------------- the sensor

    def deliver(self):
        """What the source gives: bytes, (bytes, flags), an OSError, None for a pause, a list for several at once."""
        given = next(self.frames, None)
        for one in given if isinstance(given, list) else [given]:
            if one is None:
                time.sleep(0.002)
                continue
            self.sequence += 1
            if isinstance(one, OSError):
                self.ready.append(one)
                continue
            data, flags = one if isinstance(one, tuple) else (one, 0)
            if not self.queue:
                continue  # no buffer: the number is lost
            index = self.queue.pop(0)
            self.memory[index][: len(data)] = data
            stamp = time.monotonic_ns() - 5_000_000
            self.ready.append((index, len(data), self.sequence, self.flags | flags, stamp))
