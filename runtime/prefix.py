"""The soft mask of real-time chunking: how strongly each row of a new chunk is held to what is already committed."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Schedule = Literal["smooth", "exp", "linear", "hard"]


def prefix_weights(horizon: int, committed: int, overlap: int, schedule: Schedule = "smooth") -> NDArray[np.float64]:
    """[H] float64 in [0, 1]: 1 for the committed rows, falling to 0 at the end of the overlap, 0 after it.

    ``committed``: rows that will be executed before the new chunk arrives (d); ``overlap``: rows for which the present
    plan has an action (H - s); an overlap shorter than the delay wins. After the committed rows, with
    c = (H-s-i) / (H-s-d+1):

    - ``exp``: c (e^c - 1) / (e - 1), Equation 5 of Black, Galliker and Levine, "Real-Time Execution of Action Chunking
      Flow Policies" (2025). It weighs a guidance gradient, and it leaves 1 at a slope;
    - ``smooth``: (10 c^3 - 15 c^4 + 6 c^5)^2, with slope 0 at both ends. For a sampler that mixes by the mask, as
      inpainting does: there the slope of the mask times the disagreement of two chunks is a step in velocity, at the
      row after the committed ones, which is where the seam will be (benchmarks/seams.py shows it);
    - ``linear``: c; ``hard``: the committed rows only.

    Raises ValueError for negative counts or an unknown schedule.
    """
    if horizon < 1 or committed < 0 or overlap < 0:
        raise ValueError(f"horizon {horizon}, committed {committed}, overlap {overlap}; none may be negative, H >= 1")
    overlap = min(overlap, horizon)
    committed = min(committed, overlap)
    row = np.arange(horizon)
    if schedule == "hard":
        return (row < committed).astype(np.float64)
    c = np.clip((overlap - row) / (overlap - committed + 1), 0.0, 1.0)
    if schedule == "smooth":
        c = (c**3 * (10 - 15 * c + 6 * c * c)) ** 2
    elif schedule == "exp":
        c = c * np.expm1(c) / np.expm1(1.0)
    elif schedule != "linear":
        raise ValueError(f"schedule {schedule!r}; expected smooth, exp, linear or hard")
    return np.where(row < committed, 1.0, np.where(row < overlap, c, 0.0))
