"""Writing a bundle: beside its destination, to the disk, then into place in one step.

A directory that is being written has no manifest; the manifest comes last, when everything it speaks of is on the disk.
A writer that is killed leaves a directory whose name ends in `.partial`, which no loader takes and which the next
writer to the same destination sweeps away, or goes on with (`resuming`).
"""

import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from .descriptors import digest, identity, open_within, walk
from .errors import BundleError, refusal
from .manifest import Contents, File, Manifest
from .reading import PARTIAL, Bundle, Progress, open_bundle
from .text import decode, encode, explained
from .values import MANIFEST, file_name

_BLOCK = 2**20


class Sink:
    """A file of the bundle while it is written; what passes through is hashed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._state = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append the bytes."""
        count = self._file.write(data)
        self._state.update(data)
        self.size += count
        return count

    @property
    def sha256(self) -> str:
        """Of everything written so far."""
        return self._state.hexdigest()


class BundleWriter:
    """Collects the files of a bundle; `commit` makes a bundle of them, leaving the `with` block without it nothing.

        with BundleWriter(destination) as writer:
            writer.add("stages/language.onnx", data)
            with writer.create("stages/language.onnx.data") as file:
                file.write(...)
            exporter.save(writer.path("stages/denoise.onnx"))   # for a library that writes by itself
            bundle = writer.commit(contents)

    Raises:
        BundleError: the destination exists. A bundle is never overwritten.
    """

    def __init__(self, destination: str | Path) -> None:
        # Not resolved: a destination that is a dangling link exists as far as a rename is concerned.
        self.destination = Path(os.path.abspath(destination))  # noqa: PTH100
        self._refuse_existing()
        if self.destination.name.endswith(PARTIAL) or not self.destination.parent.is_dir():
            raise refusal(
                self.destination,
                found=f"a name ending in {PARTIAL}, or no folder to put it in",
                expected="the name of a new directory in an existing one",
                do="Choose another name, or make the folder.",
            )
        self._known: dict[str, tuple[object, File]] = {}
        self._lock: int | None = None

    def __enter__(self) -> "BundleWriter":
        self._sweep_killed()
        while self._lock is None:
            name = f".{self.destination.name}.{secrets.token_hex(4)}{PARTIAL}"
            self.directory = self.destination.with_name(name)
            self.directory.mkdir()
            self._lock = _locked(self.directory)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
            self._release()

    def path(self, name: str) -> Path:
        """Return where a file of the bundle must be written, its folder made.

        Raises:
            ValueError: the name is none that a bundle may hold.
        """
        if self._lock is None:
            raise ValueError(f"the bundle {self.destination} is not being written")
        path = self.directory / file_name(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def create(self, name: str) -> Iterator[Sink]:
        """Open a new file of the bundle for writing; it is hashed as it is written and on the disk at the end."""
        with self.path(name).open("xb") as file:
            sink = Sink(file)
            yield sink
            file.flush()
            os.fsync(file.fileno())
            self._known[name] = identity(file.fileno()), File(sha256=sink.sha256, size=sink.size)

    def add(self, name: str, source: bytes | Path) -> None:
        """Add a file: these bytes, or a copy of that file."""
        with self.create(name) as sink:
            if isinstance(source, bytes):
                sink.write(source)
                return
            with source.open("rb") as file:
                while block := file.read(_BLOCK):
                    sink.write(block)

    def commit(self, contents: Contents, progress: Progress | None = None) -> Bundle:
        """Return the finished bundle, which from now on stands at the destination and is changed by nobody.

        progress: told of the bytes hashed of files that were not written through `create`.

        Raises:
            BundleError: the destination has appeared meanwhile, or the contents and the files do not agree.
        """
        if self._lock is None:
            raise ValueError(f"the bundle {self.destination} is not being written")
        files = self._files(self._lock, progress)
        try:
            manifest = Manifest.model_validate({**dict(contents), "files": files})
        except ValidationError as error:
            raise explained(error, f"{self.destination}: contents and files do not agree", do="") from error
        data = encode(manifest)
        decode(data, str(self.destination / MANIFEST))  # what this writes, this reads
        # Everything that the manifest promises is on the disk before the manifest is.
        for folder, _, names in os.walk(self.directory, topdown=False):
            for name in names:
                file_path = Path(folder) / name
                file_path.chmod(file_path.stat().st_mode & 0o444)
            sync_directory(Path(folder))
        with (self.directory / MANIFEST).open("xb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), os.fstat(file.fileno()).st_mode & 0o444)
            os.fsync(file.fileno())
        sync_directory(self.directory)
        self._refuse_existing()
        self._before_rename()
        try:
            # Replaces nothing but, where one appears in this very moment, an empty directory.
            self.directory.rename(self.destination)
        except OSError as error:
            raise BundleError(f"{self.destination}: cannot be put into place: {error.strerror}") from error
        sync_directory(self.destination.parent)
        self._release()
        # Every digest was taken a moment ago; what is checked again is what a rename could have met.
        return open_bundle(self.destination, verify=False)

    def _files(self, root: int, progress: Progress | None) -> dict[str, File]:
        """Return the account of everything below the directory; hash what did not pass through `create`."""
        files = {}
        for name, kind in walk(root, self.directory):
            if kind == "folder" or name in self._private():
                continue
            if kind != "file":
                raise refusal(self.directory / name, found=f"a {kind}", expected="files and folders alone", do="")
            file_name(name)
            file = open_within(root, name, self.directory)
            try:
                known = self._known.get(name)
                if known is not None and known[0] == identity(file):
                    files[name] = known[1]
                    continue
                size, done = os.fstat(file).st_size, 0

                def advance(count: int, name: str = name, size: int = size) -> None:
                    nonlocal done
                    done += count
                    if progress is not None:
                        progress(name, done, size)

                found, length = digest(file, size, advance)
                if length != size:
                    do = "Close every file of the bundle before it is committed."
                    raise refusal(self.directory / name, found="a file that grows", expected="a finished one", do=do)
                os.fsync(file)
                files[name] = File(sha256=found, size=size)
            finally:
                os.close(file)
        return files

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.destination):
            raise refusal(
                self.destination,
                found="something there already",
                expected="nothing: a bundle is never overwritten",
                do="Choose another name, or remove it first.",
            )

    def _private(self) -> frozenset[str]:
        """Files of the writer's own that are no part of the bundle."""
        return frozenset()

    def _before_rename(self) -> None:
        """Take them away: from here on the directory is the bundle."""

    def _sweep_killed(self) -> None:
        """Remove what killed writers of the same destination left behind: the directories that no process holds."""
        ours = re.compile(rf"\.{re.escape(self.destination.name)}\.[0-9a-f]{{8}}{re.escape(PARTIAL)}")
        for left in self.destination.parent.glob(f".*{PARTIAL}"):
            if ours.fullmatch(left.name) and (held := _locked(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(held)

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _locked(path: Path) -> int | None:
    """Return a descriptor of the directory, locked while this process lives; None where another holds or removed it.

    The lock is how a writer tells a directory in use from one that a killed writer left behind.
    """
    held = None
    try:
        held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(held), path.lstat()):
            return held
    except OSError:
        pass
    if held is not None:
        os.close(held)
    return None


def sync_directory(path: Path) -> None:
    """Put the names in a directory on the disk."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
