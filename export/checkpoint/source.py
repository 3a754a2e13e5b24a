"""Named tensors that are read when they are asked for.

A `TensorSource` is a table of entries; each entry knows its shape, dtype and origin without reading data, and how to
load itself. Files, renamed views, overlays and computed tensors (fused, split, merged) are all the same table, so
whoever maps keys never asks where a tensor comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from .errors import at, refusal


@dataclass(frozen=True)
class TensorEntry:
    """What is known about one tensor before it is read.

    Attributes:
        shape: dimensions.
        dtype: as stored.
        origin: the file it comes from, for messages; computed tensors say how they came to be.
        load: returns the tensor, contiguous, on the CPU. Called once per `TensorSource.read`; nothing is cached.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return prod(self.shape) * self.dtype.itemsize


class TensorSource(Mapping[str, TensorEntry]):
    """An ordered table of named tensors, read one at a time.

    As a mapping it goes from names to entries: `source[name].shape` never reads data, `name in source` and
    `len(source)` do what they say, and `TensorSource({**a, "b": entry})` is how a new one is made from old ones.

    Args:
        entries: name -> entry, in the order in which the tensors are best read.
        notes: remarks for the user about how the files were chosen, whole sentences.
    """

    def __init__(self, entries: Mapping[str, TensorEntry], notes: Sequence[str] = ()) -> None:
        self._entries = dict(entries)
        self.notes = tuple(notes)

    def __getitem__(self, name: str) -> TensorEntry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in order."""
        return tuple(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(entry.nbytes for entry in self._entries.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the dimensions of a tensor without reading it."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype of a tensor without reading it."""
        return self._entry(name).dtype

    def origin(self, name: str) -> str:
        """Return where a tensor comes from, for messages."""
        return self._entry(name).origin

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, on the CPU, after checking it.

        Tensors from safetensors files are private memory maps of their own bytes: pages are read when touched and
        given back when the tensor dies, and writing into one never reaches the file. Nothing is cached, so two reads
        are two tensors. Floating-point data is passed over once (min and max in one sweep, no temporary).

        Raises:
            CheckpointError: unknown name, NaN or infinity (with the count), or data that is not what its entry said.
        """
        entry = self._entry(name)
        tensor = entry.load()
        if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
            raise refusal(
                at(entry.origin, name),
                found=f"{describe(tuple(tensor.shape), tensor.dtype)} when it was read",
                expected=f"{describe(entry.shape, entry.dtype)} as announced",
                do="The file changed while it was read, or its reader is wrong: read the checkpoint again.",
            )
        refuse_non_finite(tensor, at(entry.origin, name))
        return tensor

    def renamed(self, names: Mapping[str, str]) -> TensorSource:
        """Return a view whose names are the keys of `names` (new -> old), in that order; others are left out.

        Raises:
            CheckpointError: an old name does not exist.
        """
        return TensorSource({new: self._entry(old) for new, old in names.items()}, self.notes)

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self._entries[name]
        except KeyError:
            files = sorted({entry.origin for entry in self._entries.values()})
            raise refusal(
                at(", ".join(files[:3]) or "an empty source", name),
                found=f"{len(self)} tensors without this one",
                expected="a tensor of this name",
                do="Check that the checkpoint is complete and of the layout it is read as.",
            ) from None


def overlay(*layers: TensorSource) -> TensorSource:
    """Return the union of sources; a later layer overrides an earlier one, in the earlier one's place.

    Raises:
        CheckpointError: an override has another shape than what it overrides.
    """
    entries: dict[str, TensorEntry] = {}
    for layer in layers:
        for name, entry in layer.items():
            below = entries.get(name)
            if below is not None and below.shape != entry.shape:
                raise refusal(
                    at(entry.origin, name),
                    found=f"shape {list(entry.shape)}",
                    expected=f"{list(below.shape)}, the shape in {below.origin} which it overrides",
                    do="The two files belong to different models: pass the base that this checkpoint was trained on.",
                )
            entries[name] = entry
    return TensorSource(entries, [note for layer in layers for note in layer.notes])


def from_tensors(tensors: Mapping[str, torch.Tensor], origin: str = "memory") -> TensorSource:
    """Return a source of tensors that are already in memory."""
    return TensorSource({name: _held(tensor, origin) for name, tensor in tensors.items()})


def relabelled(entry: TensorEntry, origin: str) -> TensorEntry:
    """Return the entry with another origin, for tensors whose file is not the whole story."""
    return replace(entry, origin=origin)


def describe(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """Return e.g. ``bfloat16 [8, 1536]``."""
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def refuse_non_finite(tensor: torch.Tensor, where: str) -> None:
    """Raise a `CheckpointError` that counts the NaN and infinite elements of a tensor, if there are any."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    # min and max carry NaN and infinity through, so a clean tensor costs one sweep and no temporary of its size.
    low, high = torch.aminmax(tensor)
    if torch.isfinite(low) and torch.isfinite(high):
        return
    nans, infinities = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    raise refusal(
        where,
        found=f"{nans} NaN and {infinities} infinite of {tensor.numel()} elements",
        expected="finite numbers",
        do="The training diverged or the file is damaged: use an earlier checkpoint, or copy it again.",
    )


def _held(tensor: torch.Tensor, origin: str) -> TensorEntry:
    return TensorEntry(tuple(tensor.shape), tensor.dtype, origin, lambda: tensor)
