"""Does a camera see what it saw in training? A frame beside a stored reference picture.

The policy knows one view. A camera that was bumped, a lens that is out of focus, another exposure: all of them change
its answers before anybody notices. The scene itself may differ (other objects, the arm elsewhere), so structure is
compared block by block and its median counts.

Method, in numpy: rotation and scale by the Fourier-Mellin transform (Reddy and Chatterji 1996), shift by orientation
correlation (Fitch et al. 2002), which looks at directions of gradients and so past the lighting. Then the frame is laid
onto the reference and the gradients are compared.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chatvla_edge.drivers.protocols import Image

Gray = npt.NDArray[np.float64]

WORK_ROWS = 240  # larger pictures are shrunk by a whole factor to at most about this
ANGLES = 360  # half a turn: half a degree each
RADII = 192
BLOCKS = 8  # per side


@dataclass(frozen=True)
class ViewLimits:
    """What is let pass.

    Shift and rotation: what the public training code varies at random (crops of 95 %, +-5 degrees); half of it, for the
    other half is the policy's margin. Scale: it is not varied there, and a crop is off by no more. Light and focus: our
    choice, above what an automatic exposure does in a steady room. Structure: the same view with a third of the scene
    changed stays above 0.5, another scene below 0.2 (tests).
    """

    shift: float = 0.0125  # of the width, or height
    rotation_deg: float = 2.5
    scale: float = 0.025
    brightness: float = 0.25  # of the reference's mean
    colour: float = 0.15  # of the reference's red over green, blue over green
    sharpness: float = 0.5  # least share of the reference's; and at most its inverse
    structure: float = 0.35


@dataclass(frozen=True)
class ViewReport:
    """What differs, and which of it is too much.

    Attributes:
        shift: x and y by which the frame's content lies off the reference's, pixels of the frame.
        rotation_deg: by which it is turned, counter-clockwise.
        scale: by which it is larger.
        brightness: mean grey over the reference's.
        colour: red over green, and blue over green, each over the reference's.
        sharpness: variance of the Laplacian over the reference's.
        structure: 1 for the same picture, about 0 for another scene.
        problems: sentences; empty where the view is good.
    """

    shift: tuple[float, float]
    rotation_deg: float
    scale: float
    brightness: float
    colour: tuple[float, float]
    sharpness: float
    structure: float
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the camera sees what it saw."""
        return not self.problems


def check_view(frame: Image, reference: Image, limits: ViewLimits | None = None) -> ViewReport:
    """Compare two pictures `[H, W, 3]` uint8 RGB of one size. Some 50 ms. Raises ValueError for different sizes."""
    if frame.shape != reference.shape or frame.ndim != 3:
        raise ValueError(f"found a frame of {frame.shape} and a reference of {reference.shape}, expected one size")
    factor = max(1, frame.shape[0] // WORK_ROWS)
    seen, known = _shrunk(_gray(frame), factor), _shrunk(_gray(reference), factor)
    shift, rotation, scale, structure = _aligned(seen, known)
    report = ViewReport(
        shift=(factor * shift[0], factor * shift[1]),
        rotation_deg=float(np.degrees(rotation)),
        scale=scale,
        brightness=_over(float(frame.mean()), float(reference.mean())),
        colour=_colour(frame, reference),
        sharpness=_over(_sharpness(_gray(frame)), _sharpness(_gray(reference))),
        structure=structure,
        problems=(),
    )
    problems = tuple(_problems(report, frame.shape[1], frame.shape[0], limits or ViewLimits()))
    return ViewReport(**{**vars(report), "problems": problems})


def _problems(report: ViewReport, width: int, height: int, limits: ViewLimits) -> list[str]:
    found = []
    if report.structure < limits.structure:
        # Nothing fits, so where it would fit best says nothing.
        found.append(
            f"structure agrees by {report.structure:.2f}, expected {limits.structure:g} at least: another view, a "
            "covered lens, or the wrong reference"
        )
    else:
        x, y = report.shift
        if abs(x) > limits.shift * width or abs(y) > limits.shift * height:
            found.append(
                f"shifted by {x:+.1f} px right, {y:+.1f} px down; expected at most {limits.shift * width:.1f} and "
                f"{limits.shift * height:.1f}: turn the camera back"
            )
        if abs(report.rotation_deg) > limits.rotation_deg:
            found.append(f"turned by {report.rotation_deg:+.1f} degrees, expected at most {limits.rotation_deg:g}")
        if abs(report.scale - 1) > limits.scale:
            found.append(
                f"{report.scale:.3f} times as large, expected 1 +- {limits.scale:g}: nearer, farther, or zoomed"
            )
        if not limits.sharpness <= report.sharpness <= 1 / limits.sharpness:
            found.append(f"sharpness is {report.sharpness:.2f} of the reference's: clean and focus the lens")
    if abs(report.brightness - 1) > limits.brightness:
        found.append(f"brightness is {report.brightness:.2f} of the reference's: look at light and exposure")
    if max(abs(ratio - 1) for ratio in report.colour) > limits.colour:
        red, blue = report.colour
        found.append(f"red is {red:.2f} and blue {blue:.2f} of the reference's beside green: fix the white balance")
    return found


# ------------------------------------------------------------------------------------------------------------- pictures


def _gray(image: Image) -> Gray:
    return np.asarray(image @ np.array([0.299, 0.587, 0.114]), np.float64)


def _shrunk(gray: Gray, factor: int) -> Gray:
    """Means of blocks; what is left over at the edges is cut off."""
    rows, columns = gray.shape[0] // factor, gray.shape[1] // factor
    blocks = gray[: rows * factor, : columns * factor].reshape(rows, factor, columns, factor)
    return np.asarray(blocks.mean(axis=(1, 3)))


def _over(found: float, reference: float) -> float:
    return found / max(reference, 1e-6)


def _colour(frame: Image, reference: Image) -> tuple[float, float]:
    seen, known = frame.mean(axis=(0, 1)) + 1, reference.mean(axis=(0, 1)) + 1
    return float(seen[0] / seen[1] / (known[0] / known[1])), float(seen[2] / seen[1] / (known[2] / known[1]))


def _sharpness(gray: Gray) -> float:
    """Variance of the Laplacian over that of the picture, so that contrast and brightness fall out."""
    laplacian = gray[1:-1, 2:] + gray[1:-1, :-2] + gray[2:, 1:-1] + gray[:-2, 1:-1] - 4 * gray[1:-1, 1:-1]
    return float(laplacian.var() / max(gray.var(), 1e-6))


# ------------------------------------------------------------------------------------------------------------ alignment


def _aligned(seen: Gray, known: Gray) -> tuple[tuple[float, float], float, float, float]:
    """Shift (px), rotation (rad), scale that lay the known picture onto the seen one, and how well it then fits."""
    best: tuple[tuple[float, float], float, float, float] | None = None
    # The transform of Fourier and Mellin can be misled; without any rotation may fit better.
    for rotation, scale in ((0.0, 1.0), _rotation_and_scale(seen, known)):
        turned = _warped(known, rotation, scale, (0.0, 0.0))
        shift = _shift(seen, turned)
        structure = _structure(seen, _warped(known, rotation, scale, shift))
        if best is None or structure > best[3] + 0.02:
            best = (shift, rotation, scale, structure)
    assert best is not None
    return best


def _gradient(gray: Gray) -> npt.NDArray[np.complex128]:
    field = np.zeros(gray.shape, np.complex128)
    field.real[:, 1:-1] = gray[:, 2:] - gray[:, :-2]
    field.imag[1:-1] = gray[2:] - gray[:-2]
    return field


def _window(shape: tuple[int, ...]) -> Gray:
    return np.asarray(np.hanning(shape[0])[:, None] * np.hanning(shape[1])[None, :])


def _shift(seen: Gray, known: Gray) -> tuple[float, float]:
    window = _window(seen.shape)
    fields = []
    for gray in (seen, known):
        # Smooth first: what belongs to the sensor (its pattern of noise, hot pixels) stands still when the view moves.
        field = _gradient(_smooth(gray))
        size = np.abs(field)
        # Directions only, but none where there is no edge: noise has a direction everywhere.
        fields.append(np.fft.fft2(window * field / (size + np.quantile(size, 0.7) + 1e-9)))
    surface = np.fft.ifft2(fields[0] * np.conj(fields[1])).real
    return _peak(surface)


def _peak(surface: Gray) -> tuple[float, float]:
    """Place of the maximum as signed x and y, between the samples by a parabola."""
    row, column = np.unravel_index(int(np.argmax(surface)), surface.shape)
    places = []
    for axis, at in ((1, int(column)), (0, int(row))):
        line = surface[row] if axis == 1 else surface[:, column]
        before, here, after = line[at - 1], line[at], line[(at + 1) % line.size]
        bend = before - 2 * here + after
        offset = 0.0 if bend == 0 else 0.5 * (before - after) / bend
        place = at + offset
        places.append(float(place - line.size if place > line.size / 2 else place))
    return places[0], places[1]


def _rotation_and_scale(seen: Gray, known: Gray) -> tuple[float, float]:
    window = _window(seen.shape)
    least = 8 / min(seen.shape)  # cycles per pixel: below are light and window
    radii = np.geomspace(least, 0.45, RADII)
    angles = np.linspace(0, np.pi, ANGLES, endpoint=False)
    polar = []
    for gray in (seen, known):
        spectrum = np.log1p(np.abs(np.fft.fft2(window * (gray - gray.mean()))))
        sampled = _sampled(
            np.fft.fftshift(spectrum),
            seen.shape[0] / 2 + np.sin(angles)[:, None] * radii * seen.shape[0],
            seen.shape[1] / 2 + np.cos(angles)[:, None] * radii * seen.shape[1],
        )
        sampled = sampled - sampled.mean(axis=0)
        polar.append(np.fft.fft2(sampled * np.hanning(RADII)[None, :]))
    cross = polar[0] * np.conj(polar[1])
    surface = np.fft.ifft2(cross / (np.abs(cross) + 1e-9 * np.abs(cross).max() + 1e-30)).real
    # Only what a camera that was bumped can do: 30 degrees, a quarter larger or smaller.
    step = np.log(radii[1] / radii[0])
    rows, columns = round(ANGLES / 6), round(np.log(1.25) / step)
    allowed = np.zeros(surface.shape, bool)
    allowed[np.ix_(np.r_[: rows + 1, -rows:0], np.r_[: columns + 1, -columns:0])] = True
    x, y = _peak(np.where(allowed, surface, surface.min()))
    return float(-y * np.pi / ANGLES), float(np.exp(-x * step))


def _sampled(picture: Gray, rows: Gray, columns: Gray) -> Gray:
    """Bilinear; places outside take the edge."""
    rows = np.clip(rows, 0, picture.shape[0] - 1.001)
    columns = np.clip(columns, 0, picture.shape[1] - 1.001)
    top, left = rows.astype(np.intp), columns.astype(np.intp)
    down, right = rows - top, columns - left
    upper = picture[top, left] * (1 - right) + picture[top, left + 1] * right
    lower = picture[top + 1, left] * (1 - right) + picture[top + 1, left + 1] * right
    return np.asarray(upper * (1 - down) + lower * down)


def _warped(picture: Gray, rotation: float, scale: float, shift: tuple[float, float]) -> Gray:
    """The picture turned counter-clockwise about its middle, enlarged, then shifted."""
    if rotation == 0 and scale == 1 and shift == (0.0, 0.0):
        return picture
    middle_row, middle_column = (picture.shape[0] - 1) / 2, (picture.shape[1] - 1) / 2
    rows, columns = np.indices(picture.shape, dtype=np.float64)
    rows, columns = rows - middle_row - shift[1], columns - middle_column - shift[0]
    cosine, sine = np.cos(rotation) / scale, np.sin(rotation) / scale
    # Rows count downwards, so counter-clockwise for the eye is clockwise in (column, row).
    return _sampled(
        picture, middle_row + cosine * rows + sine * columns, middle_column + cosine * columns - sine * rows
    )


def _structure(seen: Gray, known: Gray) -> float:
    """Median over blocks of the reference that hold edges: cosine between the gradients, weighed by their size."""
    one, other = _gradient(_smooth(seen)), _gradient(_smooth(known))
    edge = max(1, min(seen.shape) // 20)  # the edges of the pictures: what was shifted out
    one, other = one[edge:-edge, edge:-edge], other[edge:-edge, edge:-edge]
    agreement = (one * np.conj(other)).real
    rows, columns = one.shape[0] // BLOCKS, one.shape[1] // BLOCKS

    def blocks(field: Gray) -> Gray:
        cut = field[: rows * BLOCKS, : columns * BLOCKS].reshape(BLOCKS, rows, BLOCKS, columns)
        return np.asarray(cut.sum(axis=(1, 3))).ravel()

    # Gradients of another brightness and contrast count as equal: compared with the geometric mean of both energies.
    energy = np.sqrt(blocks(np.abs(one) ** 2) * blocks(np.abs(other) ** 2))
    full = blocks(np.abs(other) ** 2)
    ratios = blocks(agreement) / np.maximum(energy, 1e-9)
    return float(np.median(ratios[full >= np.quantile(full, 0.25)]))


def _smooth(gray: Gray) -> Gray:
    """Binomial, 5 by 5: noise has gradients, too."""
    for axis in (0, 1):
        padded = np.pad(gray, [(2, 2) if place == axis else (0, 0) for place in (0, 1)], mode="edge")
        taps = [np.take(padded, range(k, k + gray.shape[axis]), axis=axis) for k in range(5)]
        gray = (taps[0] + 4 * taps[1] + 6 * taps[2] + 4 * taps[3] + taps[4]) / 16
    return gray
