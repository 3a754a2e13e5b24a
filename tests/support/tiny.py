"""A ChatVLA-2 of a few hundred thousand parameters, every part present."""

import torch

from chatvla_edge.export.model.backbone import mrope_positions
from chatvla_edge.export.model.policy import ChatVLA2
from chatvla_edge.export.spec import (
    ExpertsSpec,
    FusionSpec,
    HeadSpec,
    LanguageSpec,
    PolicySpec,
    ReasoningSpec,
    TokenSpec,
    VisionSpec,
)

TOKENS = TokenSpec(im_start=300, im_end=301, vision_start=302, vision_end=303, image_pad=304, endoftext=305)

DENSE = ExpertsSpec()
DYNAMIC = ExpertsSpec(routed=8, top_k=2)


def language(experts: ExpertsSpec = DYNAMIC, **changes) -> LanguageSpec:
    sizes = {
        "vocab": 320,
        "hidden": 64,
        "layers": 3,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "intermediate": 48,
        "mrope_section": (2, 3, 3),
        "rope_theta": 1e4,
    }
    return LanguageSpec(**(sizes | changes), experts=experts)


def head(**changes) -> HeadSpec:
    sizes = {
        "depth": 4,
        "width": 32,
        "heads": 4,
        "mlp_width": 128,
        "action_dim": 14,
        "state_dim": 14,
        "horizon": 10,
        "cond_dim": 64,
        "reasoning": ReasoningSpec(start=2, stop=4),
    }
    return HeadSpec(**(sizes | changes))


def policy(experts: ExpertsSpec = DYNAMIC, *, fusion: str = "sum", head_spec: HeadSpec | None = None) -> PolicySpec:
    return PolicySpec(
        vision=VisionSpec(depth=2, embed_dim=32, heads=2),
        language=language(experts),
        fusion=FusionSpec(kind=fusion),
        head=head_spec or head(),
        tokens=TOKENS,
    )


def model(spec: PolicySpec | None = None, seed: int = 0, scale: float = 0.08) -> ChatVLA2:
    """Random weights with every tensor away from its zero initialisation, so that nothing is silently unused."""
    built = ChatVLA2(spec or policy()).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in built.named_parameters():
        is_norm = "norm" in name and name.endswith("weight")
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + (1.0 if is_norm else 0.0))
    return built


def outputs(model):
    """Numbers that depend on every weight: image tokens, logits, the sampled chunk."""
    generator = torch.Generator().manual_seed(5)
    patches = torch.randn(32, 1176, generator=generator)
    grids = [(4, 8)]
    ids = torch.tensor([300, 7, *[304] * 8, 9, 11, 301])
    positions, _ = mrope_positions(ids, grids, 304)
    backbone = model.backbone
    hidden = backbone.hidden(backbone.embed(ids, backbone.images(patches, grids)), positions)
    result = [hidden, backbone.logits(hidden)]
    if model.spec.head is not None:
        observed, reasoned = model.fusion(hidden.mean(0), hidden[3:].mean(0))
        state = torch.randn(1, model.spec.head.state_dim, generator=generator)
        conditions = model.head.condition(observed[None], reasoned[None], state)
        noise = torch.randn(1, model.spec.head.horizon, model.spec.head.action_dim, generator=generator)
        result.append(model.head.sample(noise, conditions, model.spec.sampler))
    return result
