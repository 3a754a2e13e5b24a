"""Files below a directory, reached part by part through descriptors: no link is followed, no special file opened.

A path is looked up anew each time it is used, and whoever can write one of its folders can turn it elsewhere in
between. A descriptor stays what it was.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Generator
from pathlib import Path

from .errors import AGAIN, OURS, BundleError, refusal

_BLOCK = 2**20

Identity = tuple[int, int, int, int, int]
"""Device, inode, size, time of the last write, time of the last change: what a file's content cannot change without."""


def open_directory(path: Path) -> int:
    """Return a descriptor of the directory itself; a link to it may be followed."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        found = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise refusal(path, found=found, expected="a bundle, a directory", do="Check the path.") from None


def open_within(root: int, name: str, where: Path) -> int:
    """Return a descriptor for reading the regular file `name`, parts joined by `/`, below the directory `root`.

    Raises:
        BundleError: it is missing, unreadable, no regular file, or a link stands on the way.
    """
    *folders, last = name.split("/")
    at = os.dup(root)
    try:
        for folder in folders:
            inner = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = inner
        # O_NONBLOCK: opening a FIFO would wait for its writer.
        file = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
    except OSError as error:
        raise _cannot_open(error, where / name) from None
    finally:
        os.close(at)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise refusal(where / name, found="no regular file", expected="a file", do=AGAIN)
    return file


def _cannot_open(error: OSError, path: Path) -> BundleError:
    if error.errno == errno.ENOENT:
        return refusal(path, found="no such file", expected="the file that the manifest lists", do=AGAIN)
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        found = "a symbolic link, or a file where a folder should be"
        return refusal(path, found=found, expected="a file of the bundle itself", do=AGAIN)
    if error.errno in (errno.EACCES, errno.EPERM):
        return refusal(path, found=str(error.strerror), expected="a file that can be read", do=OURS)
    return refusal(path, found=error.strerror or str(error), expected="a file that can be read", do=AGAIN)


def walk(root: int, where: Path, prefix: str = "") -> Generator[tuple[str, str], None, None]:
    """Yield name and kind (`file`, `folder`, `link`, `special`) of everything below `root`, links not followed.

    A folder is entered after it was yielded, so that a caller who stops at a stranger never enters it.
    """
    with os.scandir(root) as entries:
        for entry in entries:
            name = f"{prefix}{entry.name}"
            if entry.is_symlink():
                yield name, "link"
            elif entry.is_file(follow_symlinks=False):
                yield name, "file"
            elif entry.is_dir(follow_symlinks=False):
                yield name, "folder"
                try:
                    inner = os.open(
                        entry.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root
                    )
                except OSError as error:
                    raise _cannot_open(error, where / name) from None
                try:
                    yield from walk(inner, where, f"{name}/")
                finally:
                    os.close(inner)
            else:
                yield name, "special"


def identity(file: int) -> Identity:
    """Return what tells this file, in this state, from any other."""
    status = os.fstat(file)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def digest(file: int, size: int, progress: Callable[[int], None] | None = None) -> tuple[str, int]:
    """Return SHA-256 and length of an open file, read from its start until its end or until it exceeds `size`.

    Bounded, because a file that someone appends to as fast as it is read has no end.

    progress: called with the length of each block.
    """
    os.lseek(file, 0, os.SEEK_SET)
    state, total, block = hashlib.sha256(), 0, memoryview(bytearray(_BLOCK))
    while total <= size and (count := os.readv(file, [block])):
        state.update(block[:count])
        total += count
        if progress is not None:
            progress(count)
    return state.hexdigest(), total
