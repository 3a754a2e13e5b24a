"""What the exporter knows goes into a manifest without a rename, and comes back."""

import json

import pytest

from chatvla_edge.export.spec import (
    QWEN2_VL_2B,
    ExpertsSpec,
    FusionSpec,
    PolicySpec,
    SamplerSpec,
    TokenSpec,
    VisionSpec,
    scaledp,
)
from chatvla_edge.runtime.bundle import Camera, Geometry, Sampler, Tokens

EXPERTS = {
    "dense": ExpertsSpec(),
    "8 of 2": ExpertsSpec(routed=8, top_k=2),
    "shared": ExpertsSpec(routed=4, top_k=2, shared=1, shared_gate=True),
    "static": ExpertsSpec(static=2, static_active=1),
}


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("reasoning", ["latter", "full", "former", None])
def test_a_spec_is_a_geometry(experts, reasoning):
    language = QWEN2_VL_2B.model_copy(update={"experts": EXPERTS[experts]})
    head = scaledp("L", action_dim=14, state_dim=14, horizon=50, reasoning=reasoning)
    spec = PolicySpec(vision=VisionSpec(), language=language, fusion=FusionSpec(kind="film"), head=head)
    stated = spec.model_dump(mode="json", include={"vision", "language", "fusion", "head"})
    assert Geometry.model_validate_json(json.dumps(stated), strict=True).model_dump(mode="json") == stated


def test_a_view_without_a_head_has_no_geometry():
    spec = PolicySpec(vision=VisionSpec(), language=QWEN2_VL_2B)
    with pytest.raises(ValueError, match="head"):
        Geometry.model_validate(spec.model_dump(include={"vision", "language", "fusion", "head"}))


def test_sigmoid_routing_is_refused():
    experts = ExpertsSpec(routed=8, top_k=4, scoring="sigmoid")
    language = QWEN2_VL_2B.model_copy(update={"experts": experts})
    head = scaledp("L", action_dim=14, state_dim=14, horizon=50)
    spec = PolicySpec(vision=VisionSpec(), language=language, head=head)
    with pytest.raises(ValueError, match=r"language\.experts\.scoring"):
        Geometry.model_validate(spec.model_dump(include={"vision", "language", "fusion", "head"}))


def test_the_special_tokens_keep_their_names():
    assert Tokens(**TokenSpec().model_dump(), stop=(151645,)).image_pad == 151655


def test_the_exporters_schedule_is_a_sampler():
    from chatvla_edge.export.model.ddim import steps

    for sampler in (
        SamplerSpec(),
        SamplerSpec(steps=1),
        SamplerSpec(steps=100),
        SamplerSpec(train_steps=1000, steps=7),
    ):
        stated = {
            "kind": "ddim",
            "train_steps": sampler.train_steps,
            "clip": 1.0,
            "steps": [step.__dict__ for step in steps(sampler)],
        }
        read = Sampler.model_validate_json(json.dumps(stated), strict=True)
        assert [tuple(step.model_dump().values())[1:] for step in read.steps] == [
            step.coefficients for step in steps(sampler)
        ]


def test_every_preset_ends_at_the_grid_of_the_vision_stage():
    from chatvla_edge.export.model.images import PRESETS
    from chatvla_edge.runtime.bundle import size_after

    for preset in PRESETS.values():
        camera = Camera(name="top", height=480, width=640, preprocessing=preset.root, grid=(18, 22))
        assert size_after(camera.preprocessing, 480, 640) == (252, 308)
        # The manifest's own values, whatever taught them to act.
        again = Camera.model_validate_json(camera.model_dump_json(), strict=True)
        assert again.model_dump() == camera.model_dump()
        assert type(again.preprocessing[-1]).__module__ == "chatvla_edge.runtime.bundle.preprocessing"
