"""Digits as people write them and as printers print them.

`digits.npz` holds the 1797 handwritten digits (8 x 8, 0..16) that scikit-learn carries as `load_digits`: the test set
of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI Machine Learning Repository 1998,
CC BY 4.0), 13 writers, in the order of the data set. It names no writers, but writes them one after the other: the
last fifth is held out and is taken for other writers, which holds but for the writer on the border.
"""

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.float32]

HELD_OUT = 360
"""Images at the end of the data set that no training sees."""

# 5 x 7 dots, as character displays have them.
_PRINTED = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00010 00100 01000 11111",
    "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)


@cache
def handwritten(digit: int, held_out: bool) -> Mask:
    """All images of a digit in one split, [N, 8, 8] in 0..1."""
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        images, labels = file["images"], file["labels"]
    part = slice(-HELD_OUT, None) if held_out else slice(None, -HELD_OUT)
    chosen: Mask = images[part][labels[part] == digit].astype(np.float32) / np.float32(16)
    return chosen


@cache
def printed(number: int) -> Mask:
    """A number as a mask [7, 5] (two digits: [7, 11]) in 0..1."""
    glyphs = [
        np.array([[float(dot) for dot in row] for row in _PRINTED[int(figure)].split()], np.float32)
        for figure in str(number)
    ]
    gap = np.zeros((7, 1), np.float32)
    parts = [part for glyph in glyphs for part in (gap, glyph)][1:]
    return np.concatenate(parts, axis=1)
