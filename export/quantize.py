"""Weight quantization: symmetric, round to nearest, one scale per block of a row or per row.

Better rounding (calibrated, GPTQ-like) takes the same form later: values that fit the same blocks. A precision says
which form each linear map of the policy takes.
"""

import re
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
    """bits per weight (4 or 8) and weights per scale; block 0: one scale for the whole row."""

    bits: int
    block: int

    @property
    def zero(self) -> int:
        """The code of 0: codes are unsigned and centred."""
        return 1 << (self.bits - 1)

    def width(self, columns: int) -> int:
        """Weights per scale in rows of so many columns."""
        return self.block or columns

    def blocks(self, columns: int) -> int:
        """Scales per row."""
        return -(-columns // self.width(columns))

    def bits_per_weight(self, columns: int) -> float:
        """Bits of codes and scales for one weight, padding included."""
        return self.blocks(columns) * (self.width(columns) * self.bits + 32) / columns


# Weights that are worked on at a time: the temporaries stay small beside the largest map, the output head.
SLAB = 1 << 20

INT8 = BlockFormat(8, 128)
INT4 = BlockFormat(4, 128)
ROW8 = BlockFormat(8, 0)


@dataclass(frozen=True)
class Precision:
    """The form of linear maps. experts: those of the language model's MLPs, routed or not; maps: all others.

    None keeps fp32. A form with one scale per row is multiplied in integers, with activations rounded to 8 bits by one
    scale per row of theirs; one with blocks by blocks.
    """

    name: str
    experts: BlockFormat | None
    maps: BlockFormat | None

    @property
    def quantizes(self) -> bool:
        """Whether any map is not fp32."""
        return self.experts is not None or self.maps is not None

    def form(self, name: str, shape: tuple[int, ...]) -> BlockFormat | None:
        """The form of the parameter `name` [N, K]."""
        if not is_quantized(name, shape):
            return None
        return self.experts if _EXPERT.fullmatch(name) else self.maps


_EXPERT = re.compile(r"backbone\.language\.layers\.\d+\.mlp\..*")

PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32", None, None),
        Precision("int8", INT8, INT8),
        Precision("int8-row", ROW8, ROW8),
        Precision("int4", INT4, INT4),
        Precision("int4-row", INT4, ROW8),
    )
}


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
    count, width = form.blocks(columns), form.width(columns)
    codes = np.empty((rows, count, width * form.bits // 8), np.uint8)
    scales = np.empty((rows, count), np.float32)
    together = max(1, SLAB // (count * width))
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
    width = form.width(weight.shape[1])
    padded = np.zeros((len(weight), scales.shape[1] * width), np.float32)
    padded[:, : weight.shape[1]] = weight
    cut = padded.reshape(*scales.shape, width)
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
