"""Synthetic checkpoints of any geometry in the public layout: random weights, real names, shapes and files.

They stand in where no trained weights are public: for memory, time, parity and layout, never for accuracy. Weights
depend on the seed and on each tensor's own name, so a truncated checkpoint holds the same first layers as the whole.
"""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from chatvla_edge.export.checkpoint.names import Layout
from chatvla_edge.export.checkpoint.publish import parameter_shapes, write_checkpoint
from chatvla_edge.export.checkpoint.statistics import Statistics
from chatvla_edge.export.checkpoint.tokenizer import byte_level_tokenizer
from chatvla_edge.export.spec import (
    QWEN2_VL_2B,
    ExpertsSpec,
    FusionSpec,
    HeadSpec,
    LanguageSpec,
    PolicySpec,
    ReasoningSpec,
    TokenSpec,
    VisionSpec,
    scaledp,
)


class Robot(TypedDict):
    """Sizes that a robot gives its head."""

    action_dim: int
    state_dim: int
    horizon: int


ARX: Robot = {"action_dim": 14, "state_dim": 14, "horizon": 50}
FRANKA: Robot = {"action_dim": 10, "state_dim": 7, "horizon": 16}

_PAPER = ExpertsSpec(routed=8, top_k=2)
_EVALUATED = ExpertsSpec(routed=4, top_k=2, shared=1)
_V1 = ExpertsSpec(static=2, static_active=1)


def _two_billion(experts: ExpertsSpec, head: HeadSpec | None, fusion: FusionSpec | None = None) -> PolicySpec:
    return PolicySpec(
        vision=VisionSpec(),
        language=QWEN2_VL_2B.model_copy(update={"experts": experts}),
        fusion=fusion or FusionSpec(),
        head=head,
    )


_FILM = FusionSpec(kind="film")

PRESETS: dict[str, tuple[PolicySpec, Layout, str]] = {
    "tiny": (
        PolicySpec(
            vision=VisionSpec(depth=2, embed_dim=64, heads=4),
            language=LanguageSpec(
                vocab=262,
                hidden=64,
                layers=2,
                heads=4,
                kv_heads=2,
                head_dim=16,
                intermediate=96,
                mrope_section=(2, 3, 3),
                experts=_PAPER,
            ),
            head=HeadSpec(
                depth=4,
                width=64,
                heads=4,
                mlp_width=256,
                cond_dim=64,
                reasoning=ReasoningSpec(start=2, stop=4),
                **ARX,
            ),
            tokens=TokenSpec(im_start=256, im_end=257, vision_start=258, vision_end=259, image_pad=260, endoftext=261),
        ),
        Layout(head_qkv="split"),
        "all parts of ChatVLA-2, under a million parameters",
    ),
    "chatvla2-2b": (
        _two_billion(_PAPER, scaledp("H", **ARX, reasoning="latter")),
        Layout(head_qkv="split"),
        "the paper: 8 experts, top-2, ScaleDP-H, ARX",
    ),
    "chatvla2-2b-arx": (
        _two_billion(_EVALUATED, scaledp("L", **ARX, reasoning="latter")),
        Layout(head_qkv="split"),
        "the authors' evaluated ARX run: 4 routed + 1 shared, ScaleDP-L",
    ),
    "chatvla2-2b-franka": (
        _two_billion(_EVALUATED, scaledp("L", **FRANKA, reasoning="latter")),
        Layout(head_qkv="split"),
        "the authors' evaluated Franka run: 4 routed + 1 shared, ScaleDP-L",
    ),
    "chatvla-2b": (
        _two_billion(_V1, scaledp("L", **FRANKA), _FILM),
        Layout(),
        "ChatVLA v1: two static experts, FiLM, ScaleDP-L",
    ),
    "dexvla-2b": (
        _two_billion(ExpertsSpec(), scaledp("H", **ARX, conditioning="combine"), _FILM),
        Layout(),
        "DexVLA: dense, FiLM, ScaleDP-H",
    ),
    "qwen2-vl-2b": (_two_billion(ExpertsSpec(), None), Layout(), "the base model, without a head"),
}


def truncated(spec: PolicySpec, layers: int) -> PolicySpec:
    """The same policy with the first `layers` decoder layers only."""
    if not 1 <= layers <= spec.language.layers:
        raise ValueError(f"layers must lie in 1..{spec.language.layers}, found {layers}")
    return spec.model_copy(update={"language": spec.language.model_copy(update={"layers": layers})})


def random_weights(spec: PolicySpec, seed: int) -> Callable[[str], Tensor]:
    """Our parameter name -> fp32 weights that keep activations of order one through any depth.

    Matrices have variance 0.36 / fan-in, norms lie near 1, and what training starts at zero (adaLN, FiLM, the final
    layer) does not, so that every condition moves the output.
    """
    shapes = parameter_shapes(spec)

    def weights(name: str) -> Tensor:
        shape = shapes[name]
        # hashlib, not hash(): the latter differs from process to process.
        digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        values = torch.randn(shape, generator=generator)
        last = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if name.endswith("weight") and ("norm" in last or last == "ln_q"):
            return values.mul_(0.02).add_(1)
        if len(shape) == 1 or last == "pos_embed":
            return values.mul_(0.02)
        fan_in = math.prod(shape[1:])
        # A tied embedding is the output matrix too: 1 / sqrt(D) gives logits of order one.
        return values.mul_((1.0 if "embed_tokens" in name else 0.6) / fan_in**0.5)

    return weights


def synthetic_statistics(head: HeadSpec) -> Statistics:
    """Plausible units: joints and positions within +-1.5, everything centred."""
    zeros, ones = np.zeros, np.ones
    actions, states = head.action_dim, head.state_dim
    return Statistics(
        action_mean=zeros(actions, np.float32),
        action_std=np.full(actions, 0.75, np.float32),
        action_min=np.full(actions, -1.5, np.float32),
        action_max=np.full(actions, 1.5, np.float32),
        qpos_mean=zeros(states, np.float32),
        qpos_std=ones(states, np.float32),
    )


def synthesize(
    directory: Path,
    spec: PolicySpec,
    layout: Layout,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a synthetic checkpoint; one tensor at a time is in memory, whatever the geometry."""
    write_checkpoint(
        directory,
        spec,
        layout,
        random_weights(spec, seed),
        dtype=dtype,
        statistics=synthetic_statistics(spec.head) if spec.head else None,
        tokenizer=byte_level_tokenizer(spec.tokens),
        progress=progress,
    )
