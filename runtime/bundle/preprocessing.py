"""The steps from a camera's frame to the frame that the vision stage cuts into patches, as data.

Filters and rounding are named exactly, because the published pipelines mix three libraries that disagree in the last
grey level. How each step is computed belongs to who computes it; what it does to a frame's size is here.
"""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from .values import Data

Size = tuple[int, int]
"""Height and width in pixels."""

Side = Annotated[int, Field(ge=1, le=16384)]


class Jpeg(Data):
    """A JPEG round trip, 4:2:0. `swapped` feeds RGB to the codec as if it were BGR, as the ARX script does."""

    step: Literal["jpeg"] = "jpeg"
    quality: int = Field(ge=1, le=100)
    swapped: bool = False

    def size(self, height: int, width: int) -> Size:
        """As it was."""
        return height, width


class CenterCrop(Data):
    """Keep the middle `ratio` of both axes: rows int(h (1-r)/2) to int(h (1+r)/2), likewise columns."""

    step: Literal["center_crop"] = "center_crop"
    ratio: float = Field(gt=0, le=1)

    def rows_and_columns(self, height: int, width: int) -> tuple[slice, slice]:
        """What is kept: 12:468 and 16:624 of a 480 x 640 frame at 0.95."""
        rows, columns = (
            slice(int(side * (1 - self.ratio) / 2), int(side * (1 + self.ratio) / 2)) for side in (height, width)
        )
        return rows, columns

    def size(self, height: int, width: int) -> Size:
        """Of the part that is kept."""
        rows, columns = self.rows_and_columns(height, width)
        return rows.stop - rows.start, columns.stop - columns.start


class Rotate180(Data):
    """For a camera mounted upside down (the Franka rig's wrist camera).

    centre   about the frame's centre: both axes flipped
    pixel    about pixel (height // 2, width // 2), as the public Franka script calls OpenCV: along an even side the
             picture lands one pixel further, and the first row or column is black
    """

    step: Literal["rotate_180"] = "rotate_180"
    about: Literal["centre", "pixel"] = "centre"

    def size(self, height: int, width: int) -> Size:
        """As it was."""
        return height, width


class Resize(Data):
    """Resize to exactly height x width.

    bicubic          Pillow's: antialiased, fixed point, rounded                       (Qwen2-VL's own resize)
    bilinear_float   torchvision's on float tensors: antialiased, then truncated       (ARX and AgileX scripts)
    bilinear_cv2     OpenCV's INTER_LINEAR: two taps without antialias, 11-bit weights (Franka and the training data)
    """

    step: Literal["resize"] = "resize"
    height: Side
    width: Side
    filter: Literal["bicubic", "bilinear_float", "bilinear_cv2"]

    def size(self, height: int, width: int) -> Size:
        """The one it names."""
        return self.height, self.width


Step = Annotated[Jpeg | CenterCrop | Rotate180 | Resize, Field(discriminator="step")]


def size_after(steps: Iterable[Jpeg | CenterCrop | Rotate180 | Resize], height: int, width: int) -> Size:
    """Height and width after all steps.

    Raises ValueError where a step leaves nothing of the frame.
    """
    for step in steps:
        height, width = step.size(height, width)
        if height < 1 or width < 1:
            raise ValueError(f"the step {step.step} leaves {height} x {width} pixels of the frame")
    return height, width
