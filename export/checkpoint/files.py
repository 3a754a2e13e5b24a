"""Files of a checkpoint: opened with an error that says what to do, and never outside their directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from .errors import refusal

_LFS_MAGIC = b"version https://git-lfs"


def open_for_reading(path: Path) -> BinaryIO:
    """Return the file, opened for reading bytes.

    Raises:
        CheckpointError: it is missing, no regular file, or not ours to read.
    """
    try:
        # Asked first: opening a FIFO would wait for its writer.
        if not path.is_file() and (path.exists() or path.is_symlink()):
            kind = "a directory" if path.is_dir() else "a broken link" if path.is_symlink() else "no regular file"
            raise refusal(path, found=kind, expected="a file", do="Pass the file that holds the weights.")
        return path.open("rb")
    except FileNotFoundError:
        raise refusal(
            path, found="no such file", expected="a file", do="Check the path, or copy the file here."
        ) from None
    except OSError as error:
        raise refusal(
            path,
            found=error.strerror or str(error),
            expected="a file that can be read",
            do=f"Make it readable for this user, e.g. chmod u+r {path}.",
        ) from None


def file_size(file: BinaryIO) -> int:
    """Return the size of an open file in bytes."""
    return os.fstat(file.fileno()).st_size


def refuse_pointer(path: Path) -> None:
    """Raise a `CheckpointError` where a git-LFS pointer lies instead of the file that it stands for."""
    with open_for_reading(path) as file:
        if file.read(len(_LFS_MAGIC)) == _LFS_MAGIC:
            raise refusal(
                path,
                found="a git-LFS pointer, a text of three lines that stands for the weights",
                expected="the weights themselves",
                do="Run `git lfs install && git lfs pull` in the clone, or download the file from its page.",
            )


def inside(directory: Path, name: str, named_by: Path) -> Path:
    """Return `directory / name` for a file name that `named_by` gives, if it stays inside the directory.

    Links may lead elsewhere only as the Hugging Face cache lays them: from ``snapshots/REVISION/`` to the ``blobs``
    beside ``snapshots``.

    Raises:
        CheckpointError: the name is absolute, climbs with ``..``, or a link leads out of the directory.
    """
    relative = Path(name)
    if not name or "\0" in name or "\\" in name or relative.is_absolute() or ".." in relative.parts:
        raise refusal(
            named_by,
            found=f"the file name {name!r}",
            expected=f"a name inside {directory}",
            do="An index that points elsewhere is not followed: put the file beside the index and name it plainly.",
        )
    path = directory / relative
    real, root = path.resolve(), directory.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise refusal(
            named_by,
            found=f"{name!r}, a link to {real}",
            expected=f"a file inside {directory}",
            do="A link that leaves the directory is not followed: copy the file in, or pass the directory it lies in.",
        )
    return path
