"""Pixels: every step against the library that the published scripts call, the patches against transformers'."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image
from support import naive
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from chatvla_edge.export.model.images import (
    PRESETS,
    QWEN2_VL,
    CenterCrop,
    Jpeg,
    Preprocessing,
    Resize,
    Rotate180,
    apply,
    patches,
)

CAMERAS = [(480, 640), (270, 480), (720, 1280), (1080, 1920)]


def noise(height, width, seed=0):
    """Every grey level beside every other: the hardest picture for a resize."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def scene(height, width, seed=0):
    """Smooth, as a camera sees: values drift slowly, so roundings fall everywhere."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def both(height, width):
    return [noise(height, width), scene(height, width)]


# ----------------------------------------------------------------------------------------------------- patches


@pytest.mark.parametrize("size", [(252, 308), (56, 56), (84, 140), (476, 644), (28, 280)])
def test_patches_are_bit_identical_to_transformers_processor(size):
    for frame in both(*size):
        theirs = Qwen2VLImageProcessorPil(do_resize=False)(images=[frame], return_tensors="np")
        rows, grid = patches(frame)
        assert rows.dtype == theirs["pixel_values"].dtype == np.float32
        np.testing.assert_array_equal(rows, theirs["pixel_values"])
        assert [[1, *grid]] == theirs["image_grid_thw"].tolist()


@pytest.mark.parametrize("size", [(240, 320), (270, 480), (100, 57)])
def test_the_whole_published_path_is_our_resize_and_our_patches(size):
    """Sizes at which every Pillow resizes across first; see the test on its versions."""
    height, width = smart_resize(*size, factor=28, min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
    for frame in both(*size):
        theirs = Qwen2VLImageProcessorPil()(images=[frame], return_tensors="np")["pixel_values"]
        rows, _ = patches(apply(Resize(height=height, width=width, filter="bicubic"), frame))
        np.testing.assert_array_equal(rows, theirs)


def test_a_320x240_frame_makes_396_patches():
    rows, grid = patches(PRESETS["plain"](noise(240, 320)))
    assert (rows.shape, grid) == ((396, 1176), (18, 22))
    assert (QWEN2_VL.height, QWEN2_VL.width) == smart_resize(240, 320)


def test_both_temporal_slices_are_the_same_frame():
    rows, _ = patches(noise(56, 84))
    split = rows.reshape(-1, 3, 2, 14, 14)
    np.testing.assert_array_equal(split[:, :, 0], split[:, :, 1])


@pytest.mark.parametrize("size", [(240, 320), (252, 300), (14, 28)])
def test_a_frame_that_cannot_be_cut_is_refused(size):
    with pytest.raises(ValueError, match="multiples of 28"):
        patches(noise(*size))


# ----------------------------------------------------------------------------------------------------- resizes


@pytest.mark.parametrize("size", CAMERAS)
@pytest.mark.parametrize("target", [(240, 320), (252, 308), (500, 700)])
def test_bicubic_is_pillows(size, target):
    for frame in both(*size):
        expected = Image.fromarray(frame).resize(target[::-1], Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(
            apply(Resize(height=target[0], width=target[1], filter="bicubic"), frame), expected
        )


def test_bicubic_does_not_depend_on_pillows_version():
    """Pillow 13 goes down first at this size, and gives other grey levels than 12.3, whose digest this is."""
    y, x, c = np.meshgrid(np.arange(480), np.arange(640), np.arange(3), indexing="ij")
    frame = ((x * x + 3 * x * y + 5 * y * y + 77 * c) // 16 % 256).astype(np.uint8)
    assert zlib.crc32(apply(Resize(height=300, width=700, filter="bicubic"), frame).tobytes()) == 0x0CD159EC


@pytest.mark.parametrize("size", [(456, 608), (270, 480), (200, 300)])
def test_bilinear_float_is_an_antialiased_triangle_truncated(size):
    resize = Resize(height=240, width=320, filter="bilinear_float")
    for frame in both(*size):
        found = apply(resize, frame)
        exact = np.stack([naive.bilinear_antialias(frame[..., c], 240, 320) for c in range(3)], -1)
        assert found.dtype == np.uint8
        # fp32 is up to 3e-3 off and may fall on the other side of a whole number; elsewhere truncation is certain.
        certain = np.abs(exact - np.rint(exact)) > 5e-3
        np.testing.assert_array_equal(found[certain], np.floor(exact)[certain])
        assert np.abs(found - exact).max() < 1.005
        assert certain.mean() > 0.9


@pytest.mark.parametrize("target", [(240, 320), (252, 308), (270, 480)])
@pytest.mark.parametrize("size", [*CAMERAS, (240, 320), (376, 672), (101, 77), (1, 1), (3, 500)])
def test_bilinear_cv2_is_opencvs_to_the_last_grey_level(size, target):
    cv2 = pytest.importorskip("cv2")
    for frame in both(*size):
        found = apply(Resize(height=target[0], width=target[1], filter="bilinear_cv2"), frame)
        np.testing.assert_array_equal(found, cv2.resize(frame, target[::-1], interpolation=cv2.INTER_LINEAR))


# ------------------------------------------------------------------------------------- crop, rotation, JPEG


def test_the_crop_keeps_rows_12_to_468_and_columns_16_to_624():
    frame = noise(480, 640)
    np.testing.assert_array_equal(apply(CenterCrop(ratio=0.95), frame), frame[12:468, 16:624])


def test_a_crop_of_everything_is_the_frame():
    np.testing.assert_array_equal(apply(CenterCrop(ratio=1), noise(33, 20)), noise(33, 20))


def test_rotating_about_the_centre_twice_is_nothing():
    frame = noise(270, 480)
    np.testing.assert_array_equal(apply(Rotate180(), frame), frame[::-1, ::-1])
    np.testing.assert_array_equal(apply(Rotate180(), apply(Rotate180(), frame)), frame)


@pytest.mark.parametrize("size", [(270, 480), (271, 481), (270, 481), (5, 4)])
def test_rotating_about_a_pixel_is_the_published_warp(size):
    cv2 = pytest.importorskip("cv2")
    height, width = size
    frame = noise(height, width)
    turn = cv2.getRotationMatrix2D((width // 2, height // 2), 180, 1.0)
    np.testing.assert_array_equal(apply(Rotate180(about="pixel"), frame), cv2.warpAffine(frame, turn, (width, height)))


@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize("quality", [70, 95])
@pytest.mark.parametrize("size", [(480, 640), (101, 77)])
def test_the_jpeg_round_trip_is_opencvs(size, quality, swapped):
    """cv2 takes its input for BGR: giving it RGB, as the ARX script does, is our `swapped`."""
    cv2 = pytest.importorskip("cv2")
    for frame in both(*size):
        given = frame if swapped else np.ascontiguousarray(frame[..., ::-1])
        decoded = cv2.imdecode(cv2.imencode(".jpg", given, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], 1)
        expected = decoded if swapped else decoded[..., ::-1]
        np.testing.assert_array_equal(apply(Jpeg(quality=quality, swapped=swapped), frame), expected)


def test_the_jpeg_swap_matters():
    frame = scene(480, 640)
    assert (apply(Jpeg(quality=70), frame) != apply(Jpeg(quality=70, swapped=True), frame)).mean() > 0.1


def test_the_jpeg_is_a_real_one():
    frame = scene(64, 64)
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=70)  # Pillow's default subsampling is 4:2:0 as well
    np.testing.assert_array_equal(apply(Jpeg(quality=70), frame), np.asarray(Image.open(buffer)))


# ----------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("size", CAMERAS)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_leaves_what_the_vision_tower_takes(name, size):
    frame = noise(*size)
    kept = frame.copy()
    out = PRESETS[name](frame)
    assert out.shape == (252, 308, 3)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(frame, kept)


def test_arx_is_the_published_order_of_steps():
    cv2 = pytest.importorskip("cv2")
    frame = scene(480, 640)
    seen = cv2.imdecode(cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, 70])[1], 1)[12:468, 16:624]
    small = np.stack([naive.bilinear_antialias(seen[..., c], 240, 320) for c in range(3)], -1)
    small = np.floor(small + 1e-4).astype(np.uint8)
    expected = np.asarray(Image.fromarray(small).resize((308, 252), Image.Resampling.BICUBIC))
    difference = np.abs(PRESETS["arx"](frame).astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("name", ["franka", "franka-wrist"])
def test_franka_is_the_published_order_of_steps(name):
    cv2 = pytest.importorskip("cv2")
    frame = scene(720, 1280)
    seen = frame
    if name == "franka-wrist":
        turn = cv2.getRotationMatrix2D((240, 135), 180, 1.0)
        seen = cv2.warpAffine(cv2.resize(frame, (480, 270)), turn, (480, 270))
    small = cv2.resize(seen, (320, 240))
    expected = np.asarray(Image.fromarray(small).resize((308, 252), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(PRESETS[name](frame), expected)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name):
    again = Preprocessing.model_validate_json(PRESETS[name].model_dump_json())
    assert again == PRESETS[name]
    np.testing.assert_array_equal(again(scene(480, 640)), PRESETS[name](scene(480, 640)))


@pytest.mark.parametrize(
    "step", ['{"step": "blur"}', '{"step": "resize", "height": 28, "width": 28, "filter": "area"}', '{"step": "jpeg"}']
)
def test_unknown_steps_and_missing_settings_are_refused(step):
    with pytest.raises(ValueError, match="validation error"):
        Preprocessing.model_validate_json(f"[{step}]")


@pytest.mark.parametrize(
    "frame",
    [
        noise(48, 64).astype(np.float32),
        noise(48, 64)[..., 0],
        np.zeros((48, 64, 4), np.uint8),
        noise(48, 64).transpose(2, 0, 1),
        np.zeros((0, 64, 3), np.uint8),
    ],
    ids=["float", "grey", "with alpha", "planes first", "empty"],
)
def test_a_frame_that_is_not_rgb_is_refused(frame):
    with pytest.raises(ValueError, match=r"expected an RGB frame \[height, width, 3\] uint8"):
        PRESETS["plain"](frame)
