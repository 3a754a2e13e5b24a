"""Everything around the ZED SDK: modes, stamps, refusals, the namesake, and the calls against a model of the binding.

The SDK itself has never run here.
"""

import subprocess
import sys

import cv2
import numpy as np
import pytest
from support import zed_sdk
from support.v4l2_kernel import KernelCamera, padded

from chatvla_edge.drivers import registry
from chatvla_edge.drivers.cameras import zed
from chatvla_edge.drivers.cameras.zed import MODES, Zed, ZedOptions, ZedUvc, ZedUvcOptions, mode_of, refusal, view_name
from chatvla_edge.drivers.errors import (
    DeviceLostError,
    DeviceNotFoundError,
    DeviceUnsuitableError,
)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_found_by_its_size_and_rates(mode):
    width, height, rates = MODES[mode]
    for rate in rates:
        assert mode_of(height, width, rate, "left") == (mode, width)
        assert mode_of(height, 2 * width, rate, "side_by_side") == (mode, width)


@pytest.mark.parametrize(
    ("shape", "view"), [((480, 640, 30), "left"), ((720, 1280, 50), "left"), ((720, 1280, 30), "side_by_side")]
)
def test_another_shape_is_refused_with_those_there_are(shape, view):
    with pytest.raises(DeviceUnsuitableError, match=r"1280x720 at 15/30/60|2560x720 at 15/30/60"):
        mode_of(*shape, view)


# ---------------------------------------------------------------------------------------------------------- the library


def opened_beside(folder):
    """The driver in an interpreter that finds modules in that folder, too."""
    program = (
        "from chatvla_edge.drivers import registry\n"
        "camera = registry.create('cameras', 'zed', {})\n"
        "try: camera.open(720, 1280, 30)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n" + program
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout


def test_without_the_sdk_the_way_to_it_is_said(tmp_path):
    words = opened_beside(tmp_path)
    assert words.startswith("MissingLibraryError found no module pyzed")
    assert "get_python_api.py" in words


@pytest.mark.slow
def test_the_namesake_of_pypi_is_refused(tmp_path):
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), "pyzed==1.3.0"]
    if subprocess.run(install, capture_output=True, timeout=120).returncode != 0:
        pytest.skip("no package index here")
    words = opened_beside(tmp_path)
    assert words.startswith("MissingLibraryError found a module pyzed without pyzed.sl")
    assert "pip uninstall pyzed" in words


def test_a_single_file_of_that_name_is_refused(tmp_path):
    (tmp_path / "pyzed.py").write_text("import binascii\n")
    assert opened_beside(tmp_path).startswith("MissingLibraryError found a module pyzed without pyzed.sl")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("raise ImportError('libsl_core.so: cannot open shared object file')", "does not load: libsl_core.so"),
        ("raise ValueError('numpy.dtype size changed')", "built for another NumPy"),
        ("class Camera: pass", "not the ZED SDK's"),
    ],
)
def test_an_sdk_that_does_not_fit_is_named(tmp_path, content, words):
    (tmp_path / "pyzed").mkdir()
    (tmp_path / "pyzed" / "__init__.py").touch()
    (tmp_path / "pyzed" / "sl.py").write_text(content)
    found = opened_beside(tmp_path)
    assert found.startswith("MissingLibraryError")
    assert words in found


# ----------------------------------------------------------------------------------- the calls, with a model of the SDK


@pytest.fixture
def model(monkeypatch):
    class Model(zed_sdk.Camera):
        pass

    monkeypatch.setattr(zed_sdk, "Camera", Model)
    monkeypatch.setattr(zed, "sdk", lambda: zed_sdk)
    return Model


def opened(height=720, width=1280, rate=30, **options):
    camera = Zed(ZedOptions(**options))
    camera.open(height, width, rate)
    return camera


def test_frames_are_rgb_and_numbered_with_what_the_sdk_dropped(model):
    model.script = (0, 0, 2, "CORRUPTED_FRAME", 0)
    camera = opened()
    sequences = []
    for _ in range(5):
        try:
            frame = camera.read(0.1)
        except TimeoutError:
            continue
        sequences.append(frame.sequence)
        assert frame.image.shape == (720, 1280, 3)
        assert frame.image[0, 0].tolist() == [30, 20, len(sequences)]
    assert sequences == [1, 2, 5, 6]
    assert camera.health().lost == 2
    camera.close()
    assert model.last.closed
    with pytest.raises(DeviceLostError, match="not open"):
        camera.read(0.1)


@pytest.mark.parametrize(("periods", "rate"), [(2.5, 30), (0.0, 60)])
def test_the_capture_lies_before_the_stamp_by_the_transport(model, periods, rate):
    camera = opened(rate=rate, transport_periods=periods)
    frames = [camera.read(0.1) for _ in range(15)]
    delay = np.median([frame.received_ns - frame.captured_ns for frame in frames])
    assert abs(delay - 1e9 * periods / rate - model.stamp_delay_ns) < 20e6


def test_the_sdk_is_asked_for_what_the_rig_says(model):
    camera = opened(serial=1234, view="right", rectified=False)
    asked = model.last.parameters
    assert (asked.serial, asked.camera_fps, asked.camera_resolution) == (1234, 30, zed_sdk.RESOLUTION.HD720)
    assert asked.depth_mode is zed_sdk.DEPTH_MODE.NONE
    assert camera._view is zed_sdk.VIEW.RIGHT_UNRECTIFIED
    assert camera.health().facts["serial"] == "7"


def test_side_by_side_is_twice_as_wide(model):
    assert opened(width=2560, view="side_by_side").read(0.1).image.shape == (720, 2560, 3)
    assert view_name("side_by_side", rectified=True) == "SIDE_BY_SIDE"


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({}, [("AEC_AGC", 1), ("WHITEBALANCE_AUTO", 1)]),
        (
            {"exposure": 30.0, "gain": 5.0, "white_balance": 4600.0},
            [
                ("AEC_AGC", 0),
                ("EXPOSURE", 30),
                ("GAIN", 5),
                ("WHITEBALANCE_AUTO", 0),
                ("WHITEBALANCE_TEMPERATURE", 4600),
            ],
        ),
        (
            {"exposure": "freeze", "white_balance": "freeze"},
            [
                ("AEC_AGC", 0),
                ("EXPOSURE", 41),
                ("GAIN", 12),
                ("WHITEBALANCE_AUTO", 0),
                ("WHITEBALANCE_TEMPERATURE", 4700),
            ],
        ),
    ],
)
def test_exposure_is_fixed_or_frozen(model, options, settings):
    opened(rate=15, **options)
    assert model.last.settings == settings


def test_an_svo_is_played_once_or_counts_on(model, tmp_path):
    svo = tmp_path / "a.svo2"
    svo.touch()
    camera = opened(svo=svo)
    assert model.last.parameters.svo_real_time_mode
    assert [camera.read(0.1).sequence for _ in range(3)] == [1, 2, 3]
    with pytest.raises(DeviceLostError, match="is over"):
        camera.read(0.1)
    camera = opened(svo=svo, loop=True)
    assert [camera.read(0.1).sequence for _ in range(7)] == [1, 2, 3, 4, 5, 6, 7]
    assert camera.health().clock_steps == 0
    with pytest.raises(DeviceNotFoundError, match="found no recording"):
        opened(svo=tmp_path / "b.svo2")


def test_a_camera_that_goes_is_lost(model):
    model.script = (0, "CAMERA_NOT_DETECTED")
    camera = opened()
    camera.read(0.1)
    with pytest.raises(DeviceLostError, match="CAMERA_NOT_DETECTED"):
        camera.read(0.1)


def test_a_camera_that_does_not_open_is_refused_with_the_remedy(model):
    model.opens = "NOT_ENOUGH_GPU_MEMORY"
    with pytest.raises(DeviceUnsuitableError, match="give the policy less"):
        opened()
    assert isinstance(refusal("CAMERA_NOT_DETECTED", "7"), DeviceNotFoundError)
    assert isinstance(refusal("CANNOT_START_CAMERA_STREAM", "7"), DeviceLostError)
    model.opens, model.size = "SUCCESS", (1920, 1080)
    with pytest.raises(DeviceUnsuitableError, match="gives 1920x1080, expected 1280x720"):
        opened()


@pytest.mark.parametrize("options", [{"serial": 1, "svo": "a"}, {"loop": True}, {"gain": 3.0}, {"view": "both"}])
def test_options_that_contradict_are_refused(options):
    with pytest.raises(ValueError, match="validation error"):
        registry.options("cameras", "zed", options)


# ------------------------------------------------------------------------------------------------------ without the SDK


class OnKernel(ZedUvc):
    def __init__(self, kernel, **options):
        super().__init__(ZedUvcOptions(device="/dev/video0", **options))
        self.kernel = kernel

    def _node_at(self, path):
        return self.kernel


@pytest.mark.parametrize(("view", "columns"), [("left", slice(0, 672)), ("right", slice(672, 1344))])
def test_one_eye_of_the_uvc_stream_is_handed_out(view, columns):
    packed = np.random.default_rng(0).integers(0, 256, (376, 1344, 2), np.uint8)
    camera = OnKernel(KernelCamera([padded(packed)], sizes=[(1344, 376)]), view=view)
    camera.open(376, 672, 30)
    frame = camera.read(1.0)
    assert np.array_equal(frame.image, cv2.cvtColor(packed, cv2.COLOR_YUV2RGB_YUY2)[:, columns])


def test_the_uvc_stream_can_be_had_whole():
    packed = np.zeros((376, 1344, 2), np.uint8)
    camera = OnKernel(KernelCamera([padded(packed)], sizes=[(1344, 376)]), view="side_by_side")
    camera.open(376, 1344, 30)
    assert camera.read(1.0).image.shape == (376, 1344, 3)
