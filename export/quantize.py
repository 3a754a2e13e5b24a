"""Block-wise weight quantization: symmetric, round to nearest, one scale per block of a row.

Better rounding (calibrated, GPTQ-like) takes the same form later: values that fit the same blocks.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]


# A linear map with fewer inputs or outputs than this stays fp32: it is no load. Few inputs would be blocks of padding;
# few outputs are where an error weighs most (the gate of the shared experts, the actions themselves).
SMALLEST = 64


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a quantized bundle holds this linear map [N, K] in blocks.

    The router never: an expert chosen wrongly is wrong by everything.
    """
    return min(shape) >= SMALLEST and ".router." not in name


@dataclass(frozen=True)
class BlockFormat:
    """bits per weight (4 or 8) and weights per scale."""

    bits: int
    block: int

    @property
    def zero(self) -> int:
        """The code of 0: codes are unsigned and centred."""
        return 1 << (self.bits - 1)

    def blocks(self, columns: int) -> int:
        """Scales per row."""
        return -(-columns // self.block)


INT8 = BlockFormat(8, 128)
INT4 = BlockFormat(4, 128)


@dataclass(frozen=True)
class Quantized:
    """codes [N, blocks, block * bits / 8] uint8 (4 bits: even column in the low nibble), scales [N, blocks] fp32."""

    codes: NDArray[np.uint8]
    scales: Float


def quantize(weight: Float, form: BlockFormat) -> Quantized:
    """Quantize [N, K] rows; a block that is all zero keeps scale 1, so that it stays zero and finite."""
    rows, columns = weight.shape
    count = form.blocks(columns)
    padded = np.zeros((rows, count * form.block), np.float32)
    padded[:, :columns] = weight
    cut = padded.reshape(rows, count, form.block)
    limit = form.zero - 1
    scales = (np.abs(cut).max(axis=2) / np.float32(limit)).astype(np.float32)
    scales[scales == 0] = 1
    codes = np.clip(np.rint(cut / scales[:, :, None]), -limit, limit).astype(np.int16) + form.zero
    packed = codes.astype(np.uint8)
    if form.bits == 4:
        packed = packed[:, :, ::2] | (packed[:, :, 1::2] << 4)
    return Quantized(np.ascontiguousarray(packed), scales)


def dequantize(quantized: Quantized, form: BlockFormat, columns: int) -> Float:
    """What an engine computes with: [N, columns] fp32."""
    codes = quantized.codes
    if form.bits == 4:
        low, high = codes & 15, codes >> 4
        codes = np.stack([low, high], axis=-1).reshape(*codes.shape[:2], -1)
    values = (codes.astype(np.float32) - form.zero) * quantized.scales[:, :, None]
    return np.ascontiguousarray(values.reshape(len(codes), -1)[:, :columns], np.float32)
