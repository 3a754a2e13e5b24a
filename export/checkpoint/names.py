"""Where each of our parameters stands in the public layouts, and back.

A `Bond` ties a group of public tensors to the group of our parameters that hold the same numbers. Reading and
writing go through the same bonds, so a layout that is read right is written right. Bonds come from the parameter
names of the model itself: a parameter without a rule cannot be forgotten.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from chatvla_edge.export.spec import Data

Shape = tuple[int, ...]


class Layout(Data):
    """The naming choices of a checkpoint: all public ones are combinations of these.

    prefixes: `flat` is the published one (`visual.`, `model.layers.`), `nested` that of newer transformers
      (`model.visual.`, `model.language_model.layers.`).
    experts: how routed experts are called; see `EXPERT_STYLES`.
    head_qkv: the ChatVLA-2 research tree keeps the head's attention as `q` and `kv`, the others as one `qkv`.
    """

    prefixes: Literal["flat", "nested"] = "flat"
    experts: Literal["moevla", "deepseek", "mixtral", "qwen", "stacked", "stacked-transposed"] = "moevla"
    head_qkv: Literal["fused", "split"] = "fused"


@dataclass(frozen=True)
class Bond:
    """Public tensors and our parameters with the same content.

    theirs, ours: name -> shape. to_ours and to_theirs take the tensors of one side in order and return the other's.
    """

    theirs: Mapping[str, Shape]
    ours: Mapping[str, Shape]
    to_ours: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    to_theirs: Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class ExpertStyle:
    """Names below one decoder layer; `{e}` and `{p}` stand for the expert and gate/up/down."""

    router: str
    routed: str
    shared: str
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    router_bias: bool = False


EXPERT_STYLES: dict[str, ExpertStyle] = {
    # The authors' research tree, from which ChatVLA-2's evaluated runs come.
    "moevla": ExpertStyle(
        router="share_moe_expert.routed_experts.router.topkroute_linear",
        routed="share_moe_expert.routed_experts.experts.{e}.{p}",
        shared="share_moe_expert.shared_experts.{e}.{p}",
        router_bias=True,
    ),
    # One wide MLP holds all shared experts.
    "deepseek": ExpertStyle(
        router="deepseek_expert.gate",
        routed="deepseek_expert.experts.{e}.{p}",
        shared="deepseek_expert.shared_experts.{p}",
        router_bias=True,
    ),
    "mixtral": ExpertStyle(
        router="block_sparse_moe.gate",
        routed="block_sparse_moe.experts.{e}.{p}",
        shared="block_sparse_moe.shared_expert.{p}",
        projections=("w1", "w3", "w2"),
    ),
    "qwen": ExpertStyle(router="mlp.gate", routed="mlp.experts.{e}.{p}", shared="mlp.shared_expert.{p}"),
    # All experts of a layer in two tensors; `gate_up_proj` holds gate rows, then up rows, of each expert.
    "stacked": ExpertStyle(router="mlp.gate", routed="mlp.experts.{p}", shared="mlp.shared_expert.{p}"),
}
EXPERT_STYLES["stacked-transposed"] = EXPERT_STYLES["stacked"]

STATIC = "static_expert.experts.{e}.{p}"
SHARED_GATE = "mlp.shared_expert_gate"

PREFIXES: dict[str, tuple[tuple[str, str], ...]] = {
    "flat": (("backbone.visual.", "visual."), ("backbone.language.", "model.")),
    "nested": (("backbone.visual.", "model.visual."), ("backbone.language.", "model.language_model.")),
}
# Everything outside the backbone has one public name.
COMMON: tuple[tuple[str, str], ...] = (
    ("backbone.lm_head.", "lm_head."),
    ("fusion.input_projector.", "input_action_proj.mlps."),
    ("fusion.reasoning_projector.", "reasoning_action_proj.mlps."),
    ("fusion.film.scale.", "reasoning_film.scale_fc."),
    ("fusion.film.shift.", "reasoning_film.shift_fc."),
    ("head.", "policy_head."),
)

_LAYER = re.compile(r"(backbone\.language\.layers\.\d+\.)mlp\.(.+)")
_EXPERT = re.compile(r"(routed|shared|static)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_SPLIT_QKV = re.compile(r"(head\.blocks\.\d+\.attn\.)qkv\.(weight|bias)")


def bonds(parameters: Mapping[str, Shape], layout: Layout) -> Iterator[Bond]:
    """Bonds of all parameters of a model, in the model's order.

    parameters: our names and shapes. Raises KeyError for a parameter without a public name: a defect of this table.
    """
    style = EXPERT_STYLES[layout.experts]
    stacked: set[str] = set()
    for name, shape in parameters.items():
        layer = _LAYER.fullmatch(name)
        if layer is None:
            split = _SPLIT_QKV.fullmatch(name)
            if split and layout.head_qkv == "split":
                yield _split_qkv(name, shape, public(split[1], layout), split[2])
            else:
                yield _same(public(name, layout), name, shape)
            continue
        prefix, rest = layer[1], layer[2]
        below = public(prefix, layout)
        expert = _EXPERT.fullmatch(rest)
        if expert is None:
            yield _same(below + _single(rest, style), name, shape)
        elif expert[1] == "routed" and layout.experts.startswith("stacked"):
            if prefix not in stacked:
                stacked.add(prefix)
                yield from _stacked(prefix, below, parameters, layout.experts == "stacked-transposed")
        else:
            yield _same(below + _expert(expert[1], expert[2], expert[3], style), name, shape)


def public(name: str, layout: Layout) -> str:
    """The public name of one of our names or prefixes outside the experts."""
    for ours, theirs in (*PREFIXES[layout.prefixes], *COMMON):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise KeyError(f"{name} has no public name")


def _single(rest: str, style: ExpertStyle) -> str:
    """Tensors of the MLP that are not of a numbered expert: the dense MLP, the router, the shared gate."""
    if rest.startswith("router."):
        return f"{style.router}.{rest.removeprefix('router.')}"
    if rest.startswith("shared_gate."):
        return f"{SHARED_GATE}.weight"
    return f"mlp.{rest}"


def _expert(kind: str, index: str, projection: str, style: ExpertStyle) -> str:
    template = {"routed": style.routed, "shared": style.shared, "static": STATIC}[kind]
    names = dict(zip(("gate_proj", "up_proj", "down_proj"), style.projections, strict=True))
    # Shared and static experts are plain MLPs in every family; only Mixtral renames the projections of routed ones.
    word = names[projection] if kind == "routed" else projection
    return template.format(e=index, p=word) + ".weight"


def _same(theirs: str, ours: str, shape: Shape) -> Bond:
    return Bond({theirs: shape}, {ours: shape}, list, list)


def _split_qkv(ours: str, shape: Shape, attention: str, kind: str) -> Bond:
    """Concatenating q with kv gives qkv: the products and their order are the same."""
    third = shape[0] // 3
    theirs = {f"{attention}q.{kind}": (third, *shape[1:]), f"{attention}kv.{kind}": (2 * third, *shape[1:])}
    return Bond(
        theirs,
        {ours: shape},
        lambda parts: [torch.cat(list(parts))],
        lambda parts: list(torch.split(parts[0], [third, 2 * third])),
    )


def _stacked(prefix: str, below: str, parameters: Mapping[str, Shape], transposed: bool) -> Iterator[Bond]:
    """gate_up_proj [E, 2I, H] and down_proj [E, H, I] (or both with the last two axes exchanged)."""
    routed = [name for name in parameters if name.startswith(f"{prefix}mlp.routed.")]
    count = len(routed) // 3
    width, hidden = parameters[f"{prefix}mlp.routed.0.gate_proj.weight"]
    name = f"{prefix}mlp.routed.{{}}.{{}}.weight".format

    def turn(tensor: Tensor) -> Tensor:
        return tensor.transpose(-1, -2) if transposed else tensor

    def order(rows: int, columns: int) -> Shape:
        return (count, columns, rows) if transposed else (count, rows, columns)

    yield Bond(
        {f"{below}mlp.experts.gate_up_proj": order(2 * width, hidden)},
        {name(e, p): (width, hidden) for e in range(count) for p in ("gate_proj", "up_proj")},
        lambda parts: [half for expert in turn(parts[0]) for half in torch.split(expert, width)],
        lambda parts: [turn(torch.stack([torch.cat([*pair]) for pair in zip(parts[::2], parts[1::2], strict=True)]))],
    )
    yield Bond(
        {f"{below}mlp.experts.down_proj": order(hidden, width)},
        {name(e, "down_proj"): (hidden, width) for e in range(count)},
        lambda parts: list(turn(parts[0])),
        lambda parts: [turn(torch.stack(list(parts)))],
    )
