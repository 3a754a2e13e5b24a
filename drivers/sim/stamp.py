"""A sequence number and a time, drawn into a picture so that a program can read them back.

Four rows of 32 fields across the top eighth: the sequence (32 bits), the time (64 bits, ns), a check sum (16 bits), and
16 fields of alternating black and white. Read off the picture that a policy is shown, it proves which frame that is,
after any resize or JPEG round trip that leaves a field a few pixels.
"""

import binascii
import struct

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]

COLUMNS, ROWS = 32, 4
SHARE = 32  # a field is this part of the height, so the stamp is an eighth of it
SMALLEST = (2 * SHARE, 2 * COLUMNS)  # height, width of a picture that can carry one
_GUARD = 0b0101010101010101


def write(image: Image, sequence: int, time_ns: int) -> None:
    """Draw into ``image`` [H, W, 3], at least 64 x 64."""
    body = struct.pack(">IQ", sequence % 2**32, time_ns)
    bits = np.unpackbits(np.frombuffer(body + struct.pack(">HH", binascii.crc_hqx(body, 0), _GUARD), np.uint8))
    rows, columns = _edges(image)
    for row, line in enumerate(255 * bits.reshape(ROWS, COLUMNS)):
        widths = np.diff(columns)
        image[rows[row] : rows[row + 1]] = np.repeat(line, widths)[None, :, None]


def read(image: Image) -> tuple[int, int] | None:
    """(sequence, time in ns) of a picture, or None where there is no stamp that can be read."""
    if image.shape[0] < SHARE or image.shape[1] < COLUMNS:
        return None
    rows, columns = _edges(image)
    middle_rows, middle_columns = (rows[:-1] + rows[1:]) // 2, (columns[:-1] + columns[1:]) // 2
    fields = image[np.ix_(middle_rows, middle_columns)].mean(axis=2) > 127
    body, (check, guard) = np.packbits(fields).tobytes()[:12], struct.unpack(">HH", np.packbits(fields).tobytes()[12:])
    if guard != _GUARD or check != binascii.crc_hqx(body, 0):
        return None
    sequence, time_ns = struct.unpack(">IQ", body)
    return sequence, time_ns


def _edges(image: Image) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    height, width = image.shape[:2]
    rows = np.arange(ROWS + 1) * height // SHARE
    columns = np.arange(COLUMNS + 1) * width // COLUMNS
    return rows, columns
