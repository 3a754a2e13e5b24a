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


# Weights that are worked on at a time: the temporaries stay small beside the largest map, the output head.
SLAB = 1 << 20

INT8 = BlockFormat(8, 128)
INT4 = BlockFormat(4, 128)


@dataclass(frozen=True)
class Quantized:
    """codes [N, blocks, block * bits / 8] uint8 (4 bits: even column in the low nibble), scales [N, blocks] fp32."""

    codes: NDArray[np.uint8]
    scales: Float


def quantize(weight: Float, form: BlockFormat) -> Quantized:
    """Quantize [N, K] rows; a block that is all zero keeps scale 1, so that it stays zero and finite.

    Raises ValueError for NaN or infinity: one of them would silence or poison its whole block.
    """
    rows, columns = weight.shape
    count = form.blocks(columns)
    codes = np.empty((rows, count, form.block * form.bits // 8), np.uint8)
    scales = np.empty((rows, count), np.float32)
    together = max(1, SLAB // (count * form.block))
    for start in range(0, rows, together):
        slab = slice(start, start + together)
        _quantize_rows(weight[slab], form, codes[slab], scales[slab])
        wrong = np.flatnonzero(~np.isfinite(scales[slab]).all(axis=1))
        if wrong.size:
            raise ValueError(
                f"row {start + wrong[0]} of [{rows}, {columns}] holds NaN or infinity, expected finite weights: "
                "the checkpoint is damaged or its training diverged"
            )
    return Quantized(codes, scales)


def _quantize_rows(weight: Float, form: BlockFormat, codes: NDArray[np.uint8], scales: Float) -> None:
    padded = np.zeros((len(weight), scales.shape[1] * form.block), np.float32)
    padded[:, : weight.shape[1]] = weight
    cut = padded.reshape(*scales.shape, form.block)
    limit = form.zero - 1
    scales[:] = np.abs(cut).max(axis=2) / np.float32(limit)
    if not np.isfinite(scales).all():
        return
    scales[scales == 0] = 1
    values = (np.clip(np.rint(cut / scales[:, :, None]), -limit, limit) + form.zero).astype(np.uint8)
    codes[:] = values if form.bits == 8 else values[:, :, ::2] | (values[:, :, 1::2] << 4)


def dequantize(quantized: Quantized, form: BlockFormat, columns: int) -> Float:
    """What an engine computes with: [N, columns] fp32."""
    codes = quantized.codes
    if form.bits == 4:
        low, high = codes & 15, codes >> 4
        codes = np.stack([low, high], axis=-1).reshape(*codes.shape[:2], -1)
    values = (codes.astype(np.float32) - form.zero) * quantized.scales[:, :, None]
    return np.ascontiguousarray(values.reshape(len(codes), -1)[:, :columns], np.float32)
