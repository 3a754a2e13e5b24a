"""The normalisation statistics of a training run: read from ``dataset_stats.pkl``, kept as JSON.

The training scripts clip every standard deviation at 1e-2 and widen the range of actions by 1e-4 on both sides; state
is normalised by mean and standard deviation, the diffusion head's actions span [-1, 1] from ``action_min`` to
``action_max`` (ChatVLA_public and DexVLA, ``data_utils/utils.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import CheckpointError, at, refusal
from .files import file_size, inside, open_for_reading
from .pickles import load_plain_pickle

FILE_NAMES = ("dataset_stats.json", "dataset_stats.pkl")
STD_FLOOR = 1e-2
# In every public file and needed by nothing: one recorded episode, [T, S].
_IGNORED = "example_qpos"
_SCHEMA = 1
# An episode of 10 000 steps of 14 float64 is a megabyte.
LARGEST = 64 << 20

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Statistics:
    """Normalisation statistics, in the units of the recorded data; A action components, S state components.

    Attributes:
        action_mean, action_std, action_min, action_max: [A] float32.
        qpos_mean, qpos_std: [S] float32, the robot's state.
    """

    action_mean: Float32
    action_std: Float32
    action_min: Float32
    action_max: Float32
    qpos_mean: Float32
    qpos_std: Float32

    @property
    def action_dim(self) -> int:
        """A."""
        return len(self.action_min)

    @property
    def state_dim(self) -> int:
        """S."""
        return len(self.qpos_mean)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Statistics):
            return NotImplemented
        return all(np.array_equal(getattr(self, key), getattr(other, key)) for key in KEYS)

    __hash__ = None  # type: ignore[assignment]

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for the user: components that hardly moved while the data was recorded."""
        return tuple(
            f"{key}: components {still.tolist()} are at the floor of {STD_FLOOR}, so they hardly moved in training."
            for key in ("action_std", "qpos_std")
            if (still := np.flatnonzero(getattr(self, key) <= np.float32(STD_FLOOR))).size
        )

    def check_dims(self, action_dim: int, state_dim: int, origin: str = "the statistics") -> None:
        """Raise a `CheckpointError` if A or S are not those of the model."""
        found, expected = (self.action_dim, self.state_dim), (action_dim, state_dim)
        if found != expected:
            raise refusal(
                origin,
                found=f"{found[0]} action and {found[1]} state components",
                expected=f"{expected[0]} and {expected[1]}, as the model's tensors have",
                do="Pass the dataset_stats.pkl of this training run.",
            )

    def to_json(self) -> str:
        """Return the text of ``dataset_stats.json``; `parse_json` gives back the same float32 bits."""
        table = {key: [float(item) for item in getattr(self, key)] for key in KEYS}
        return json.dumps({"schema": _SCHEMA, **table}, indent=1, allow_nan=False) + "\n"


KEYS = tuple(field.name for field in fields(Statistics))


def find_statistics(checkpoint: str | Path) -> Path | None:
    """Return the statistics file that belongs to a checkpoint, or None.

    Looked for in the directory itself, in its parent (where the training scripts put it), and one further up where the
    parent is itself a checkpoint's folder. A JSON beside a pickle is preferred.

    Raises:
        CheckpointError: it is a link that leaves its directory.
    """
    directory = Path(checkpoint).absolute()
    if directory.is_file():
        directory = directory.parent
    places = [directory, directory.parent]
    if "checkpoint" in directory.parent.name:
        places.append(directory.parent.parent)
    found = ((place, name) for place in places for name in FILE_NAMES if (place / name).is_file())
    return next((inside(place, name, place) for place, name in found), None)


def load_statistics(path: str | Path, task: str | None = None) -> Statistics:
    """Return the statistics in a ``dataset_stats.pkl`` or ``.json``; nothing in a pickle is run.

    Args:
        path: the file.
        task: which task's, where the file keeps them per task.

    Raises:
        CheckpointError: the file cannot be read, a key is missing, or an array has the wrong shape, type or values.
    """
    path = Path(path)
    with open_for_reading(path) as file:
        if (size := file_size(file)) > LARGEST:
            raise refusal(
                path,
                found=f"{size} bytes",
                expected=f"at most {LARGEST}: a few vectors, and one recorded episode",
                do="Pass the dataset_stats.pkl of the training run.",
            )
    if path.suffix != ".json":
        return parse_statistics(load_plain_pickle(path), str(path), task)
    with open_for_reading(path) as file:
        try:
            return parse_json(file.read().decode("utf-8"), str(path), task)
        except UnicodeDecodeError:
            raise refusal(path, found="bytes that are no UTF-8", expected="JSON", do="Write it anew.") from None


def parse_json(text: str, origin: str, task: str | None = None) -> Statistics:
    """Return the statistics in the text of a ``dataset_stats.json``."""
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refusal(origin, found=f"no JSON ({error})", expected="statistics", do="Write it anew.") from None
    if isinstance(table, dict) and table.pop("schema", _SCHEMA) != _SCHEMA:
        raise refusal(
            origin, found="an unknown schema", expected=f"schema {_SCHEMA}", do="Use the version that wrote it."
        )
    return parse_statistics(table, origin, task)


def parse_statistics(table: Any, origin: str, task: str | None = None) -> Statistics:
    """Return the statistics in a table of arrays (or of lists of numbers), or in a table of such tables by task."""
    if not isinstance(table, Mapping):
        raise refusal(
            origin,
            found=f"a {type(table).__name__}",
            expected="a dict of arrays",
            do="Pass the dataset_stats.pkl of the training run.",
        )
    table = _of_task(table, origin, task)
    absent = [key for key in KEYS if key not in table]
    unknown = [str(key) for key in table if key not in KEYS and key != _IGNORED]
    if absent or unknown:
        raise refusal(
            origin,
            found=", ".join([*(f"no {key}" for key in absent), *(f"the unknown key {key!r}" for key in unknown)]),
            expected=f"{', '.join(KEYS)} (and {_IGNORED}, which is ignored)",
            do="Pass the dataset_stats.pkl of the training run, or write a dataset_stats.json with these keys.",
        )
    arrays = {key: _vector(table[key], at(origin, key)) for key in KEYS}
    for prefix in ("action", "qpos"):
        sizes = {key: len(array) for key, array in arrays.items() if key.startswith(prefix)}
        if len(set(sizes.values())) != 1:
            raise refusal(
                origin, found=f"lengths {sizes}", expected="one length", do="The file is damaged: copy it again."
            )
    for key, array in arrays.items():
        width = arrays["action_max"] - arrays["action_min"] if key == "action_max" else array
        bad = np.flatnonzero(width <= 0)
        if bad.size and not key.endswith(("mean", "min")):
            raise refusal(
                at(origin, key),
                found=f"components {bad.tolist()} not above {'action_min' if key == 'action_max' else 'zero'}",
                expected="a positive range, which the training scripts ensure (std >= 1e-2, max - min >= 2e-4)",
                do="Normalisation would divide by zero or turn the action around: recompute the statistics.",
            )
    return Statistics(**arrays)


def _of_task(table: Mapping[Any, Any], origin: str, task: str | None) -> Mapping[Any, Any]:
    """Return the table of one task where the file keeps several."""
    tasks = sorted(str(key) for key, value in table.items() if isinstance(value, Mapping))
    if not tasks:
        if task is None:
            return table
        raise refusal(
            origin, found=f"one table, without task {task!r}", expected="tables by task", do="Leave the task out."
        )
    if task in tasks:
        chosen: Mapping[Any, Any] = table[task]
        return chosen
    raise refusal(
        origin,
        found=f"statistics for the tasks {', '.join(tasks)}",
        expected="the choice of one" if task is None else f"task {task!r} among them",
        do=f"Name the task, e.g. {tasks[0]}.",
    )


def _vector(value: Any, where: str) -> Float32:
    """Return a read-only [N] float32 copy of an array or a list of numbers."""
    if isinstance(value, list) and all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in value):
        try:
            value = np.array(value, dtype=np.float64)
        except OverflowError:  # an integer beyond every float
            value = None
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.size == 0 or value.dtype.kind != "f":
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        raise refusal(where, found=found, expected="a vector of floats", do="The file is damaged: copy it again.")
    with np.errstate(over="ignore"):
        vector: Float32 = value.astype(np.float32)
    if not np.isfinite(vector).all():
        raise refusal(
            where,
            found=f"NaN or infinity at {np.flatnonzero(~np.isfinite(vector)).tolist()}",
            expected="finite float32 numbers",
            do="Recompute the statistics from the training data.",
        )
    vector.flags.writeable = False
    return vector


__all__ = ["CheckpointError", "Statistics", "find_statistics", "load_statistics", "parse_json", "parse_statistics"]
