"""The manifest as bytes: canonical JSON under a seal, and a reader that trusts none of it.

The seal is the SHA-256 of everything else in the manifest. It finds accidents, not attackers: whoever can write the
manifest can also seal it.
"""

import hashlib
import json
import re
from typing import Any, NoReturn

from pydantic import ValidationError

from .errors import AGAIN, EDITED, BundleError, refusal
from .manifest import FORMAT, SCHEMA_VERSION, Manifest
from .values import repeated

# Of a 2B policy for TensorRT with its weights as engine inputs, the manifest has about 300 kB.
LARGEST = 4 * 2**20
_DEEPEST = 24
_LONGEST_NUMBER = 40
# The closing quote is optional: a string without an end must not make the search start over inside it, again and again.
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)


def canonical(value: object) -> bytes:
    """Return the one text of a JSON value: sorted keys, ASCII, floats as the shortest digits that read back equal."""
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


def seal(table: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its seal."""
    return hashlib.sha256(canonical({key: value for key, value in table.items() if key != "seal"})).hexdigest()


def encode(manifest: Manifest) -> bytes:
    """Return the bytes of `manifest.json`."""
    table = manifest.model_dump(mode="json")
    data = canonical({**table, "seal": seal(table)})
    if len(data) > LARGEST:
        raise BundleError(f"a manifest of {len(data)} bytes would not be read again: the limit is {LARGEST} bytes")
    return data


def decode(data: bytes, where: str) -> tuple[Manifest, str]:
    """Return the manifest in the bytes of a `manifest.json`, and its seal, which is the bundle's identity.

    Raises:
        BundleError: anything is not as `encode` writes it.
    """
    table = _table(data, where)
    _refuse_other_schema(table, where)
    found = table.pop("seal", None)
    try:
        # Through the text, since strict validation takes JSON's arrays for tuples only there.
        manifest = Manifest.model_validate_json(canonical(table), strict=True)
    except ValidationError as error:
        raise explained(error, where, do=EDITED) from None
    expected = seal(table)
    if found != expected:
        raise refusal(
            where, found=f"the seal {found!r}", expected=f"{expected!r}, the digest of its contents", do=EDITED
        )
    return manifest, expected


def _table(data: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object in the bytes: bounded in size and depth, no key twice, every number finite."""

    def refuse(found: str, expected: str) -> BundleError:
        return refusal(where, found=found, expected=expected, do=AGAIN)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            twice = repeated(key for key, _ in pairs)[0]
            raise refuse(f"the key {_short(twice)} twice in one object", "each key once")
        return table

    def constant(name: str) -> NoReturn:
        raise refuse(f"the literal {name}", "finite numbers")

    def integer(digits: str) -> int:
        if len(digits) > _LONGEST_NUMBER:
            raise refuse(f"an integer of {len(digits)} digits", f"numbers of up to {_LONGEST_NUMBER} digits")
        return int(digits)

    def real(digits: str) -> float:
        if abs(value := float(digits)) == float("inf"):
            raise refuse(f"the number {digits[:40]}, beyond every float", "finite numbers")
        return value

    if len(data) > LARGEST:
        raise refuse(f"more than {LARGEST} bytes", "a manifest, which has some thousand")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse(f"bytes that are no UTF-8 at {error.start}", "JSON in UTF-8") from None
    depth = 0
    for token in _STRING_OR_BRACKET.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token.group(), 0)
        if depth > _DEEPEST:
            raise refuse(f"more than {_DEEPEST} nested brackets", "a manifest, which has about ten")
    try:
        value = json.loads(text, object_pairs_hook=once, parse_constant=constant, parse_int=integer, parse_float=real)
    except json.JSONDecodeError as error:
        raise refuse(f"no JSON ({error})", "a manifest") from None
    if not isinstance(value, dict):
        raise refuse(f"a JSON {type(value).__name__}", "an object")
    return value


def _refuse_other_schema(table: dict[str, Any], where: str) -> None:
    """Raise where the manifest is not ours, or of a schema that this version does not read."""
    kind, schema = table.get("format"), table.get("schema_version")
    if kind != FORMAT:
        raise refusal(
            where, found=f"the format {_short(kind)}", expected=repr(FORMAT), do="Pass the directory that export wrote."
        )
    if not isinstance(schema, int) or isinstance(schema, bool):
        raise refusal(where, found=f"schema_version {_short(schema)}", expected=f"{SCHEMA_VERSION}", do=AGAIN)
    if schema > SCHEMA_VERSION:
        raise BundleError(
            f"{where}: made by a newer version: found schema_version {schema}, this reads {SCHEMA_VERSION}: "
            "upgrade chatvla-edge, or export the checkpoint with this version"
        )
    if schema < SCHEMA_VERSION:
        raise BundleError(
            f"{where}: made by an older version: found schema_version {schema}, this reads {SCHEMA_VERSION}: "
            "export the checkpoint anew"
        )


def explained(error: ValidationError, where: str, *, do: str) -> BundleError:
    """Return pydantic's findings as sentences, the first five of them."""
    findings = error.errors(include_url=False)
    if findings[0]["type"] == "json_invalid":  # all else that is no JSON was found before
        return refusal(where, found="a string that is no Unicode", expected="whole characters", do=AGAIN)
    sentences = []
    for finding in findings[:5]:
        place = ".".join(str(part)[:80] for part in finding["loc"])
        given, message = finding["input"], finding["msg"].removeprefix("Value error, ")
        # A check of a whole model names what it found itself; the model would only bury it.
        found = "" if isinstance(given, dict) else f"found {_short(given)}; "
        sentences.append(f"{place}: {found}{message}" if place else message)
    if len(findings) > len(sentences):
        sentences.append(f"and {len(findings) - len(sentences)} more")
    return BundleError(f"{where}: {'; '.join(sentences)}. {do}".rstrip())


def _short(value: object) -> str:
    """Return a value as messages show it."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
