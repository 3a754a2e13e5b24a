"""YAML text as plain values, and the line on which each of them stands.

Read as YAML 1.2 reads it: `yes`, `on` and `1:30` are texts, `1e-3` is a number, and no text becomes a date. A name that
stands twice in one mapping is refused (PyYAML keeps the last one without a word), and so is what grows without bound
when its aliases are written out.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

NODES_AT_MOST = 20_000
DEPTH_AT_MOST = 50

Path = tuple[str | int, ...]


class SourceError(ValueError):
    """Text that is no YAML, or none that can be taken at its word."""

    def __init__(self, path: Path, line: int, message: str) -> None:
        super().__init__(message)
        self.path, self.line = path, line


@dataclass(frozen=True)
class Source:
    """``values``: mappings with text keys, lists, texts, numbers, booleans, None. ``lines``: path -> line, from 1."""

    values: Any
    lines: dict[Path, int]

    def line(self, path: Sequence[str | int]) -> int:
        """The line of a value, or of the nearest thing around it."""
        known = tuple(path)
        while known and known not in self.lines:
            known = known[:-1]
        return self.lines.get(known, 1)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  # as PyYAML has it


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+."),
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("merge", r"^<<$", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), [*_first, ""][: len(_first) + 1])


def read(text: str) -> Source:
    """The values of a text. Raises SourceError."""
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return Source(None, {(): 1})
        _check(root, (), [0])
        values = loader.construct_document(root)
        lines: dict[Path, int] = {}
        _number(root, (), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise SourceError((), 1 if mark is None else mark.line + 1, f"no YAML: {said}") from error
    except yaml.YAMLError as error:
        raise SourceError((), 1, f"no YAML: {error}") from error
    except RecursionError:
        raise SourceError((), 1, "found lists in lists without end, expected a rig") from None
    except SourceError:
        raise
    except ValueError as error:
        raise SourceError((), 1, f"no YAML: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()
    return Source(values, lines)


def _check(node: yaml.Node, path: Path, count: list[int]) -> None:
    """Refuse double names, names that are no text, and texts that explode. ``count``: nodes so far, with aliases."""
    count[0] += 1
    line = node.start_mark.line + 1
    if count[0] > NODES_AT_MOST or len(path) > DEPTH_AT_MOST:
        raise SourceError(path, line, f"found more than {NODES_AT_MOST} values or {DEPTH_AT_MOST} levels")
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _check(item, (*path, index), count)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            at = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or not key.tag.endswith((":str", ":merge")):
                found = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                raise SourceError(path, at, f"found the name {found!r}, expected a text")
            if key.value in seen:
                raise SourceError(
                    (*path, key.value), at, f"stands here a second time, first on line {seen[key.value]}: remove one"
                )
            seen[key.value] = at
            _check(value, (*path, key.value), count)


def _number(node: yaml.Node, path: Path, lines: dict[Path, int], line: int | None = None) -> None:
    lines[path] = node.start_mark.line + 1 if line is None else line
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _number(item, (*path, index), lines)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:  # merged ones first, so that one's own name has the last word
            _number(value, (*path, key.value), lines, key.start_mark.line + 1)
