"""Parameters, bytes and FLOPs of a policy, counted on a model without storage.

Counts are exact; FLOPs count a multiply-add as two and leave out what is neither a matrix product nor attention.
"""

from dataclasses import dataclass

from chatvla_edge.export.checkpoint.publish import parameter_shapes
from chatvla_edge.export.spec import PolicySpec

# Bits per weight. int4 counts the scale of a group of 64 weights: 4 + 16 / 64.
BITS = {"fp32": 32.0, "bf16": 16.0, "int8": 8.0, "int4": 4.25}

# Part -> prefixes of our parameter names, first match wins.
PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("vision", ("backbone.visual.",)),
    ("embedding", ("backbone.language.embed_tokens.",)),
    ("output", ("backbone.lm_head.",)),
    ("fusion", ("fusion.",)),
    ("head", ("head.",)),
)


@dataclass(frozen=True)
class Parameters:
    """Parameter counts. `active` is what one token of the language model passes through, output matrix included."""

    parts: dict[str, int]
    active: int

    @property
    def total(self) -> int:
        """All parameters; a tied output head counts once."""
        return sum(self.parts.values())

    def bytes(self, precision: str) -> int:
        """Bytes of all weights if every one of them were stored in `precision`."""
        return round(self.total * BITS[precision] / 8)


def parameters(spec: PolicySpec) -> Parameters:
    """Count the parameters of a policy, part by part."""
    parts = dict.fromkeys(
        ("vision", "embedding", "output", "attention", "mlp", "routed", "shared", "static", "router", "norm"), 0
    ) | {"fusion": 0, "head": 0}
    for name, shape in parameter_shapes(spec).items():
        count = 1
        for size in shape:
            count *= size
        parts[_part(name)] += count
    experts, language = spec.language.experts, spec.language
    active = parts["attention"] + parts["norm"] + parts["router"] + parts["mlp"] + parts["shared"]
    if experts.routed:
        active += parts["routed"] * experts.top_k // experts.routed
    if experts.static:
        active += parts["static"] // experts.static
    active += language.vocab * language.hidden
    return Parameters({name: count for name, count in parts.items() if count}, active)


def _part(name: str) -> str:
    for part, prefixes in PARTS:
        if name.startswith(prefixes):
            return part
    if ".self_attn." in name:
        return "attention"
    for part in ("router", "routed", "shared", "static"):
        if f".mlp.{part}." in name or f".mlp.{part}_gate." in name:
            return part
    return "mlp" if ".mlp." in name else "norm"


@dataclass(frozen=True)
class Flops:
    """FLOPs of the steps of one query."""

    image: int
    prefill: int
    decode: int
    denoise: int


def flops(spec: PolicySpec, prompt: int, grid: tuple[int, int] = (18, 22)) -> Flops:
    """FLOPs of one image of `grid` patches, of a prefill of `prompt` tokens, of one decode token, of one head step."""
    vision, language = spec.vision, spec.language
    patches, width = grid[0] * grid[1], spec.vision.embed_dim
    merged = width * vision.merge**2
    per_patch = vision.depth * (4 + 2 * vision.mlp_ratio) * width**2 + vision.patch_values * width
    image = patches * per_patch + vision.depth * 2 * patches**2 * width
    image += patches // vision.merge**2 * merged * (merged + language.hidden)
    counted = parameters(spec)
    body = counted.active - language.vocab * language.hidden
    attention = language.layers * 2 * prompt**2 * language.heads * language.head_dim
    prefill = body * prompt + attention + language.vocab * language.hidden
    denoise = 0
    if head := spec.head:
        adaln = (6 * head.depth + 2) * head.width**2
        trunk = head.depth * (4 * head.width**2 + 2 * head.width * head.mlp_width)
        ends = 2 * head.width * head.action_dim
        denoise = head.horizon * (trunk + ends) + adaln + head.depth * 2 * head.horizon**2 * head.width
    return Flops(*(2 * macs for macs in (image, prefill, counted.active, denoise)))
