"""What a checkpoint cannot say of itself: the robot its numbers speak of, its cameras and their rate.

A description is a YAML file, one of those here or the user's own. Nothing in it has a default: an export states what an
action means, or it does not happen.
"""

from pathlib import Path

import yaml
from pydantic import ValidationError

from chatvla_edge.export.spec import Data
from chatvla_edge.runtime.bundle import Camera, Semantics, Timing

HERE = Path(__file__).parent


class Robot(Data):
    """One robot as its training data describe it."""

    semantics: Semantics
    timing: Timing
    cameras: tuple[Camera, ...]


def names() -> list[str]:
    """The descriptions that come along."""
    return sorted(path.stem for path in HERE.glob("*.yaml"))


def load(name: str) -> Robot:
    """A description by name or by path. Raises ValueError that names the file, and the YAML path of what is wrong."""
    path = HERE / f"{name}.yaml" if name in names() else Path(name)
    if not path.is_file():
        raise ValueError(
            f"there is no robot description {name!r}: expected one of {', '.join(names())}, or the path of a YAML file"
        )
    try:
        return Robot.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    except ValidationError as error:
        lines = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
        raise ValueError(f"{path}: " + "; ".join(lines)) from None
