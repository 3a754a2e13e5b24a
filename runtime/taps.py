"""Which input pixels each output pixel of a resize reads, and with which weights, as three libraries compute them.

Every rounding below is theirs: Pillow's tables are float64, normalised, then rounded to 22 fractional bits; PyTorch's
are float32 with the intermediate float64 steps that C's promotion rules give its expressions; OpenCV's are two taps
of 11 fractional bits. Computed once per axis, when a pipeline is made.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Taps(NamedTuple):
    """Output i is the sum of input[first[i] + k] * weight[i, k] over k < counts[i].

    first, counts  [outputs] int32
    weight         [outputs, most taps] int32 or float32; past counts[i] it is not read
    """

    first: NDArray[np.int32]
    counts: NDArray[np.int32]
    weight: NDArray[np.int32] | NDArray[np.float32]


def bicubic(size: int, wanted: int) -> Taps:
    """Pillow's cubic convolution (a = -0.5), widened by the scale when it shrinks; weights in 1/2^22."""
    scale = size / wanted
    widening = max(scale, 1.0)
    reach = 2.0 * widening
    centre = (np.arange(wanted) + 0.5) * scale
    first = np.maximum((centre - reach + 0.5).astype(np.int32), 0)
    count = np.minimum((centre + reach + 0.5).astype(np.int32), size) - first
    tap = np.arange(count.max())
    x = np.abs((tap + first[:, None] - centre[:, None] + 0.5) * (1.0 / widening))
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    weight = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    weight[tap >= count[:, None]] = 0.0
    weight /= _summed_in_order(weight)[:, None]
    # Half of a unit away from zero, then cut towards it.
    whole = (weight * (1 << 22) + np.where(weight < 0.0, -0.5, 0.5)).astype(np.int32)
    return Taps(first, count, whole)


def bilinear_float(size: int, wanted: int) -> Taps:
    """PyTorch's triangle, widened by the scale when it shrinks; float32."""
    f32, f64 = np.float32, np.float64
    scale = f32(size) / f32(wanted)
    reach = max(scale, f32(1))
    shrink = f32(1.0 / f64(scale)) if scale >= 1 else f32(1)
    centre = (f64(scale) * (np.arange(wanted) + 0.5)).astype(f32)
    first = np.maximum(((centre - reach).astype(f64) + 0.5).astype(np.int32), 0)
    count = np.minimum(((centre + reach).astype(f64) + 0.5).astype(np.int32), size) - first
    tap = np.arange(count.max())
    # An integer less a float32 is a float32; the 0.5 that is added makes it a float64.
    apart = (tap + first[:, None]).astype(f32) - centre[:, None]
    x = np.abs(((apart.astype(f64) + 0.5) * f64(shrink)).astype(f32))
    weight = np.where(x < 1, 1.0 - x.astype(f64), 0.0).astype(f32)
    weight[tap >= count[:, None]] = 0
    return Taps(first, count, (weight / _summed_in_order(weight)[:, None]).astype(f32, copy=False))


def bilinear_cv2(size: int, wanted: int, keeps_fraction: bool) -> Taps:
    """OpenCV's two taps in 1/2^11.

    Beyond the border both taps are the border pixel: one tap is counted. Along a row its weight has become 1 by then;
    down a column (`keeps_fraction`) both keep theirs, since there each product is cut by itself.
    """
    centre = ((np.arange(wanted) + 0.5) * (size / wanted) - 0.5).astype(np.float32)
    above = np.floor(centre).astype(np.int32)
    fraction = centre - above.astype(np.float32)
    weight = np.rint(np.stack([1 - fraction, fraction], 1) * np.float32(2048)).astype(np.int32)
    first, last = np.clip(above, 0, size - 1), np.clip(above + 1, 0, size - 1)
    if not keeps_fraction:
        weight[first == last] = (2048, 0)
    return Taps(first, last - first + 1, weight)


def _summed_in_order(weight: NDArray[np.float64] | NDArray[np.float32]) -> NDArray[np.float64] | NDArray[np.float32]:
    """Sum over taps, first to last: numpy's own sum adds pairwise, which rounds elsewhere."""
    total = np.zeros(len(weight), weight.dtype)
    for k in range(weight.shape[1]):
        total += weight[:, k]
    return total
