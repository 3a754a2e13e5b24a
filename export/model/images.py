"""From a camera frame to the patches of the vision tower, by the steps the checkpoint was trained behind.

A preprocessing is an ordered list of steps, each a value: what a bundle's manifest will carry per camera. Filters and
rounding are named exactly, because the published pipelines mix three libraries that disagree in the last grey level.
"""

import io
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, RootModel

from chatvla_edge.export.spec import Data, VisionSpec

_BICUBIC = Image.Resampling.BICUBIC

Frame = NDArray[np.uint8]
"""[height, width, 3] RGB."""

# CLIP's statistics, as Qwen2-VL's processor uses them.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


class Jpeg(Data):
    """A JPEG round trip, 4:2:0. `swapped` feeds RGB to the codec as if it were BGR, as the ARX script does."""

    step: Literal["jpeg"] = "jpeg"
    quality: int = Field(ge=1, le=100)
    swapped: bool = False

    def apply(self, frame: Frame) -> Frame:
        """Encode and decode."""
        order = slice(None, None, -1 if self.swapped else 1)
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(frame[..., order])).save(
            buffer, "JPEG", quality=self.quality, subsampling="4:2:0"
        )
        return np.ascontiguousarray(np.asarray(Image.open(buffer))[..., order])


class CenterCrop(Data):
    """Keep the middle `ratio` of both axes: rows int(h (1-r)/2) to int(h (1+r)/2), likewise columns."""

    step: Literal["center_crop"] = "center_crop"
    ratio: float = Field(gt=0, le=1)

    def apply(self, frame: Frame) -> Frame:
        """A 480 x 640 frame at 0.95 keeps rows 12:468 and columns 16:624."""
        (top, bottom), (left, right) = (
            (int(size * (1 - self.ratio) / 2), int(size * (1 + self.ratio) / 2)) for size in frame.shape[:2]
        )
        return frame[top:bottom, left:right]


class Rotate180(Data):
    """For a camera mounted upside down (the Franka rig's wrist camera).

    centre   about the frame's centre: both axes flipped
    pixel    about pixel (height // 2, width // 2), as the public Franka script calls OpenCV: along an even side the
             picture lands one pixel further, and the first row or column is black
    """

    step: Literal["rotate_180"] = "rotate_180"
    about: Literal["centre", "pixel"] = "centre"

    def apply(self, frame: Frame) -> Frame:
        """Turn by half a circle."""
        turned = np.ascontiguousarray(frame[::-1, ::-1])
        if self.about == "centre":
            return turned
        down, right = (1 - size % 2 for size in frame.shape[:2])
        shifted = np.zeros_like(turned)
        shifted[down:, right:] = turned[: frame.shape[0] - down, : frame.shape[1] - right]
        return shifted


class Resize(Data):
    """Resize to exactly height x width.

    bicubic          Pillow's: antialiased, fixed point, rounded                       (Qwen2-VL's own resize)
    bilinear_float   torchvision's on float tensors: antialiased, then truncated       (ARX and AgileX scripts)
    bilinear_cv2     OpenCV's INTER_LINEAR: two taps without antialias, 11-bit weights (Franka and the training data)
    """

    step: Literal["resize"] = "resize"
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    filter: Literal["bicubic", "bilinear_float", "bilinear_cv2"]

    def apply(self, frame: Frame) -> Frame:
        """[h, w, 3] -> [height, width, 3]."""
        if self.filter == "bicubic":
            # Across, then down, each rounded to bytes: what Pillow 12 and before do in one call, and what checkpoints
            # were trained behind. Pillow 13 goes down first for some shapes: other grey levels.
            across = Image.fromarray(np.ascontiguousarray(frame)).resize((self.width, frame.shape[0]), _BICUBIC)
            return np.asarray(across.resize((self.width, self.height), _BICUBIC))
        if self.filter == "bilinear_cv2":
            return _bilinear_cv2(frame, self.height, self.width)
        planes = torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1))).float()[None]
        resized = F.interpolate(planes, (self.height, self.width), mode="bilinear", antialias=True, align_corners=False)
        return resized[0].permute(1, 2, 0).contiguous().numpy().astype(np.uint8)


Step = Annotated[Jpeg | CenterCrop | Rotate180 | Resize, Field(discriminator="step")]


class Preprocessing(RootModel[tuple[Step, ...]]):
    """The ordered steps of one camera; the last one leaves a frame whose sides are multiples of 28 pixels."""

    def __call__(self, frame: Frame) -> Frame:
        """Apply all steps to a [height, width, 3] uint8 RGB frame."""
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or not frame.size:
            raise ValueError(f"expected an RGB frame [height, width, 3] uint8, found {frame.dtype} {list(frame.shape)}")
        for step in self.root:
            frame = step.apply(frame)
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

    Beyond the border both taps read the border pixel. Along a row their weights have become (1, 0) by then; down a
    column they keep their fractions, and since each product is shifted by itself, that can cost one grey level.
    """
    above, below, top, bottom = _taps(frame.shape[0], height)
    left, right, near, far = _taps(frame.shape[1], width)
    outside = left == right
    near, far = np.where(outside, 2048, near), np.where(outside, 0, far)
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
