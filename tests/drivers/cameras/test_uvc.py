"""The V4L2 layer has the kernel's layout, converts as OpenCV does, and keeps the kernel's rules for buffers."""

import ctypes
import errno
import io
import shutil
import subprocess

import cv2
import numpy as np
import pytest
from PIL import Image
from support.v4l2_kernel import KernelCamera, padded

from chatvla_edge.drivers import registry
from chatvla_edge.drivers.cameras import pixels, uvc, v4l2
from chatvla_edge.drivers.cameras.uvc import Uvc, UvcOptions
from chatvla_edge.drivers.errors import DeviceLostError, DeviceNotFoundError, DeviceUnsuitableError

# our structure: (the header's, our members: the header's)
STRUCTURES = {
    v4l2.Capability: ("v4l2_capability", {"card": "card", "device_caps": "device_caps"}),
    v4l2.PixelFormat: ("v4l2_pix_format", {"sizeimage": "sizeimage", "xfer_func": "xfer_func"}),
    v4l2.Format: ("v4l2_format", {"fmt": "fmt"}),
    v4l2.StreamParameters: ("v4l2_streamparm", {"parm": "parm"}),
    v4l2.CaptureParameters: ("v4l2_captureparm", {"timeperframe": "timeperframe"}),
    v4l2.RequestBuffers: ("v4l2_requestbuffers", {"memory": "memory"}),
    v4l2.Buffer: (
        "v4l2_buffer",
        {name: name for name in ("index", "bytesused", "flags", "timestamp", "sequence", "memory", "m", "length")},
    ),
    v4l2.QueryControl: ("v4l2_queryctrl", {"name": "name", "minimum": "minimum", "flags": "flags"}),
    v4l2.Control: ("v4l2_control", {"value": "value"}),
    v4l2.FrameSize: ("v4l2_frmsizeenum", {"numbers": "discrete", "type": "type"}),
    v4l2.FrameInterval: ("v4l2_frmivalenum", {"fractions": "discrete", "type": "type"}),
}

NUMBERS = {
    **{name: f"VIDIOC_{name}" for name in ("QUERYCAP", "S_FMT", "REQBUFS", "QUERYBUF", "QBUF", "DQBUF", "STREAMON")},
    **{name: f"VIDIOC_{name}" for name in ("STREAMOFF", "S_PARM", "G_CTRL", "S_CTRL", "QUERYCTRL")},
    **{name: f"VIDIOC_{name}" for name in ("ENUM_FRAMESIZES", "ENUM_FRAMEINTERVALS")},
    **{name: f"V4L2_{name}" for name in ("CAP_VIDEO_CAPTURE", "CAP_STREAMING", "CAP_DEVICE_CAPS", "BUF_FLAG_ERROR")},
    **{name: f"V4L2_{name}" for name in ("BUF_FLAG_TIMESTAMP_MASK", "BUF_FLAG_TIMESTAMP_MONOTONIC", "FIELD_NONE")},
    **{name: f"V4L2_CID_{name}" for name in ("AUTO_WHITE_BALANCE", "GAIN", "WHITE_BALANCE_TEMPERATURE")},
    **{name: f"V4L2_CID_{name}" for name in ("EXPOSURE_AUTO", "EXPOSURE_ABSOLUTE", "EXPOSURE_AUTO_PRIORITY")},
    "VIDEO_CAPTURE": "V4L2_BUF_TYPE_VIDEO_CAPTURE",
    "MMAP": "V4L2_MEMORY_MMAP",
    "CTRL_FLAG_DISABLED": "V4L2_CTRL_FLAG_DISABLED",
    "DISCRETE": "V4L2_FRMSIZE_TYPE_DISCRETE",
    "EXPOSURE_MANUAL": "V4L2_EXPOSURE_MANUAL",
    "EXPOSURE_APERTURE_PRIORITY": "V4L2_EXPOSURE_APERTURE_PRIORITY",
}


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_structures_and_numbers_are_the_kernels(tmp_path):
    lines = [f'printf("%lu\\n", (unsigned long) {header});' for header in NUMBERS.values()]
    expected = [getattr(v4l2, ours) for ours in NUMBERS]
    lines.append(
        'printf("%lu\\n", (unsigned long) V4L2_PIX_FMT_YUYV); printf("%lu\\n", (unsigned long) V4L2_PIX_FMT_MJPEG);'
    )
    expected += [v4l2.fourcc("YUYV"), v4l2.fourcc("MJPG")]
    for ours, (name, members) in STRUCTURES.items():
        lines.append(f'printf("%lu\\n", (unsigned long) sizeof(struct {name}));')
        expected.append(ctypes.sizeof(ours))
        for mine, theirs in members.items():
            lines.append(f'printf("%lu\\n", (unsigned long) offsetof(struct {name}, {theirs}));')
            expected.append(getattr(ours, mine).offset)
    source = tmp_path / "layout.c"
    body = "\n".join(lines)
    source.write_text(
        f"#include <stddef.h>\n#include <stdio.h>\n#include <linux/videodev2.h>\nint main() {{\n{body}\n}}\n"
    )
    subprocess.run(["cc", str(source), "-o", str(tmp_path / "layout")], check=True)
    found = [int(line) for line in subprocess.check_output([tmp_path / "layout"], text=True).split()]
    assert found == expected


# ---------------------------------------------------------------------------------------------------------- conversions


@pytest.mark.parametrize(("height", "width"), [(1, 2), (3, 4), (48, 64), (480, 640)])
def test_yuyv_becomes_rgb_as_in_opencv(height, width):
    packed = np.random.default_rng(height).integers(0, 256, (height, width, 2), np.uint8)
    target = np.empty((height, width, 3), np.uint8)
    pixels.yuyv_to_rgb(packed, 2 * width, 0, target)
    assert np.array_equal(target, cv2.cvtColor(packed, cv2.COLOR_YUV2RGB_YUY2))


def test_every_value_of_yuyv_becomes_rgb_as_in_opencv():
    """All 2^16 colours at 16 brightnesses each."""
    u, v = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8), indexing="ij")
    for brightness in (*range(0, 256, 17), 15, 17, 234, 236):
        packed = np.full((256, 512, 2), brightness, np.uint8)
        packed[:, 0::2, 1], packed[:, 1::2, 1] = u, v
        packed[:, 1::2, 0] = 255 - brightness
        target = np.empty((256, 512, 3), np.uint8)
        pixels.yuyv_to_rgb(packed, 1024, 0, target)
        assert np.array_equal(target, cv2.cvtColor(packed, cv2.COLOR_YUV2RGB_YUY2))


def test_part_of_padded_lines_is_converted():
    packed = np.random.default_rng(1).integers(0, 256, (6, 20, 2), np.uint8)
    target = np.empty((6, 8, 3), np.uint8)
    pixels.yuyv_to_rgb(packed, 40, 12, target)
    assert np.array_equal(target, cv2.cvtColor(packed, cv2.COLOR_YUV2RGB_YUY2)[:, 12:])


@pytest.mark.parametrize(
    ("nbytes", "line", "column", "shape"),
    [
        (79, 16, 0, (5, 8, 3)),
        (80, 15, 0, (5, 8, 3)),
        (80, 16, 2, (5, 8, 3)),
        (80, 16, 1, (5, 6, 3)),
        (80, 16, 0, (5, 7, 3)),
    ],
)
def test_a_source_that_is_too_short_is_refused(nbytes, line, column, shape):
    with pytest.raises(ValueError, match="expected"):
        pixels.yuyv_to_rgb(bytes(nbytes), line, column, np.empty(shape, np.uint8))


def test_bgra_becomes_rgb_from_padded_lines_too():
    wide = np.random.default_rng(2).integers(0, 256, (48, 70, 4), np.uint8)
    for source in (wide, wide[:, :64]):
        target = np.empty((*source.shape[:2], 3), np.uint8)
        pixels.bgra_to_rgb(source, target)
        assert np.array_equal(target, cv2.cvtColor(np.ascontiguousarray(source), cv2.COLOR_BGRA2RGB))
    for source in (wide[:, ::2], wide[..., :3], wide.astype(np.uint16)):
        with pytest.raises(ValueError, match="expected"):
            pixels.bgra_to_rgb(source, np.empty((*source.shape[:2], 3), np.uint8))


# ------------------------------------------------------------------------------------------------------------ streaming


def picture(seed, height=240, width=320):
    """Padded YUYV bytes, and the RGB that they are."""
    packed = np.random.default_rng(seed).integers(0, 256, (height, width, 2), np.uint8)
    return padded(packed), cv2.cvtColor(packed, cv2.COLOR_YUV2RGB_YUY2)


class OnKernel(Uvc):
    def __init__(self, kernel, **options):
        super().__init__(UvcOptions(device="/dev/video7", **options))
        self.kernel = kernel

    def _node_at(self, path):
        return self.kernel


def opened(frames, *, kernel=None, **options):
    camera = OnKernel(kernel or KernelCamera(frames), **options)
    camera.open(240, 320, 30)
    return camera


def test_every_frame_arrives_once_with_the_kernels_number_and_clock():
    pictures = [picture(seed) for seed in range(12)]
    camera = opened([data for data, _ in pictures])
    for number, (_, rgb) in enumerate(pictures):
        frame = camera.read(1.0)
        assert (frame.sequence, frame.clock) == (number, "device")
        assert np.array_equal(frame.image, rgb)
        assert 4_000_000 < frame.received_ns - frame.captured_ns < 500_000_000
    with pytest.raises(TimeoutError):
        camera.read(0.01)
    camera.close()
    camera.close()
    assert camera.kernel.closed
    assert camera.health().facts["device"] == "Kernel camera"
    assert (camera.health().frames, camera.health().lost) == (12, 0)


def test_of_several_frames_the_newest_is_read_and_the_others_count_as_lost():
    first, second, third, last = (picture(seed) for seed in range(4))
    camera = opened([first[0], [second[0], third[0], last[0]]])
    assert camera.read(1.0).sequence == 0
    frame = camera.read(1.0)
    assert frame.sequence == 3
    assert np.array_equal(frame.image, last[1])
    assert camera.health().lost == 2


def test_broken_and_short_frames_are_passed_over():
    good, bad = picture(0), picture(1)
    camera = opened([good[0], (bad[0], v4l2.BUF_FLAG_ERROR), bad[0][:-1], good[0]])
    assert [camera.read(1.0).sequence for _ in range(2)] == [0, 3]
    assert camera.health().lost == 2
    assert camera.health().facts["broken"] == 2


def test_unplugging_is_told_at_once():
    camera = opened([picture(0)[0], OSError(errno.ENODEV, "No such device")])
    camera.read(1.0)
    with pytest.raises(DeviceLostError, match="unplugged"):
        camera.read(1.0)
    camera.close()


def test_a_stamp_of_an_unknown_clock_is_not_used():
    kernel = KernelCamera([picture(0)[0]])
    kernel.flags = 0
    frame = opened([], kernel=kernel).read(1.0)
    assert (frame.clock, frame.captured_ns) == ("arrival", frame.received_ns)


def test_a_size_or_rate_that_the_camera_lacks_is_refused_with_what_it_offers():
    camera = OnKernel(KernelCamera([]))
    with pytest.raises(
        DeviceUnsuitableError, match=r"offers 640x480 at 30/15, 320x240 at 30/15 in YUYV, expected 800x600"
    ):
        camera.open(600, 800, 30)
    assert camera.kernel.closed
    camera = OnKernel(KernelCamera([]))
    with pytest.raises(DeviceUnsuitableError, match="answers 30 for 320x240 at 60"):
        camera.open(240, 320, 60)


def test_a_node_that_is_no_camera_is_refused():
    with pytest.raises(DeviceUnsuitableError, match="expected its first"):
        opened([], kernel=KernelCamera([], caps=v4l2.CAP_STREAMING))


def test_a_camera_that_is_not_there_is_said():
    with pytest.raises(DeviceNotFoundError, match=r"/dev/video99: No such file"):
        registry.create("cameras", "uvc", {"device": "/dev/video99"}).open(240, 320, 30)
    with pytest.raises(DeviceLostError, match="not open"):
        registry.create("cameras", "uvc", {"device": "/dev/video99"}).read(0.1)


def test_a_file_that_is_no_device_is_refused(tmp_path):
    """The real ioctl, which answers ENOTTY."""
    path = tmp_path / "video0"
    path.touch()
    with pytest.raises(DeviceLostError, match="Inappropriate ioctl"):
        registry.create("cameras", "uvc", {"device": str(path)}).open(240, 320, 30)


# ------------------------------------------------------------------------------------------------------------ controls

CONTROLS = {
    v4l2.EXPOSURE_AUTO: 0,
    v4l2.EXPOSURE_ABSOLUTE: 157,
    v4l2.EXPOSURE_AUTO_PRIORITY: 1,
    v4l2.GAIN: 5,
    v4l2.AUTO_WHITE_BALANCE: 0,
    v4l2.WHITE_BALANCE_TEMPERATURE: 4321,
}


def controlled(frames=(), **options):
    return opened([], kernel=KernelCamera(frames, CONTROLS), **options).kernel


def test_automatic_controls_are_switched_on_without_a_change_of_rate():
    kernel = controlled()
    assert kernel.controls[v4l2.EXPOSURE_AUTO] == v4l2.EXPOSURE_APERTURE_PRIORITY
    assert kernel.controls[v4l2.EXPOSURE_AUTO_PRIORITY] == 0
    assert kernel.controls[v4l2.AUTO_WHITE_BALANCE] == 1


def test_fixed_controls_switch_the_automatic_off_first():
    kernel = controlled(exposure=200.0, gain=9.0, white_balance=5200.0)
    assert kernel.history == [
        (v4l2.EXPOSURE_AUTO, v4l2.EXPOSURE_MANUAL),
        (v4l2.EXPOSURE_ABSOLUTE, 200),
        (v4l2.GAIN, 9),
        (v4l2.AUTO_WHITE_BALANCE, 0),
        (v4l2.WHITE_BALANCE_TEMPERATURE, 5200),
    ]


def test_freezing_keeps_what_the_automatic_found(monkeypatch):
    monkeypatch.setattr(uvc, "SETTLE_SECONDS", 0.05)
    data = picture(0)[0]
    kernel = controlled(iter(lambda: data, None), exposure="freeze", white_balance="freeze")
    assert kernel.history[-4:] == [
        (v4l2.EXPOSURE_AUTO, v4l2.EXPOSURE_MANUAL),
        (v4l2.EXPOSURE_ABSOLUTE, 157),
        (v4l2.AUTO_WHITE_BALANCE, 0),
        (v4l2.WHITE_BALANCE_TEMPERATURE, 4321),
    ]


def test_a_control_that_is_missing_or_out_of_range_is_refused():
    with pytest.raises(DeviceUnsuitableError, match="has no control 0x9a0901"):
        opened([], exposure=100.0)
    with pytest.raises(DeviceUnsuitableError, match="found Control 20000, expected 0 to 10000"):
        controlled(exposure=20000.0)


# --------------------------------------------------------------------------------------------------------------- MJPEG


def jpeg(seed):
    smooth = cv2.resize(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8), (320, 240))
    buffer = io.BytesIO()
    Image.fromarray(smooth).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def without_huffman_tables(data):
    """As UVC cameras send it: the standard's own tables are left out."""
    out, place = bytearray(data[:2]), 2
    while data[place + 1] != 0xDA:
        length = 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if data[place + 1] != 0xC4:
            out += data[place : place + length]
        place += length
    return bytes(out + data[place:])


def test_mjpeg_is_decoded_as_pillow_does_with_or_without_its_tables():
    data = [jpeg(0), without_huffman_tables(jpeg(1)), jpeg(2)[:2000], jpeg(3)]
    assert len(data[1]) < len(jpeg(1))
    camera = opened(data, pixels="MJPG")
    for seed, number in ((0, 0), (1, 1), (3, 3)):
        frame = camera.read(1.0)
        assert frame.sequence == number
        assert np.array_equal(frame.image, np.asarray(Image.open(io.BytesIO(jpeg(seed)))))
    assert camera.health().facts["broken"] == 1
    camera.close()
