"""The reference model over batches: the same parameters and the same arithmetic, laid out for training.

The reference itself takes one question at a time, as a robot asks. A batch here holds moments that all have the same
prompt and one picture of the same size; the tests compare every function with the reference, row by row.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from chatvla_edge.export.model.backbone import Backbone
from chatvla_edge.export.model.experts import MixtureOfExperts
from chatvla_edge.export.model.images import MEAN, STD

Rotary = tuple[Tensor, Tensor]
"""cos and sin, both [..., T, head_dim]."""


def patches(frames: Tensor, side: int = 14, merge: int = 2) -> Tensor:
    """Normalised patches of frames [B, height, width, 3] uint8, one temporal slice: [B, rows * columns, 3 * side^2].

    In the order of `export.model.images.patches`.
    """
    batch, height, width, _ = frames.shape
    mean, std = (torch.from_numpy(value).to(frames.device) for value in (MEAN, STD))
    normal = (frames.float() / 255 - mean) / std
    rows, columns = height // (side * merge), width // (side * merge)
    cut = normal.reshape(batch, rows, merge, side, columns, merge, side, 3)
    return cut.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(batch, rows * columns * merge**2, 3 * side**2)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding of x [..., T, head_dim], halves paired."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def vision_rotary(backbone: Backbone, rows: int, columns: int) -> Rotary:
    """For a grid of rows x columns patches in merge order, [rows * columns, head_dim]."""
    merge, vision = backbone.spec.vision.merge, backbone.spec.vision
    quarter = vision.embed_dim // vision.heads // 4
    row = torch.arange(rows).reshape(rows // merge, 1, merge, 1).expand(-1, columns // merge, -1, merge).flatten()
    column = torch.arange(columns).reshape(1, columns // merge, 1, merge).expand(rows // merge, -1, merge, -1).flatten()
    frequency = 1.0 / 10000 ** (torch.arange(quarter) / quarter)
    angle = torch.cat([row[:, None] * frequency, column[:, None] * frequency], dim=-1)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def images(backbone: Backbone, seen: Tensor, rotary: Rotary) -> Tensor:
    """Image tokens of patches [B, P, 588] -> [B, P / 4, D]."""
    visual, heads = backbone.visual, backbone.spec.vision.heads
    batch, count, _ = seen.shape
    # Both temporal slices of the patch convolution see the same frame.
    x = F.linear(seen, visual.patch_embed.proj.weight.sum(dim=2).flatten(1))
    for block in visual.blocks:
        qkv = block.attn.qkv(block.norm1(x)).view(batch, count, 3, heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(qkv[0], rotary), rotate(qkv[1], rotary), qkv[2])
        x = x + block.attn.proj(mixed.transpose(1, 2).reshape(batch, count, -1))
        x = x + block.mlp(block.norm2(x))
    merged = visual.merger.ln_q(x).view(batch, count // 4, -1)
    out: Tensor = visual.merger.mlp(merged)
    return out


def language_rotary(backbone: Backbone, positions: Tensor) -> Rotary:
    """For positions [3, T]: [T, head_dim]."""
    language = backbone.spec.language
    half = language.head_dim // 2
    frequency = 1.0 / language.rope_theta ** (torch.arange(half) / half)
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(language.mrope_section))
    angle = positions[axis].T * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def experts(layer: MixtureOfExperts, rows: Tensor) -> Tensor:
    """Routed experts over rows [T, D], each expert once over the tokens that chose it."""
    weights, ids = layer.router(rows)
    order = ids.flatten().argsort(stable=True)
    token = order // layer.router.top_k
    counts = torch.bincount(ids.flatten(), minlength=len(layer.routed)).tolist()
    parts = torch.split(rows.index_select(0, token), counts)
    mixed = torch.cat([expert(part) for expert, part in zip(layer.routed, parts, strict=True)])
    scaled = mixed * weights.flatten().index_select(0, order)[:, None]
    return torch.zeros_like(rows).index_add(0, token, scaled)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def attend(x: Tensor, weights: tuple[Tensor, ...], rotary: Rotary, heads: int, eps: float) -> tuple[Tensor, Tensor]:
    """The first half of a layer: x [B, T, D] with causal attention added, and its norm for the experts.

    Takes tensors instead of the layer, so that one compiled form serves all layers.
    """
    before, wq, bq, wk, bk, wv, bv, wo, after = weights
    batch, count, _ = x.shape
    normal = _norm(x, before, eps)
    dim = wq.shape[0] // heads
    q, k, v = (
        F.linear(normal, weight, bias).view(batch, count, -1, dim).transpose(1, 2)
        for weight, bias in ((wq, bq), (wk, bk), (wv, bv))
    )
    groups = heads // k.shape[1]
    k, v = (part.repeat_interleave(groups, dim=1) for part in (rotate(k, rotary), v))
    mixed = F.scaled_dot_product_attention(rotate(q, rotary), k, v, is_causal=True)
    x = x + F.linear(mixed.transpose(1, 2).reshape(batch, count, -1), wo)
    return x, _norm(x, after, eps)


Attend = Callable[[Tensor, tuple[Tensor, ...], Rotary, int, float], tuple[Tensor, Tensor]]


def hidden(
    backbone: Backbone,
    embedded: Tensor,
    rotary: Rotary,
    attention: Attend = attend,
    middle: list[Tensor] | None = None,
) -> Tensor:
    """Final-norm hidden states [B, T, D] of embedded [B, T, D]; causal, so padding on the right disturbs nothing.

    rotary: [T, head_dim], or [B, 1, T, head_dim] where rows have positions of their own; attention: `attend`, or its
    compiled form; middle: takes the residual stream behind the first half of the layers.
    """
    language = backbone.spec.language
    x = embedded
    for index, layer in enumerate(backbone.language.layers):
        if middle is not None and index == language.layers // 2:
            middle.append(x)
        part = layer.self_attn
        weights = (
            layer.input_layernorm.weight,
            part.q_proj.weight,
            part.q_proj.bias,
            part.k_proj.weight,
            part.k_proj.bias,
            part.v_proj.weight,
            part.v_proj.bias,
            part.o_proj.weight,
            layer.post_attention_layernorm.weight,
        )
        x, normal = attention(x, weights, rotary, language.heads, language.rms_eps)
        x = x + experts(layer.mlp, normal.flatten(0, 1)).view_as(x)
    return _norm(x, backbone.language.norm.weight, language.rms_eps)
