"""Opening a bundle: everything is checked before anything in it is used, and nothing is ever unpickled."""

import hashlib
import os
import weakref
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

from .descriptors import Identity, digest, identity, open_directory, open_within, walk
from .errors import AGAIN, EDITED, BundleError, refusal
from .fit import Machine, RigNeeds, check_machine, check_rig
from .manifest import Manifest
from .text import LARGEST, decode
from .values import MANIFEST

Progress = Callable[[str, int, int], None]
"""Called while files are hashed: the file, bytes done, bytes in all."""

PARTIAL = ".partial"
"""How the name of a directory ends while it is being written."""


def open_bundle(
    path: str | Path,
    *,
    verify: bool = True,
    machine: Machine | None = None,
    rig: RigNeeds | None = None,
    progress: Progress | None = None,
) -> "Bundle":
    """Return the bundle in a directory after every file's size and digest were found as its manifest says.

    Args:
        path: the directory.
        verify: False leaves the digests to the moment at which each file is opened; everything else is checked now.
        machine: where it shall run; None to look at a bundle made for elsewhere.
        rig: what it shall move; None for none.
        progress: told of the bytes hashed so far.

    Raises:
        BundleError: see the message.
    """
    path = Path(path)
    if path.name.endswith(PARTIAL):
        raise refusal(
            path,
            found="an export that did not finish",
            expected="a bundle",
            do="Run the export again: it goes on with what this directory holds, or sweeps it away.",
        )
    root = open_directory(path)
    try:
        manifest, seal = _manifest(root, path)
        where = str(path / MANIFEST)
        if machine is not None:
            check_machine(manifest, machine, where)
        if rig is not None:
            check_rig(manifest, rig, where)
        _account(root, path, manifest)
    except BaseException:
        os.close(root)
        raise
    bundle = Bundle(path, root, manifest, seal)
    if verify:
        try:
            bundle.verify(progress)
        except BaseException:
            bundle.close()
            raise
    return bundle


class Bundle:
    """An open bundle. `seal` is its identity: a digest over its manifest, and through that over each of its files.

    What is handed out was hashed on the very descriptor it is read from, or is the same inode, size and times as when
    it was. That finds accidents and swapped files. It does not stop someone who may write the files from doing so while
    they are read, nor from swapping one between `file_path` and an engine's own opening of it: keep a bundle owned by
    an account that the robot's processes are not.
    """

    def __init__(self, path: Path, root: int, manifest: Manifest, seal: str) -> None:
        self.path = path
        self.manifest = manifest
        self.seal = seal
        self._root = root
        self._known: dict[str, Identity] = {}
        self.close = weakref.finalize(self, os.close, root)

    def __enter__(self) -> "Bundle":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(file.size for file in self.manifest.files.values())

    def verify(self, progress: Progress | None = None) -> None:
        """Hash every file.

        Raises:
            BundleError: one is not what the manifest says.
        """
        done, total = 0, self.size
        for name in sorted(self.manifest.files):

            def advance(count: int, name: str = name) -> None:
                nonlocal done
                done += count
                if progress is not None:
                    progress(name, done, total)

            file = self._opened(name)
            try:
                self._hash(name, file, advance)
            finally:
                os.close(file)

    def open_file(self, name: str) -> BinaryIO:
        """Return a listed file, open for reading and verified on this descriptor (or on its unchanged inode)."""
        return os.fdopen(self._verified(name), "rb")

    def read(self, name: str) -> bytes:
        """Return the bytes of a listed file; these very bytes were hashed."""
        with os.fdopen(self._opened(name), "rb") as file:
            data = file.read(self.manifest.files[name].size + 1)
        self._compare(name, hashlib.sha256(data).hexdigest(), len(data))
        return data

    def file_path(self, name: str) -> Path:
        """Return the path of a listed file, verified a moment ago, for an engine that opens files by itself."""
        os.close(self._verified(name))
        return self.path / name

    def _opened(self, name: str) -> int:
        if name not in self.manifest.files:
            raise refusal(
                self.path / name, found="a name the manifest does not list", expected="a listed file", do=EDITED
            )
        if not self.close.alive:
            raise ValueError(f"the bundle {self.path} is closed")
        return open_within(self._root, name, self.path)

    def _verified(self, name: str) -> int:
        file = self._opened(name)
        try:
            if self._known.get(name) != identity(file):
                self._hash(name, file)
            os.lseek(file, 0, os.SEEK_SET)
        except BaseException:
            os.close(file)
            raise
        return file

    def _hash(self, name: str, file: int, progress: Callable[[int], None] | None = None) -> None:
        before = identity(file)
        try:
            found, size = digest(file, self.manifest.files[name].size, progress)
        except OSError as error:
            do = f"The disk may be failing. {AGAIN}"
            raise refusal(self.path / name, found=str(error.strerror), expected="bytes", do=do) from None
        self._compare(name, found, size)
        if identity(file) != before:
            raise refusal(self.path / name, found="a file that someone writes", expected="a still one", do=EDITED)
        self._known[name] = before

    def _compare(self, name: str, found: str, size: int) -> None:
        expected = self.manifest.files[name]
        if (found, size) == (expected.sha256, expected.size):
            return
        twin = next((other for other, file in self.manifest.files.items() if file.sha256 == found), None)
        raise refusal(
            self.path / name,
            found=f"the contents of {twin!r}" if twin else f"{size} bytes with SHA-256 {found}",
            expected=f"{expected.size} bytes with SHA-256 {expected.sha256}",
            do=f"The file is damaged or was exchanged. {AGAIN}",
        )


def _manifest(root: int, path: Path) -> tuple[Manifest, str]:
    try:
        file = open_within(root, MANIFEST, path)
    except BundleError as error:
        raise BundleError(f"{error} Without its manifest a directory is no bundle.") from None
    with os.fdopen(file, "rb") as opened:
        data = opened.read(LARGEST + 1)
    return decode(data, str(path / MANIFEST))


def _account(root: int, path: Path, manifest: Manifest) -> None:
    """Raise where the directory holds anything that the manifest does not list, or lacks something, or another size."""
    listed = {MANIFEST, *manifest.files}
    folders = {name[:i] for name in listed for i, char in enumerate(name) if char == "/"}
    there = set()
    with closing(walk(root, path)) as entries:
        for name, kind in entries:
            if kind in ("link", "special"):
                found = "a symbolic link" if kind == "link" else "a special file"
                raise refusal(path / name, found=found, expected="files and folders alone", do=AGAIN)
            if name not in (folders if kind == "folder" else listed):
                raise refusal(
                    path / name,
                    found=f"a {kind} that the manifest does not list",
                    expected="nothing but what the export wrote",
                    do="Move it out of the bundle, or copy the bundle again.",
                )
            if kind == "file":
                there.add(name)
    if missing := sorted(listed - there):
        raise refusal(path / missing[0], found="no such file", expected="the file that the manifest lists", do=AGAIN)
    for name, expected in manifest.files.items():
        file = open_within(root, name, path)
        try:
            size = os.fstat(file).st_size
        finally:
            os.close(file)
        if size != expected.size:
            raise refusal(path / name, found=f"{size} bytes", expected=f"{expected.size} bytes", do=AGAIN)
