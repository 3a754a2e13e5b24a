"""Antialiased shapes and stamps on a float picture, seen from straight above.

A picture is [height, width, 3] float32 in grey levels; its coordinates are metres, x to the right and y upwards.
Every shape touches only the pixels of its own bounding box.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.float32]
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Canvas:
    """A picture and the rectangle of the world that it shows: x in [left, right], y in [bottom, top], metres."""

    pixels: Picture
    left: float
    right: float
    bottom: float
    top: float

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels per metre across and down."""
        height, width = self.pixels.shape[:2]
        return width / (self.right - self.left), height / (self.top - self.bottom)

    def _box(self, x: float, y: float, reach: float) -> tuple[slice, slice, Picture, Picture] | None:
        """Rows and columns within `reach` of a point, and the offsets of their centres from it, m."""
        across, down = self.scale
        height, width = self.pixels.shape[:2]
        column, row = (x - self.left) * across, (self.top - y) * down
        first = max(int(column - reach * across) - 1, 0), max(int(row - reach * down) - 1, 0)
        last = min(int(column + reach * across) + 2, width), min(int(row + reach * down) + 2, height)
        if first[0] >= last[0] or first[1] >= last[1]:
            return None
        xs = ((np.arange(first[0], last[0], dtype=np.float32) + 0.5 - column) / across).astype(np.float32)
        ys = ((row - 0.5 - np.arange(first[1], last[1], dtype=np.float32)) / down).astype(np.float32)
        return slice(first[1], last[1]), slice(first[0], last[0]), xs[None], ys[:, None]

    def _blend(self, rows: slice, columns: slice, coverage: Picture, colour: Colour) -> None:
        part = self.pixels[rows, columns]
        part += coverage[..., None] * (np.asarray(colour, np.float32) - part)

    def rectangle(self, x: float, y: float, width: float, height: float, angle: float, colour: Colour) -> None:
        """A filled rectangle around (x, y), turned by `angle` rad."""
        box = self._box(x, y, float(np.hypot(width, height)) / 2)
        if box is None:
            return
        rows, columns, dx, dy = box
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        u, v = dx * c + dy * s, dy * c - dx * s
        outside = np.maximum(np.abs(u) - np.float32(width / 2), np.abs(v) - np.float32(height / 2))
        self._blend(rows, columns, np.clip(0.5 - outside * np.float32(self.scale[0]), 0, 1), colour)

    def stroke(self, a: tuple[float, float], b: tuple[float, float], width: float, colour: Colour) -> None:
        """A line from a to b with round ends."""
        x, y = (a[0] + b[0]) / 2, (a[1] + b[1]) / 2
        half = np.hypot(b[0] - a[0], b[1] - a[1]) / 2
        box = self._box(x, y, float(half) + width / 2)
        if box is None:
            return
        rows, columns, dx, dy = box
        angle = np.arctan2(b[1] - a[1], b[0] - a[0])
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        along, beside = np.maximum(np.abs(dx * c + dy * s) - np.float32(half), 0), dy * c - dx * s
        outside = np.sqrt(along * along + beside * beside) - np.float32(width / 2)
        self._blend(rows, columns, np.clip(0.5 - outside * np.float32(self.scale[0]), 0, 1), colour)

    def stamp(
        self, mask: Picture, x: float, y: float, width: float, height: float, angle: float, slant: float, colour: Colour
    ) -> None:
        """Ink through a mask [rows, columns] in 0..1, bilinear, centred on (x, y), `width` x `height` m, turned."""
        box = self._box(x, y, float(np.hypot(width * (1 + abs(slant)), height)) / 2)
        if box is None:
            return
        rows, columns, dx, dy = box
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        u, v = dx * c + dy * s, dy * c - dx * s
        u = u - np.float32(slant) * v
        tall, wide = mask.shape
        across = np.clip((u / np.float32(width) + 0.5) * wide + 0.5, 0, wide + 0.999)
        down = np.clip((0.5 - v / np.float32(height)) * tall + 0.5, 0, tall + 0.999)
        padded = np.pad(mask, 1)
        i, j = down.astype(np.intp), across.astype(np.intp)
        p, q = (down - i).astype(np.float32), (across - j).astype(np.float32)
        upper = padded[i, j] * (1 - q) + padded[i, np.minimum(j + 1, wide + 1)] * q
        low = np.minimum(i + 1, tall + 1)
        lower = padded[low, j] * (1 - q) + padded[low, np.minimum(j + 1, wide + 1)] * q
        self._blend(rows, columns, upper * (1 - p) + lower * p, colour)
