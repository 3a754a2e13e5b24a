"""The trained nano checkpoint that comes along: small enough for a repository, real enough to judge a bundle by."""

from pathlib import Path


def checkpoint() -> Path:
    """Its folder, in the public layout. Raises ValueError where this installation has none."""
    here = Path(__file__).parent
    if not (here / "config.json").is_file():
        raise ValueError(f"{here} holds no checkpoint; train one with chatvla_edge.benchmarks.math_matching.train")
    return here
