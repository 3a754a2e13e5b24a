"""From a camera frame to the patches of the vision tower, by the steps the checkpoint was trained behind.

A preprocessing is an ordered list of steps, each a value of `runtime.bundle`: what a manifest carries per camera. Here
the libraries that the published scripts call do the work; the robot's own code is compared with this.
"""

import io
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from pydantic import RootModel

from chatvla_edge.export.spec import VisionSpec
from chatvla_edge.runtime.bundle import CenterCrop, Jpeg, Resize, Rotate180, Step

_BICUBIC = Image.Resampling.BICUBIC

Frame = NDArray[np.uint8]
"""[height, width, 3] RGB."""

# CLIP's statistics, as Qwen2-VL's processor uses them.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def apply(step: Jpeg | CenterCrop | Rotate180 | Resize, frame: Frame) -> Frame:
    """One step on a [height, width, 3] frame; what each step means stands in `runtime.bundle`."""
    if isinstance(step, Jpeg):
        return _jpeg(step, frame)
    if isinstance(step, CenterCrop):
        return frame[step.rows_and_columns(*frame.shape[:2])]
    if isinstance(step, Rotate180):
        return _rotate(step, frame)
    return _resize(step, frame)


def _jpeg(step: Jpeg, frame: Frame) -> Frame:
    order = slice(None, None, -1 if step.swapped else 1)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame[..., order])).save(
        buffer, "JPEG", quality=step.quality, subsampling="4:2:0"
    )
    return np.ascontiguousarray(np.asarray(Image.open(buffer))[..., order])


def _rotate(step: Rotate180, frame: Frame) -> Frame:
    turned = np.ascontiguousarray(frame[::-1, ::-1])
    if step.about == "centre":
        return turned
    down, right = (1 - size % 2 for size in frame.shape[:2])
    shifted = np.zeros_like(turned)
    shifted[down:, right:] = turned[: frame.shape[0] - down, : frame.shape[1] - right]
    return shifted


def _resize(step: Resize, frame: Frame) -> Frame:
    if step.filter == "bicubic":
        # Across, then down, each rounded to bytes: what Pillow 12 and before do in one call, and what checkpoints were
        # trained behind. Pillow 13 goes down first for some shapes, one grey level off.
        across = Image.fromarray(np.ascontiguousarray(frame)).resize((step.width, frame.shape[0]), _BICUBIC)
        return np.asarray(across.resize((step.width, step.height), _BICUBIC))
    if step.filter == "bilinear_cv2":
        return _bilinear_cv2(frame, step.height, step.width)
    planes = torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1))).float()[None]
    resized = F.interpolate(planes, (step.height, step.width), mode="bilinear", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).contiguous().numpy().astype(np.uint8)


class Preprocessing(RootModel[tuple[Step, ...]]):
    """The ordered steps of one camera; the last one leaves a frame whose sides are multiples of 28 pixels."""

    def __call__(self, frame: Frame) -> Frame:
        """Apply all steps to a [height, width, 3] uint8 RGB frame."""
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or not frame.size:
            raise ValueError(f"expected an RGB frame [height, width, 3] uint8, found {frame.dtype} {list(frame.shape)}")
        for step in self.root:
            frame = apply(step, frame)
        return frame

    @classmethod
    def of(cls, *steps: Jpeg | CenterCrop | Rotate180 | Resize) -> "Preprocessing":
        """From steps in order."""
        return cls(tuple(steps))


# Qwen2-VL rounds 240 x 320 to multiples of 28: 252 x 308, hence 18 x 22 patches and 99 image tokens.
QWEN2_VL = Resize(height=252, width=308, filter="bicubic")

PRESETS: dict[str, Preprocessing] = {
    # A frame that already is 320 x 240, straight into Qwen2-VL's resize.
    "plain": Preprocessing.of(QWEN2_VL),
    # The public ARX evaluation: JPEG at quality 70, 95 % crop, 320 x 240.
    "arx": Preprocessing.of(
        Jpeg(quality=70, swapped=True),
        CenterCrop(ratio=0.95),
        Resize(height=240, width=320, filter="bilinear_float"),
        QWEN2_VL,
    ),
    # The public Franka evaluation: OpenCV's resize, no crop.
    "franka": Preprocessing.of(Resize(height=240, width=320, filter="bilinear_cv2"), QWEN2_VL),
    "franka-wrist": Preprocessing.of(
        Resize(height=270, width=480, filter="bilinear_cv2"),
        Rotate180(about="pixel"),
        Resize(height=240, width=320, filter="bilinear_cv2"),
        QWEN2_VL,
    ),
}


def patches(frame: Frame, vision: VisionSpec | None = None) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """Flattened patches as Qwen2-VL's processor orders them.

    frame: [height, width, 3] uint8 RGB, sides multiples of patch * merge = 28.
    Returns [rows * columns, C * 2 * 14 * 14] float32 and the grid (rows, columns). Patches of one 2 x 2 merge group
    stand together; inside a patch: channel, temporal slice, row, column. Both temporal slices are this one frame.
    """
    vision = vision or VisionSpec()
    side, merge = vision.patch, vision.merge
    height, width = frame.shape[:2]
    if height % (side * merge) or width % (side * merge):
        raise ValueError(
            f"a frame of {height} x {width} cannot be cut into merged patches: both sides must be multiples of "
            f"{side * merge}; end the preprocessing with a resize to such a size"
        )
    rows, columns = height // side, width // side
    # The processor's own order: rescale in float64, one rounding to float32, then the normalisation in float32.
    scaled = (frame.astype(np.float64) * (1 / 255)).astype(np.float32)
    normal = (scaled - MEAN) / STD
    cut = normal.reshape(rows // merge, merge, side, columns // merge, merge, side, 3)
    grouped = cut.transpose(0, 3, 1, 4, 6, 2, 5)  # group row, group column, row in group, column in group, C, y, x
    doubled = np.repeat(grouped[:, :, :, :, :, None], vision.temporal_patch, axis=5)
    return np.ascontiguousarray(doubled.reshape(rows * columns, -1)), (rows, columns)


def _bilinear_cv2(frame: Frame, height: int, width: int) -> Frame:
    """OpenCV's INTER_LINEAR on uint8, to the last grey level: 11-bit weights, products shifted as its code does.

    Beyond the border both taps read the border pixel and keep their fractional weights: down a column each product is
    shifted by itself, so this can be one grey level less than one tap of full weight.
    """
    above, below, top, bottom = _taps(frame.shape[0], height)
    left, right, near, far = _taps(frame.shape[1], width)
    source = frame.astype(np.int32)
    across = source[:, left] * near[:, None] + source[:, right] * far[:, None]
    upper = (across[above] >> 4) * top[:, None, None] >> 16
    lower = (across[below] >> 4) * bottom[:, None, None] >> 16
    out: Frame = np.clip((upper + lower + 2) >> 2, 0, 255).astype(np.uint8)
    return out


def _taps(size: int, wanted: int) -> Sequence[NDArray[np.int32]]:
    """Indices of both taps, held inside the frame, and their weights in 1/2048."""
    centre = ((np.arange(wanted) + 0.5) * (size / wanted) - 0.5).astype(np.float32)
    first = np.floor(centre).astype(np.int32)
    fraction = (centre - first).astype(np.float32)
    near = np.rint((1 - fraction) * np.float32(2048)).astype(np.int32)
    far = np.rint(fraction * np.float32(2048)).astype(np.int32)
    return np.clip(first, 0, size - 1), np.clip(first + 1, 0, size - 1), near, far
