"""The one error of everything that reads or writes checkpoints."""

from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint that is not read, because a number in it could be wrong or its bytes could do harm.

    The message names the file (and the tensor), what was found, what was expected and what to do.
    """


def refusal(where: str | Path, *, found: str, expected: str, do: str) -> CheckpointError:
    """Return a `CheckpointError` that says all four things; the signature leaves none of them out.

    `where` is the file, followed by the tensor where one is meant (see `at`).
    """
    return CheckpointError(f"{where}: found {found}; expected {expected}. {do}")


def at(file: str | Path, tensor: str) -> str:
    """Return the place of one tensor as messages name it."""
    return f"{file}: tensor {tensor!r}"
