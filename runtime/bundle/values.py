"""What every part of a manifest is made of: frozen values, names, digests, tables that cannot be changed."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, TypeVar

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, WrapSerializer


class Data(BaseModel):
    """A frozen value. An unknown field is an error, so that a misspelt one is never silently a default.

    Numbers are finite: JSON has no NaN, and none of ours has a meaning.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


V = TypeVar("V")


def _frozen(table: Mapping[str, V]) -> Mapping[str, V]:
    return MappingProxyType(dict(table))


def _plain(table: Mapping[str, V], handler: SerializerFunctionWrapHandler) -> object:
    return handler(dict(table))


Table = Annotated[Mapping[str, V], AfterValidator(_frozen), WrapSerializer(_plain)]
"""A mapping that stays as it was read: `frozen` freezes the fields of a model, not what is inside a dict."""

# One part of a path. ASCII alone, so that no two names differ by a Unicode form or a look-alike; no leading dot, so
# that neither `..` nor a hidden file is a name; no backslash, no NUL, no space.
_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,126}")
_DEEPEST = 6

MANIFEST = "manifest.json"


def file_name(name: str) -> str:
    """Return the name of a file inside a bundle, as the manifest spells it.

    Raises:
        ValueError: the name is absolute, climbs with `..`, or holds anything but plain ASCII parts joined by `/`.
    """
    parts = name.split("/")
    if not all(_PART.fullmatch(part) and not part.endswith(".") for part in parts) or len(parts) > _DEEPEST:
        raise ValueError(
            f"the file name {name[:200]!r} could leave the bundle or mean two files; a name is up to {_DEEPEST} parts "
            "joined by '/', each of letters, digits, '_', '-' and inner dots"
        )
    if name.lower() == MANIFEST:
        raise ValueError(f"{MANIFEST} cannot list itself")
    return name


FileName = Annotated[str, Field(max_length=512), AfterValidator(file_name)]
"""A file of the bundle: `stages/language.onnx`."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,63}$")]
"""A camera, an arm, a joint, a tool: what rig files and messages call it."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
"""A size of something that exists."""

Version = Annotated[str, Field(pattern=r"^[0-9]{1,6}(\.[0-9]{1,6}){0,3}$")]
"""Numbers joined by dots."""


def repeated(names: Iterable[str]) -> list[str]:
    """Return the names that stand more than once, sorted. Linear: a manifest may be made to hold many."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def parsed_version(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, trailing zeros dropped: `1.23.0+cpu` -> (1, 23)."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    parts = [int(part) for part in numbers.group().split(".")] if numbers else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def _float32(value: float) -> float:
    with np.errstate(over="ignore"):
        rounded = float(np.float32(value))
    if rounded != value:
        raise ValueError(f"{value!r} is no float32; the nearest is {rounded!r}: write that, so that nothing is rounded")
    return value


Float32 = Annotated[float, AfterValidator(_float32)]
"""A float32 written as the float64 of the same value, so that it comes back bit for bit."""
