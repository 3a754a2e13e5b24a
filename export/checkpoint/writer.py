"""Write a checkpoint in the public layout as a stream, so that its size never has to fit in memory.

Names, shapes and dtypes are known before the first number is: the headers are written from this plan, the data goes
to its place as it comes, in any order. Nothing carries a name that loads before everything is on the disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch

from .errors import CheckpointError, at, refusal
from .safetensors_file import DTYPES
from .source import TensorSource, describe

_STORED_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BLOCK_BYTES = 16 << 20  # the grain of progress; far under the limit of one pwrite (2 GiB)
_PARTIAL = ".partial"


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of a checkpoint that is going to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass
class _Place:
    """Where one tensor goes: the shard, the byte its data starts at, and whether it is there yet."""

    planned: PlannedTensor
    shard: int
    start: int
    written: bool = False


class SafetensorsWriter:
    """Writes ``model.safetensors``, or ``model-0000k-of-0000n.safetensors`` with their index, one tensor at a time.

    A context manager: leaving it without an error puts the files in place (shards, then the index), leaving it by an
    error removes what was written. A killed write leaves hidden ``.partial`` files, which nothing loads and the next
    write removes.

    Args:
        directory: made if it is not there; must not hold weights already.
        plan: the tensors, in the order of the index.
        max_shard_bytes: a shard is closed before it would grow beyond this; a larger tensor has a shard to itself.
        progress: called with the number of bytes just written.

    Raises:
        CheckpointError: weights are already there, the disk is too small, the plan names a tensor twice or asks for a
            dtype that the format lacks; later, a tensor that is not in the plan, differs from it or comes twice, and
            at the end a planned tensor that never came.
    """

    def __init__(
        self,
        directory: str | Path,
        plan: Sequence[PlannedTensor],
        *,
        max_shard_bytes: int = 5_000_000_000,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._directory = Path(directory)
        self._progress = progress or (lambda _: None)
        _check_plan(self._directory, plan)
        self._shards = _split(plan, max_shard_bytes)
        self._files: list[int] = []
        self._places: dict[str, _Place] = {}

    @property
    def shard_names(self) -> list[str]:
        """File names of the shards, in order."""
        count = len(self._shards)
        if count == 1:
            return ["model.safetensors"]
        return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]

    def __enter__(self) -> SafetensorsWriter:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._check_directory()
        self._remove_partial()
        try:
            for number, shard in enumerate(self._shards):
                header, starts = _header(shard)
                file = os.open(self._partial(self.shard_names[number]), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                self._files.append(file)
                _pwrite(file, memoryview(header), 0)
                # The full size at once: an empty tensor at the end, or one that never comes, leaves no shorter file.
                os.ftruncate(file, len(header) + sum(item.nbytes for item in shard))
                for item in shard:
                    self._places[item.name] = _Place(item, number, starts[item.name])
        except BaseException:
            self._abandon()
            raise
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one whole tensor in its place."""
        place = self._place(name)
        if tuple(tensor.shape) != place.planned.shape:
            raise self._differs(place.planned, describe(tuple(tensor.shape), tensor.dtype))
        self._append(place, tensor, place.start)
        place.written = True

    def write_rows(self, name: str, blocks: Iterable[torch.Tensor]) -> None:
        """Put a tensor in its place from blocks of consecutive rows (dimension 0), holding one block at a time."""
        place = self._place(name)
        rows, position = 0, place.start
        for block in blocks:
            if block.dim() == 0 or tuple(block.shape[1:]) != place.planned.shape[1:]:
                raise self._differs(place.planned, f"rows as {describe(tuple(block.shape), block.dtype)}")
            rows += block.shape[0]
            if rows > place.planned.shape[0]:
                raise self._differs(place.planned, f"at least {rows} rows")
            position = self._append(place, block, position)
        if place.planned.shape[:1] != (rows,):
            raise self._differs(place.planned, f"{rows} rows")
        place.written = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._abandon()

    def _abandon(self) -> None:
        """Close everything and remove what has no final name yet."""
        for file in self._files:
            os.close(file)
        self._files.clear()
        self._remove_partial()

    def _finish(self) -> None:
        absent = [name for name, place in self._places.items() if not place.written]
        if absent:
            raise refusal(
                at(self._directory, absent[0]),
                found=f"{len(absent)} of {len(self._places)} planned tensors never written",
                expected="all of them",
                do="Write what was planned, or plan what is written.",
            )
        names = self.shard_names
        final = list(names)
        if len(names) > 1:
            index = {
                "metadata": {"total_size": sum(place.planned.nbytes for place in self._places.values())},
                "weight_map": {name: names[place.shard] for name, place in self._places.items()},
            }
            final.append("model.safetensors.index.json")
            file = os.open(self._partial(final[-1]), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            self._files.append(file)
            _pwrite(file, memoryview((json.dumps(index, indent=2) + "\n").encode()), 0)
        for file in self._files:
            os.fsync(file)
        # The index last: shards without it do not load.
        for name in final:
            self._partial(name).rename(self._directory / name)
        folder = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _append(self, place: _Place, tensor: torch.Tensor, position: int) -> int:
        """Write the elements at a byte position; return the position behind them."""
        if tensor.dtype != place.planned.dtype:
            raise self._differs(place.planned, describe(tuple(tensor.shape), tensor.dtype))
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(data), _BLOCK_BYTES):
            block = data[begin : begin + _BLOCK_BYTES]
            _pwrite(self._files[place.shard], block, position)
            position += len(block)
            self._progress(len(block))
        return position

    def _place(self, name: str) -> _Place:
        place = self._places.get(name)
        if place is None or place.written:
            raise refusal(
                at(self._directory, name),
                found="a second tensor of this name" if place else "a tensor that was not planned",
                expected=f"each of the {len(self._places)} planned tensors once",
                do="Write what was planned, or plan what is written.",
            )
        return place

    def _differs(self, planned: PlannedTensor, found: str) -> CheckpointError:
        return refusal(
            at(self._directory, planned.name),
            found=found,
            expected=f"{describe(planned.shape, planned.dtype)} as planned",
            do="Write what was planned, or plan what is written.",
        )

    def _partial(self, name: str) -> Path:
        return self._directory / f".{name}{_PARTIAL}"

    def _remove_partial(self) -> None:
        for path in self._directory.glob(f".model*{_PARTIAL}"):
            path.unlink()

    def _check_directory(self) -> None:
        present = sorted(
            path.name
            for pattern in ("model*.safetensors*", "pytorch_model*.bin*")
            for path in self._directory.glob(pattern)
        )
        if present:
            raise refusal(
                self._directory,
                found=", ".join(present[:3]),
                expected="a directory without weights",
                do="Nothing is overwritten: choose another directory, or remove the old checkpoint.",
            )
        needed = sum(item.nbytes for shard in self._shards for item in shard)
        free = shutil.disk_usage(self._directory).free
        if needed > free:
            raise refusal(
                self._directory,
                found=f"{free / 1e9:.1f} GB free",
                expected=f"{needed / 1e9:.1f} GB for the weights",
                do="Free some space, or choose another disk.",
            )


def plan_of(source: TensorSource) -> list[PlannedTensor]:
    """Return the plan that writes a source as it is."""
    return [PlannedTensor(name, entry.shape, entry.dtype) for name, entry in source.items()]


def _check_plan(directory: Path, plan: Sequence[PlannedTensor]) -> None:
    seen: set[str] = set()
    for item in plan:
        if item.name in seen or item.name == "__metadata__":
            raise refusal(
                at(directory, item.name),
                found="a name planned twice, or one that the format keeps for itself",
                expected="each tensor once",
                do="Give each tensor its own name.",
            )
        seen.add(item.name)
        if item.dtype not in _STORED_NAMES:
            raise refusal(
                at(directory, item.name),
                found=f"dtype {item.dtype}",
                expected=f"one of {', '.join(DTYPES)}",
                do="Convert the tensor first.",
            )
    if not plan:
        raise refusal(directory, found="an empty plan", expected="tensors to write", do="Plan at least one tensor.")


def _split(plan: Sequence[PlannedTensor], max_shard_bytes: int) -> list[list[PlannedTensor]]:
    """Return the plan cut into shards, each filled as far as it goes."""
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for item in plan:
        if shards[-1] and size + item.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.nbytes
    return shards


def _header(shard: Sequence[PlannedTensor]) -> tuple[bytes, dict[str, int]]:
    """Return the file's header with its length, and the byte of the file where each tensor starts.

    Wide elements come first, so every tensor lies on a multiple of its element size: readers map it in place.
    """
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    position = 0
    for item in sorted(shard, key=lambda item: -item.dtype.itemsize):
        offsets[item.name] = position
        table[item.name] = {
            "dtype": _STORED_NAMES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [position, position + item.nbytes],
        }
        position += item.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}


def _pwrite(file: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(file, data, position)
        data, position = data[count:], position + count
