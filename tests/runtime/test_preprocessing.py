"""Frames to patches in C: the reference's numbers to the last bit, whatever the camera, the steps and the memory."""

import ctypes
import mmap
import sys
import threading
import tracemalloc
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatvla_edge.runtime import jpeg as codec
from chatvla_edge.runtime import taps
from chatvla_edge.runtime.bundle import Resize
from chatvla_edge.runtime.preprocessing import FOLDED, UNFOLDED, Pipeline, normalised_grey_levels

CAMERAS = [(480, 640), (270, 480), (376, 672), (720, 1280), (1080, 1920), (240, 320)]
FILTERS = ["bicubic", "bilinear_float", "bilinear_cv2"]


def noise(height, width, seed=0):
    """Every grey level beside every other: the hardest picture for a resize."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def slopes(height, width):
    """Slow drift with flat areas: sums land on and beside whole numbers, where truncation decides."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return (((x + 2 * y) // 7 + 80 * c) % 256).astype(np.uint8)


def white(height, width):
    return np.full((height, width, 3), 255, np.uint8)


def crop(ratio):
    return SimpleNamespace(step="center_crop", ratio=ratio)


def turn(about):
    return SimpleNamespace(step="rotate_180", about=about)


def resize(height, width, name):
    return SimpleNamespace(step="resize", height=height, width=width, filter=name)


def jpeg(quality, swapped=False):
    return SimpleNamespace(step="jpeg", quality=quality, swapped=swapped)


LAST = resize(252, 308, "bicubic")


def folded(pipeline):
    return np.full((pipeline.n_patches, FOLDED), np.nan, np.float32)


@pytest.fixture(scope="module")
def reference():
    """The PyTorch reference's preprocessing, as its x86-64 builds compute on a processor with AVX2."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("PIL")
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ("AVX2", "AVX512"):
        pytest.skip(f"PyTorch rounds its float resize by instruction set; ours is that of AVX2, this is {capability}")
    from chatvla_edge.export.model import images

    return images


def compare(images, steps, frame, kernels="auto"):
    expected = images.Preprocessing.model_validate([vars(step) for step in steps])(frame)
    pipeline = Pipeline(steps, height=frame.shape[0], width=frame.shape[1], kernels=kernels)
    np.testing.assert_array_equal(pipeline.picture(frame), expected)
    rows, grid = images.patches(expected)
    assert pipeline.grid == grid
    out = np.full((pipeline.n_patches, UNFOLDED), np.nan, np.float32)
    pipeline.run(frame, out)
    np.testing.assert_array_equal(out, rows)
    once = folded(pipeline)
    pipeline.run(frame, once)
    np.testing.assert_array_equal(once.reshape(-1, 3, 196), rows.reshape(-1, 3, 2, 196)[:, :, 0])


# ------------------------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("size", CAMERAS)
@pytest.mark.parametrize("name", ["plain", "arx", "franka", "franka-wrist"])
def test_every_preset_is_the_references_bit_for_bit(reference, name, size):
    steps = [SimpleNamespace(**step.model_dump()) for step in reference.PRESETS[name].root]
    compare(reference, steps, noise(*size))
    compare(reference, steps, slopes(*size), kernels="plain")


def test_no_preset_is_forgotten(reference):
    assert set(reference.PRESETS) == {"plain", "arx", "franka", "franka-wrist"}


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("name", FILTERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_resize_of_any_size_to_any_size_is_the_references(reference, name, kernels, data):
    # From two pixels on: PyTorch 2.13 enlarges a picture one pixel wide by repeating its first row.
    height, width, rows, columns = (data.draw(st.integers(2, 200)) for _ in range(4))
    frame = data.draw(st.sampled_from([noise, slopes, white]))(height, width)
    compare(reference, [resize(rows, columns, name), resize(28, 56, "bicubic")], frame, kernels)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_steps_in_any_order_are_the_references(reference, data):
    height, width = data.draw(st.integers(8, 120)), data.draw(st.integers(8, 120))
    step = st.one_of(
        st.builds(crop, st.floats(0.7, 1)),
        st.builds(turn, st.sampled_from(["centre", "pixel"])),
        st.builds(resize, st.integers(8, 90), st.integers(8, 90), st.sampled_from(FILTERS)),
        st.builds(jpeg, st.integers(1, 100), st.booleans()),
    )
    steps = [*data.draw(st.lists(step, max_size=5)), resize(56, 28, data.draw(st.sampled_from(FILTERS)))]
    compare(reference, steps, noise(height, width, data.draw(st.integers(0, 99))))


def test_flat_pictures_keep_pytorchs_truncated_grey_levels(reference):
    """Weights that do not quite add up to one make 199 out of 200 here and there: the same ones."""
    pipeline = Pipeline([resize(252, 308, "bilinear_float")], height=456, width=608)
    theirs = reference.Resize(height=252, width=308, filter="bilinear_float")
    darkened = 0
    for grey in range(256):
        frame = np.full((456, 608, 3), grey, np.uint8)
        expected = reference.apply(theirs, frame)
        np.testing.assert_array_equal(pipeline.picture(frame), expected)
        darkened += int((expected != grey).sum())
    assert darkened > 0


def test_a_picture_that_needs_no_resize_is_cut_as_it_is(reference):
    compare(reference, [], noise(56, 84))
    compare(reference, [turn("centre")], noise(56, 84))
    compare(reference, [crop(0.5)], noise(112, 112))


def test_a_320x240_frame_is_transformers_processors():
    processing = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    for frame in (noise(240, 320), slopes(240, 320)):
        theirs = processing.Qwen2VLImageProcessorPil()(images=[frame], return_tensors="np")
        pipeline = Pipeline([LAST], height=240, width=320)
        assert [[1, *pipeline.grid]] == theirs["image_grid_thw"].tolist()
        out = np.empty((pipeline.n_patches, UNFOLDED), np.float32)
        pipeline.run(frame, out)
        np.testing.assert_array_equal(out, theirs["pixel_values"])


@pytest.mark.parametrize("size", CAMERAS)
@pytest.mark.parametrize("name", FILTERS)
def test_plain_and_wide_loops_give_the_same_numbers(name, size):
    """Needs no other library, so it also runs on a robot."""
    steps = [crop(0.95), resize(240, 320, name), LAST]
    frame = noise(*size)
    wide, plain = (Pipeline(steps, height=size[0], width=size[1], kernels=k) for k in ("auto", "plain"))
    np.testing.assert_array_equal(wide.picture(frame), plain.picture(frame))


# ------------------------------------------------------------------------------------------------ memory and threads


@pytest.mark.parametrize(
    "look",
    [
        lambda frame: np.ascontiguousarray(frame[..., ::-1])[..., ::-1],
        lambda frame: np.ascontiguousarray(frame[::-1, ::-1])[::-1, ::-1],
        lambda frame: np.ascontiguousarray(frame.transpose(2, 0, 1)).transpose(1, 2, 0),
        lambda frame: np.dstack([frame, frame[..., :1]])[..., :3],
        lambda frame: np.dstack([frame[..., ::-1], frame[..., :1]])[..., 2::-1],
        lambda frame: np.repeat(np.repeat(frame, 2, 0), 3, 1)[::2, ::3],
        np.asfortranarray,
    ],
    ids=["BGR", "turned", "planes", "RGBA", "BGRA", "every other", "Fortran"],
)
@pytest.mark.parametrize(
    "steps", [[LAST], [turn("pixel"), LAST], [jpeg(70), LAST], [crop(0.9), LAST]], ids=lambda steps: steps[0].step
)
def test_strides_do_not_matter(look, steps):
    if steps[0].step == "jpeg":
        pytest.importorskip("PIL")
    frame = noise(60, 83)
    pipeline = Pipeline(steps, height=60, width=83)
    expected = pipeline.picture(frame)
    view = look(frame)
    np.testing.assert_array_equal(view, frame)
    np.testing.assert_array_equal(pipeline.picture(view), expected)


@pytest.mark.parametrize("name", FILTERS)
def test_nothing_is_read_outside_of_the_frame(name):
    """The frame fills its pages to the last byte, or from the first; the pages around it may not be read."""
    page = mmap.PAGESIZE
    height, width = 5, 4 * page // 15  # the last block of four rows is not full
    size = height * width * 3
    pages = -(-size // page)
    area = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    protect = ctypes.CDLL(None).mprotect
    for guard in (start, start + (pages + 1) * page):
        assert protect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    pipeline = Pipeline([resize(28, 28, name)], height=height, width=width)
    for address in (start + page, start + (pages + 1) * page - size):
        memory = (ctypes.c_uint8 * size).from_address(address)
        frame = np.frombuffer(memory, np.uint8).reshape(height, width, 3)
        frame[:] = noise(height, width)
        for view in (frame, frame[..., ::-1], frame[:, ::-1], frame[::-1, :, ::-1]):
            np.testing.assert_array_equal(pipeline.picture(view), pipeline.picture(view.copy()))


def test_the_frame_is_only_read():
    frame = noise(480, 640)
    kept = frame.copy()
    frame.flags.writeable = False
    pipeline = Pipeline([crop(0.95), turn("pixel"), LAST], height=480, width=640)
    pipeline.run(frame, folded(pipeline))
    np.testing.assert_array_equal(frame, kept)


def test_a_frame_leaves_nothing_behind_for_the_next():
    steps = [resize(270, 480, "bilinear_cv2"), turn("pixel"), resize(240, 320, "bilinear_float"), LAST]
    pipeline = Pipeline(steps, height=480, width=640)
    first, second = noise(480, 640, 1), slopes(480, 640)
    fresh = Pipeline(steps, height=480, width=640).picture(second)
    pipeline.picture(first)
    np.testing.assert_array_equal(pipeline.picture(second), fresh)


def test_a_frame_allocates_nothing():
    steps = [crop(0.95), turn("pixel"), resize(240, 320, "bilinear_float"), resize(270, 480, "bilinear_cv2"), LAST]
    pipeline = Pipeline(steps, height=480, width=640)
    frame, out = noise(480, 640), folded(pipeline)
    pipeline.run(frame, out)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for _ in range(20):
            pipeline.run(frame, out)
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Shape tuples and the like come and go; the smallest picture of this pipeline has 300 KB, and C's malloc is not
    # called at all in resampling.h.
    assert now - before < 1024
    assert peak - before < 2048


def test_other_threads_run_meanwhile_and_a_second_call_is_refused():
    """Both show that the GIL is released: with it, no other thread would get to ask while a frame is at work."""
    pipeline = Pipeline([resize(2800, 2800, "bicubic")], height=1080, width=1920)
    frame = noise(1080, 1920)
    expected = folded(pipeline)
    pipeline.run(frame, expected)
    out, spare = folded(pipeline), folded(pipeline)
    refused: list[str] = []
    for _ in range(20):
        thread = threading.Thread(target=pipeline.run, args=(frame, out))
        thread.start()
        while thread.is_alive() and not refused:
            try:
                pipeline.run(frame, spare)
            except RuntimeError as error:
                refused.append(str(error))
        thread.join()
        if refused:
            break
    assert "give each thread its own" in refused[0]
    np.testing.assert_array_equal(out, expected)
    pipeline.run(frame, spare)  # and it works on
    np.testing.assert_array_equal(spare, expected)


def test_pipelines_in_many_threads_do_not_meet():
    steps = [crop(0.95), resize(240, 320, "bilinear_float"), LAST]
    frames = [noise(480, 640, seed) for seed in range(4)]
    expected = [Pipeline(steps, height=480, width=640).picture(frame) for frame in frames]
    found = [None] * 4

    def work(index):
        pipeline = Pipeline(steps, height=480, width=640)
        for _ in range(5):
            found[index] = pipeline.picture(frames[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (np.zeros((48, 64, 4), np.uint8), r"\[48, 64, 4\]; of BGRA, frame\[\.\.\., 2::-1\] is RGB"),
        (np.zeros((48, 64), np.uint8), r"expected an RGB frame \[48, 64, 3\] uint8, found uint8 \[48, 64\]"),
        (np.zeros((48, 64, 3), np.float32), "found float32"),
        (np.zeros((3, 48, 64), np.uint8), r"found uint8 \[3, 48, 64\]"),
        (np.zeros((0, 64, 3), np.uint8), "48 x 64 pixels, .* found 0 x 64"),
        (np.zeros((64, 48, 3), np.uint8), "48 x 64 pixels, .* found 64 x 48; set the camera"),
        (b"bytes", "found bytes"),
        (None, "found NoneType"),
    ],
    ids=["BGRA", "grey", "float", "planes", "empty", "portrait", "bytes", "nothing"],
)
def test_another_frame_is_refused(frame, message):
    pipeline = Pipeline([LAST], height=48, width=64)
    with pytest.raises(ValueError, match=message):
        pipeline.run(frame, folded(pipeline))
    with pytest.raises(ValueError, match=message):
        pipeline.picture(frame)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.zeros((396, 600), np.float32), r"expected room for \[396, 588\] or \[396, 1176\] float32"),
        (np.zeros((395, FOLDED), np.float32), r"found float32 \[395, 588\]"),
        (np.zeros((396, FOLDED)), "found float64"),
        (np.zeros(396 * FOLDED, np.float32), "expected room"),
        (np.zeros((396, 2 * FOLDED), np.float32)[:, ::2], "contiguous"),
        (np.frombuffer(bytes(4 * 396 * FOLDED), np.float32).reshape(396, FOLDED), "writable"),
        (None, "found NoneType"),
    ],
    ids=["columns", "rows", "float64", "flat", "strided", "read-only", "nothing"],
)
def test_another_room_for_patches_is_refused(out, message):
    pipeline = Pipeline([LAST], height=48, width=64)
    with pytest.raises(ValueError, match=message):
        pipeline.run(noise(48, 64), out)
    pipeline.run(noise(48, 64), folded(pipeline))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "leaves 48 x 64 pixels, .* multiples of 28"),
        ([resize(240, 320, "bicubic")], "leaves 240 x 320 pixels"),
        ([SimpleNamespace(step="blur")], "step 1: 'blur' is unknown; expected center_crop, jpeg"),
        ([LAST, resize(28, 28, "area")], "step 2: filter 'area' is unknown; expected bicubic"),
        ([SimpleNamespace(step="resize", height=28, width=28)], "step 1: .*filter"),
        ([resize(0, 28, "bicubic")], "0 x 28 pixels"),
        ([turn("corner"), LAST], "about 'corner'"),
        ([crop(0.0), LAST], r"step 1: a crop to 0\.0 of 48 x 64 pixels; expected a ratio"),
        ([crop(1.5), LAST], r"step 1: a crop to 1\.5"),
        ([jpeg(0), LAST], "JPEG quality 0"),
    ],
)
def test_steps_that_cannot_be_done_are_refused_when_compiled(steps, message):
    with pytest.raises(ValueError, match=message):
        Pipeline(steps, height=48, width=64)


def test_a_camera_without_pixels_and_unknown_kernels_are_refused():
    with pytest.raises(ValueError, match="0 x 64 pixels"):
        Pipeline([LAST], height=0, width=64)
    with pytest.raises(ValueError, match="expected 'auto' or 'plain'"):
        Pipeline([LAST], height=48, width=64, kernels="fast")


def test_a_pipeline_is_compiled_once():
    pipeline = Pipeline([LAST], height=48, width=64)
    with pytest.raises(RuntimeError, match="compiled once"):
        pipeline.__init__([LAST], height=48, width=64)


# -------------------------------------------------------------------------------------------------------------- JPEG


def test_without_a_jpeg_step_pillow_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    Pipeline([LAST], height=48, width=64).picture(noise(48, 64))
    with pytest.raises(ModuleNotFoundError, match="PIL"):
        Pipeline([jpeg(70), LAST], height=48, width=64)


def test_another_codec_is_refused(monkeypatch):
    pytest.importorskip("PIL")
    monkeypatch.setattr(codec, "_probe", lambda: noise(37, 53))
    with pytest.raises(ValueError, match=r"JPEG codec behind Pillow .* expected .*bc4a91ba"):
        Pipeline([jpeg(70), LAST], height=48, width=64)


def test_opencvs_codec_knows_the_probe_too():
    """Another build of libjpeg-turbo, fed from outside: the expected digests are not one library's own business."""
    cv2 = pytest.importorskip("cv2")
    for quality, expected in zip(codec.QUALITIES, codec.EXPECTED, strict=True):
        given = np.ascontiguousarray(codec._probe()[..., ::-1])
        encoded = cv2.imencode(".jpg", given, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        assert zlib.crc32(cv2.imdecode(encoded, 1)[..., ::-1].tobytes()) == expected


# ------------------------------------------------------------------------------------------------------------ tables


@pytest.mark.parametrize("table", [taps.bicubic, taps.bilinear_float])
@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 3000), wanted=st.integers(1, 1500))
def test_taps_stay_inside_the_picture_and_add_up_to_one(table, size, wanted):
    first, count, weight = table(size, wanted)
    assert (first >= 0).all()
    assert (count >= 1).all()
    assert (first + count <= size).all()
    assert weight.shape == (wanted, count.max())
    assert (weight[np.arange(weight.shape[1]) >= count[:, None]] == 0).all()
    one = 1 << 22 if weight.dtype == np.int32 else 1
    # Rounding errs by half a unit a tap (integers), or by a few ulp in all (floats).
    assert np.abs(weight.sum(1, dtype=np.float64) / one - 1).max() <= max(0.5 * weight.shape[1] / (1 << 22), 1e-6)


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 3000), wanted=st.integers(1, 1500), keeps_fraction=st.booleans())
def test_opencvs_two_taps_stay_inside_the_picture_and_add_up_to_2048(size, wanted, keeps_fraction):
    first, count, weight = taps.bilinear_cv2(size, wanted, keeps_fraction)
    assert (first >= 0).all()
    assert set(count) <= {1, 2}
    assert (first + count <= size).all()
    assert (weight >= 0).all()
    assert (np.abs(weight.sum(1) - 2048) <= 1).all()


def test_grey_levels_are_normalised_as_the_reference_does(reference):
    scaled = (np.arange(256)[:, None] * np.ones(3) * (1 / 255)).astype(np.float32)
    np.testing.assert_array_equal(normalised_grey_levels(), ((scaled - reference.MEAN) / reference.STD).T)


def test_a_pipeline_for_pictures_ends_in_any_size_and_makes_no_patches():
    cv2 = pytest.importorskip("cv2")
    frame = np.random.default_rng(5).integers(0, 256, (720, 1280, 3), np.uint8)
    step = Resize(step="resize", height=270, width=480, filter="bilinear_cv2")
    pipeline = Pipeline([step], height=720, width=1280, patches=False)
    np.testing.assert_array_equal(pipeline.picture(frame), cv2.resize(frame, (480, 270)))
    with pytest.raises(ValueError, match="makes pictures only"):
        pipeline.run(frame, np.empty((4, 588), np.float32))
    with pytest.raises(ValueError, match="cannot be cut into merged patches"):
        Pipeline([step], height=720, width=1280)
