"""The JPEG round trip of a camera's preprocessing, by Pillow, which is imported when a pipeline asks for it.

A policy trained behind JPEG pictures sees their artefacts, so the codec must be libjpeg-turbo's with its exact
("islow") DCT and 4:2:0 chroma. Codecs differ by up to 13 grey levels at quality 70; `load` checks the one it found.
"""

import io
import zlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

RoundTrip = Callable[[NDArray[np.uint8], int], NDArray[np.uint8]]
"""[height, width, 3] uint8 and the quality -> the same shape, decoded."""

QUALITIES = (30, 70, 95)
# CRC-32 of `_probe` after libjpeg-turbo's exact DCT at these qualities.
EXPECTED = (0xBC4A91BA, 0xBBF6B1C3, 0x2FC4B288)


def load() -> RoundTrip:
    """The codec, after a check that it gives the pictures that checkpoints were trained behind.

    Raises ModuleNotFoundError without Pillow, ValueError when another codec stands behind it.
    """
    from PIL import Image

    def round_trip(frame: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
        return np.asarray(Image.open(buffer))

    _check(round_trip)
    return round_trip


def _check(round_trip: RoundTrip) -> None:
    found = tuple(zlib.crc32(round_trip(_probe(), quality).tobytes()) for quality in QUALITIES)
    if found != EXPECTED:
        raise ValueError(
            f"the JPEG codec behind Pillow decodes a known picture to {[f'{crc:08x}' for crc in found]} at qualities "
            f"{list(QUALITIES)}, expected {[f'{crc:08x}' for crc in EXPECTED]} (libjpeg-turbo, exact DCT): the policy "
            "would see other pictures than in training; install Pillow from its own wheels"
        )


def _probe() -> NDArray[np.uint8]:
    """[37, 53, 3]: slopes, edges and noise, odd sides, from integers only."""
    y, x, c = np.meshgrid(np.arange(37), np.arange(53), np.arange(3), indexing="ij")
    slope = 3 * x + 2 * y + 40 * c
    edges = 90 * ((x // 9 + y // 7) % 2)
    noise = (x * 7919 + y * 104729 + c * 1299709) * 2654435761 % 4294967296 // 67108864
    probe: NDArray[np.uint8] = ((slope + edges + noise) % 256).astype(np.uint8)
    return probe
