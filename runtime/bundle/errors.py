"""The one error of everything that reads or writes bundles."""

from pathlib import Path


class BundleError(ValueError):
    """A bundle that is not loaded, or not written.

    The message names the file (and the field), what was found, what was expected and what to do.
    """


def refusal(where: str | Path, *, found: str, expected: str, do: str) -> BundleError:
    """Return a `BundleError` that says all four things; the signature leaves none of them out."""
    return BundleError(f"{where}: found {found}; expected {expected}. {do}")


AGAIN = "Copy the bundle again, or export it anew."
EDITED = "A bundle is never edited: export it anew."
EXPORT = "Export the checkpoint for this robot."
OURS = "Make it readable for this user, or ask whoever owns it."
