"""Stage-1 ScaleDP heads: the pretrained diffusion trunk that a policy's training starts from.

A torch file with the state dict at ``['nets']['nets']`` (the weights) or ``['nets']['ema']`` (their moving average);
names carry `policy.` and `noise_pred_net.` in front. The trunk was pretrained behind another observation encoder, so
its condition embedding does not fit a VLA and is dropped, as the public loaders do.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from chatvla_edge.export.checkpoint.errors import at, refusal
from chatvla_edge.export.checkpoint.names import Bond, Layout, bonds
from chatvla_edge.export.checkpoint.reader import Ignored
from chatvla_edge.export.checkpoint.tensors import TensorEntry, TensorSource, open_tensors
from chatvla_edge.export.model.scaledp import ScaleDP
from chatvla_edge.export.spec import SCALEDP_SIZES, HeadSpec

_CONDITION = re.compile(r"(cond_obs_emb|combine|norm_after_pool|cond_reasoning_emb)\b.*")


@dataclass(frozen=True)
class Stage1Head:
    """A pretrained trunk.

    head: its geometry; conditioning, cond_dim and state_dim in it say nothing and are 1.
    entries: our parameter names (`head.`) -> tensors, read and checked when asked for.
    """

    path: Path
    head: HeadSpec
    entries: Mapping[str, TensorEntry]
    ignored: tuple[Ignored, ...]


def open_stage1_head(
    path: str | Path, weights: Literal["nets", "ema"] = "nets", heads: int | None = None
) -> Stage1Head:
    """Open a stage-1 head strictly. DexVLA starts from `nets`, the ChatVLA-2 research tree from `ema`.

    heads: attention heads, needed only for a trunk of no published size: tensors do not tell them.
    Raises CheckpointError, naming the tensor, for anything missing, extra or misshapen.
    """
    path = Path(path)
    source = open_tensors(path, nested=("nets", weights))
    trunk, ignored = {}, []
    for name in source:
        short = name.removeprefix("policy.")
        if not short.startswith("noise_pred_net."):
            ignored.append(Ignored(name, "the observation encoder of the first stage: a VLA has its own"))
        elif _CONDITION.fullmatch(short.removeprefix("noise_pred_net.")):
            ignored.append(Ignored(name, "conditions on the first stage's encoder; a VLA learns its own"))
        else:
            trunk["policy_head." + short.removeprefix("noise_pred_net.")] = name
    renamed = source.renamed(trunk)
    head = _geometry(renamed, path, heads)
    entries: dict[str, TensorEntry] = {}
    split = "policy_head.blocks.0.attn.q.weight" in renamed
    used: set[str] = set()
    for bond in bonds(_trunk_shapes(head), Layout(head_qkv="split" if split else "fused")):
        for name, shape in bond.theirs.items():
            if name not in renamed or renamed.shape(name) != shape:
                found = f"shape {list(renamed.shape(name))}" if name in renamed else "no tensor of this name"
                raise refusal(
                    at(path, name), found=found, expected=f"shape {list(shape)}", do="The head is damaged or truncated."
                )
        used.update(bond.theirs)
        ours = next(iter(bond.ours))
        first = renamed[next(iter(bond.theirs))]
        entries[ours] = TensorEntry(
            bond.ours[ours],
            first.dtype,
            first.origin,
            partial(_read, renamed, bond),
        )
    for name in renamed:
        if name not in used:
            raise refusal(
                at(path, trunk[name]),
                found="a tensor that has no place in a ScaleDP trunk",
                expected="a known name",
                do="This head is of another family.",
            )
    return Stage1Head(path, head, entries, tuple(ignored))


def _read(trunk: TensorSource, bond: Bond) -> Tensor:
    return bond.to_ours([trunk.read(name) for name in bond.theirs])[0]


def _trunk_shapes(head: HeadSpec) -> dict[str, tuple[int, ...]]:
    """Our names and shapes of a trunk: a head without what conditions it."""
    with torch.device("meta"):
        parameters = list(ScaleDP(head).named_parameters())
    return {f"head.{name}": tuple(value.shape) for name, value in parameters if not _CONDITION.fullmatch(name)}


def _geometry(trunk: TensorSource, path: Path, heads: int | None) -> HeadSpec:
    width, actions = _shape(trunk, "policy_head.x_embedder.weight", 2, path)
    horizon = _shape(trunk, "policy_head.pos_embed", 3, path)[1]
    mlp_width = _shape(trunk, "policy_head.blocks.0.mlp.fc1.weight", 2, path)[0]
    numbers = [int(match[1]) for name in trunk if (match := re.match(r"policy_head\.blocks\.(\d+)\.", name))]
    depth = 1 + max(numbers)
    published = {(d, n): h for d, n, h in SCALEDP_SIZES.values()}
    heads = heads or published.get((depth, width))
    if heads is None or depth > len(trunk):
        raise refusal(
            path,
            found=f"a trunk of {depth} blocks of width {width}",
            expected="one of the published sizes, or the number of attention heads",
            do="Say the number of attention heads; no tensor tells it.",
        )
    return HeadSpec(
        depth=depth,
        width=width,
        heads=heads,
        mlp_width=mlp_width,
        action_dim=actions,
        state_dim=1,
        horizon=horizon,
        cond_dim=1,
    )


def _shape(trunk: TensorSource, name: str, dims: int, path: Path) -> tuple[int, ...]:
    if name not in trunk or len(trunk.shape(name)) != dims:
        raise refusal(
            at(path, name),
            found="no such tensor" if name not in trunk else f"shape {list(trunk.shape(name))}",
            expected=f"one of {dims} dimensions",
            do="The file holds no ScaleDP head, or it lies elsewhere in it.",
        )
    return trunk.shape(name)
