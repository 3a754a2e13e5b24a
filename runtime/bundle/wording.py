"""One fact, one wording: what a checkpoint and a bundle both are, in the words that every command uses.

Sizes come as the plain values of an exporter's `PolicySpec` or of a manifest's `Geometry`: their names are the same.
"""

from collections.abc import Mapping
from typing import Any

Values = Mapping[str, Any]

# Published ScaleDP / DiT sizes: depth, width, heads. A checkpoint's tensors win over the name it carries.
SCALEDP_SIZES: dict[str, tuple[int, int, int]] = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "H": (32, 1280, 16),
}


def expert_kind(experts: Values) -> str:
    """The variant's name in the paper's Table 3: `dense`, `dynamic`, `shared + dynamic`, ..."""
    names = (("static", "static"), ("shared", "shared"), ("dynamic", "routed"))
    return " + ".join(name for name, field in names if experts[field]) or "dense"


def experts_in_words(experts: Values) -> str:
    """`dynamic, 8 experts, top-2`."""
    words = [expert_kind(experts)]
    if experts["routed"]:
        words.append(f"{experts['routed']} experts, top-{experts['top_k']}")
        if experts["scoring"] == "sigmoid":
            words.append("sigmoid scores")
    if experts["shared"]:
        words.append(f"{experts['shared']} shared")
    if experts["static"]:
        words.append(f"{experts['static']} static, expert {experts['static_active']} active")
    return ", ".join(words)


def head_size(head: Values) -> str:
    """The published size name that these numbers have, or `depth x width`."""
    numbers = (head["depth"], head["width"], head["heads"])
    return next((name for name, size in SCALEDP_SIZES.items() if size == numbers), f"{numbers[0]}x{numbers[1]}")


def policy_in_words(variant: str, sizes: Values, steps: tuple[int, int]) -> dict[str, str]:
    """Row -> text, for the tables of `inspect` and `inspect-checkpoint`. steps: of the sampler, at inference, trained.

    sizes: vision, language, fusion, and head (None: a model that only answers questions).
    """
    language, vision, head = sizes["language"], sizes["vision"], sizes["head"]
    rows = {
        "variant": variant,
        "experts": experts_in_words(language["experts"]),
        "language": f"{language['layers']} layers, hidden {language['hidden']}, {language['heads']} heads over "
        f"{language['kv_heads']} key/value heads, intermediate {language['intermediate']}, "
        f"vocabulary {language['vocab']}",
        "vision": f"{vision['depth']} blocks, width {vision['embed_dim']}, {vision['heads']} heads",
    }
    if head is None:
        return rows
    return rows | {
        "head": f"ScaleDP {head_size(head)}: {head['depth']} blocks, width {head['width']}, {head['heads']} heads; "
        f"{steps[0]} of {steps[1]} diffusion steps",
        "conditioning": _conditioning(sizes["fusion"], head),
        "chunk": f"{head['horizon']} actions of {head['action_dim']}, state of {head['state_dim']}",
    }


def _conditioning(fusion: Values, head: Values) -> str:
    words = {"film": "FiLM on the reasoning", "sum": "input + reasoning"}[fusion["kind"]]
    words += {"combine": ", obs and state through an MLP", "norm": ", LayerNorm(obs) beside the state"}[
        head["conditioning"]
    ]
    if follows := head["reasoning"]:
        words += f"; blocks {follows['start']}..{follows['stop'] - 1} follow the reasoning"
        words += " and the final layer too" if follows["final"] else ", the final layer does not"
    return words


def bytes_in_words(count: int) -> str:
    """`14.60 GB`, `3.82 MB`."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
