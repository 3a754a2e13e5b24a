"""Open the weights of a checkpoint directory or file, strictly.

What lies on disk is one of: a directory in the public layout (``model.safetensors``, or shards behind
``model.safetensors.index.json``, or the same with ``pytorch_model.bin``), or a single ``.safetensors``, ``.bin``,
``.ckpt``, ``.pt`` or ``.pth``. Only headers are read here; data is mapped when `TensorSource.read` asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .errors import CheckpointError
from .source import TensorEntry, TensorSource, from_tensors, overlay

__all__ = ["CheckpointError", "TensorEntry", "TensorSource", "from_tensors", "open_tensors", "overlay"]


def open_tensors(path: str | Path, *, nested: Sequence[str] = ()) -> TensorSource:
    """Return the tensors of a checkpoint directory or file, without reading their data.

    Args:
        path: a directory in the public layout, or one weights file. Safetensors are preferred where a directory has
            both kinds, and the source's notes say so.
        nested: where the state dict lies inside a ``.bin/.ckpt/.pt/.pth`` file, e.g. ``("nets", "ema")`` for a
            stage-1 head; such files are read with ``torch.load(weights_only=True, mmap=True)`` and nothing else.

    Raises:
        CheckpointError: the weights are incomplete, damaged, ambiguous, point outside the directory, hold anything
            but tensors, or cannot be read; the message names file and tensor.
    """
    raise NotImplementedError
