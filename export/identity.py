"""What makes one export the same as another: the checkpoint's content, the tools, and the code that writes.

A step of an interrupted export is taken over only where all of it agrees.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from chatvla_edge.export.checkpoint.reader import Checkpoint

TOOLS = ("chatvla-edge", "onnx", "onnxruntime", "torch", "transformers", "numpy")

Stamp = Mapping[str, tuple[int, ...]]


def tools() -> dict[str, str]:
    """Versions of what an export computes with."""
    return {name: importlib.metadata.version(name) for name in TOOLS}


def checkpoint_digest(checkpoint: Checkpoint, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 over name, shape, dtype and all bytes of every parameter. Raises CheckpointError for NaN and infinity.

    By our names and as stored: the same weights in another public layout or in other shards have the same digest.
    progress: called with the bytes of each parameter.
    """
    digests = {}
    for name, entry in checkpoint.entries.items():  # in their order: neighbours may lie in one public tensor
        state = hashlib.sha256(f"{name} {list(entry.shape)} {entry.dtype}\n".encode())
        state.update(entry.load().reshape(-1).view(torch.uint8).numpy().data)
        digests[name] = state.hexdigest()
        if progress is not None:
            progress(entry.nbytes)
    return key(digests)


def source_digest() -> str:
    """SHA-256 over the exporter's own code, which a development checkout changes without a new version."""
    here = Path(__file__).parent
    state = hashlib.sha256()
    for path in sorted(here.rglob("*.py")):
        data = path.read_bytes()
        state.update(f"{path.relative_to(here)} {len(data)}\n".encode())
        state.update(data)
    return state.hexdigest()


def key(*parts: object) -> str:
    """SHA-256 over JSON values: of what one step is made of."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()


def stamp(checkpoint: Checkpoint) -> Stamp:
    """Size, inode and times of the files that the parameters lie in: what their content cannot change without."""
    origins = {part for entry in checkpoint.entries.values() for part in entry.origin.split(" + ")}
    found = {}
    for origin in sorted(origins):
        if Path(origin).is_file():
            status = os.stat(origin)  # noqa: PTH116  links are followed: the weights may lie in a store
            found[origin] = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return found


def require_unchanged(checkpoint: Checkpoint, before: Stamp) -> None:
    """Raise ValueError where a file of the checkpoint is not what it was when its digest was taken."""
    now = stamp(checkpoint)
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        raise ValueError(
            f"{changed[0]} changed while it was exported: found another size, inode or time than at the start. Wait "
            "for what writes there, and export again"
        )
