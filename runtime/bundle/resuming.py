"""A bundle written in steps that survive the writer: what a killed export finished is taken over by the next one.

The directory of a resumable writer has a fixed name beside the destination, which no loader takes, and holds a ledger:
for each finished step a key, and size and SHA-256 of each of its files. A step is taken over only under the same key,
and only after its files were hashed again; the key is the caller's digest of everything that the step depends on.
Everything else that lies in the directory is swept away.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .descriptors import digest, identity, open_within, walk
from .errors import BundleError, refusal
from .manifest import File
from .reading import PARTIAL
from .values import MANIFEST, file_name
from .writing import BundleWriter, sync_directory

LEDGER = ".ledger.json"
_NEW = ".ledger.new"
# A ledger names a handful of steps; a longer file is not one.
_LARGEST = 2**20
# The holder of the lock may be a process that is being killed: it is waited for this long before it counts as alive.
_PATIENCE_S = 1.0


class Step(BaseModel):
    """A finished step: the digest of what it was made from, and its files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str = Field(pattern=r"^[0-9a-f]{64}$")
    files: dict[str, File]

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(file.size for file in self.files.values())


class _Ledger(BaseModel):
    model_config = ConfigDict(extra="forbid")

    schema_version: int = Field(default=1, ge=1, le=1)
    steps: dict[str, Step] = Field(default_factory=dict)


class ResumableWriter(BundleWriter):
    """A writer whose finished steps outlive it.

        with ResumableWriter(destination) as writer:
            if not writer.take_over("language", key):
                with writer.step("language", key):
                    writer.add("stages/language.onnx", data)
            bundle = writer.commit(contents)

    A step left by an exception leaves nothing; leaving the `with` block without a commit keeps the finished ones.

    Raises:
        BundleError: the destination exists, or another process writes there at this moment.
    """

    def __init__(self, destination: str | Path) -> None:
        super().__init__(destination)
        self.directory = self.destination.with_name(f".{self.destination.name}.work{PARTIAL}")
        self._ledger = _Ledger()
        self._open: list[str] | None = None

    @property
    def finished(self) -> Mapping[str, Step]:
        """Steps that the next writer to this destination finds, in the order in which they were finished.

        As the disk has it: an interruption may fall between a step's entry there and its being noted here.
        """
        return _read_ledger(self.directory).steps

    def __enter__(self) -> "ResumableWriter":
        deadline = time.monotonic() + _PATIENCE_S
        while self._lock is None:
            with suppress(FileExistsError):
                self.directory.mkdir()
            self._lock = _lock(self.directory)
            if self._lock is None:
                if time.monotonic() > deadline:
                    raise refusal(
                        self.destination,
                        found="another export that is writing there at this moment",
                        expected="one export to one place",
                        do="Wait until it is done, or choose another name.",
                    )
                time.sleep(0.02)
        self._sweep_killed()
        with suppress(FileNotFoundError):
            (self.directory / MANIFEST).unlink()  # of a commit that was killed: nothing here is a bundle
        self._ledger = _read_ledger(self.directory)
        self._keep_finished()
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._ledger = _read_ledger(self.directory)
            if self._ledger.steps:
                self._keep_finished()
            else:
                shutil.rmtree(self.directory, ignore_errors=True)
            self._release()

    def take_over(self, name: str, key: str, progress: Callable[[int], None] | None = None) -> bool:
        """Whether the step was finished under this key and its files are still what they were; forget it otherwise.

        progress: called with the bytes hashed.
        """
        step = self._ledger.steps.get(name)
        if step is None:
            return False
        if step.key == key and all(self._unchanged(file, step.files[file], progress) for file in step.files):
            return True
        self._forget(name)
        return False

    @contextmanager
    def step(self, name: str, key: str) -> Iterator[None]:
        """Make a step: the files created inside belong to it, and count as finished once they are on the disk.

        Raises:
            ValueError: inside another step.
        """
        if self._open is not None:
            raise ValueError(f"the step {name!r} begins inside another one")
        self._forget(name)
        self._open = []
        try:
            yield
            files = {file: self._known[file][1] for file in self._open}
        except BaseException:
            for file in self._open:
                with suppress(FileNotFoundError):
                    (self.directory / file).unlink()
            raise
        finally:
            self._open = None
        for folder in {(self.directory / file).parent for file in files}:
            sync_directory(folder)
        self._write_ledger({**self._ledger.steps, name: Step(key=key, files=files)})

    def path(self, name: str) -> Path:
        """As of every writer; the file belongs to the open step."""
        path = super().path(name)
        if self._open is not None and name not in self._open:
            self._open.append(name)
        return path

    def _forget(self, name: str) -> None:
        """Take a step out of the ledger, then its files away: a ledger never promises what is being removed."""
        step = self._ledger.steps.get(name)
        if step is None:
            return
        self._write_ledger({other: kept for other, kept in self._ledger.steps.items() if other != name})
        for file in step.files:
            self._known.pop(file, None)
            with suppress(FileNotFoundError):
                (self.directory / file).unlink()

    def _unchanged(self, name: str, expected: File, progress: Callable[[int], None] | None) -> bool:
        assert self._lock is not None
        try:
            file = open_within(self._lock, name, self.directory)
        except BundleError:
            return False
        try:
            if os.fstat(file).st_size != expected.size:
                return False
            found, size = digest(file, expected.size, progress)
            if (found, size) != (expected.sha256, expected.size):
                return False
            self._known[name] = identity(file), expected
            return True
        finally:
            os.close(file)

    def _keep_finished(self) -> None:
        """Remove everything from the directory that no finished step owns."""
        assert self._lock is not None
        kept = {LEDGER, *(file for step in self._ledger.steps.values() for file in step.files)}
        folders = {str(parent) for name in kept for parent in Path(name).parents}
        strangers = [(name, kind) for name, kind in walk(self._lock, self.directory) if name not in kept | folders]
        for name, kind in strangers:
            path = self.directory / name
            if kind == "folder":
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _write_ledger(self, steps: dict[str, Step]) -> None:
        ledger = _Ledger(steps=steps)
        with (self.directory / _NEW).open("w", encoding="utf-8") as file:
            file.write(ledger.model_dump_json(indent=1))
            file.flush()
            os.fsync(file.fileno())
        (self.directory / _NEW).replace(self.directory / LEDGER)
        sync_directory(self.directory)
        self._ledger = ledger

    def _private(self) -> frozenset[str]:
        return frozenset({LEDGER, _NEW})

    def _before_rename(self) -> None:
        # From here to the rename nothing remembers the steps; were the writer killed in between, they are made again.
        for name in self._private():
            (self.directory / name).unlink(missing_ok=True)
        sync_directory(self.directory)


def _lock(directory: Path) -> int | None:
    """Return a descriptor of the directory, locked; None where another process holds it or has just moved it away.

    Raises:
        OSError: it cannot be opened at all.
    """
    try:
        held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(held), directory.lstat()):
            return held
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(held)
        raise
    os.close(held)
    return None


def _read_ledger(directory: Path) -> _Ledger:
    """Return what the ledger says; nothing where it is missing, damaged, or of another version."""
    path = directory / LEDGER
    try:
        if path.is_symlink() or path.stat().st_size > _LARGEST:
            return _Ledger()
        ledger = _Ledger.model_validate(json.loads(path.read_text(encoding="utf-8")))
        for step in ledger.steps.values():
            for name in step.files:
                file_name(name)
    except (OSError, ValueError, ValidationError, RecursionError):
        return _Ledger()
    return ledger
