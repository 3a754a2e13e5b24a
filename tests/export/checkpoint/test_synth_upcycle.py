"""Synthetic and upcycled checkpoints: what they promise, they compute."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import tiny

from chatvla_edge.export.checkpoint.errors import CheckpointError
from chatvla_edge.export.checkpoint.names import Layout
from chatvla_edge.export.checkpoint.publish import parameter_shapes, write_checkpoint
from chatvla_edge.export.checkpoint.reader import open_checkpoint
from chatvla_edge.export.checkpoint.synth import PRESETS, random_weights, synthesize, truncated
from chatvla_edge.export.checkpoint.tokenizer import byte_level_tokenizer
from chatvla_edge.export.checkpoint.upcycle import upcycle
from chatvla_edge.export.model.images import PRESETS as IMAGES
from chatvla_edge.export.model.policy import Observation
from chatvla_edge.export.spec import ExpertsSpec

PARENT = tiny.policy(tiny.DENSE)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parent") / "c"
    weights = dict(tiny.model(PARENT).named_parameters())
    write_checkpoint(
        directory,
        PARENT,
        Layout(),
        weights.__getitem__,
        dtype=torch.float32,
        tokenizer=byte_level_tokenizer(PARENT.tokens),
    )
    return open_checkpoint(directory)


@pytest.mark.parametrize(
    "experts",
    [
        ExpertsSpec(routed=8, top_k=2),
        ExpertsSpec(routed=6, top_k=3),
        ExpertsSpec(routed=4, top_k=2),
        ExpertsSpec(static=2, static_active=1),
        ExpertsSpec(routed=4, top_k=2, static=2, static_active=1),
    ],
    ids=lambda experts: experts.summary,
)
def test_an_upcycled_checkpoint_computes_what_its_parent_does(parent, tmp_path, experts):
    upcycle(parent, tmp_path / "c", experts)
    grown = open_checkpoint(tmp_path / "c")
    assert grown.spec.language.experts == experts
    for ours, theirs in zip(tiny.outputs(grown.model()), tiny.outputs(parent.model()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 30))
def test_it_does_so_for_any_router(parent, upcycled, seed, scale):
    model = upcycled.model()
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if ".router." in name:
            value.copy_(torch.randn(value.shape, generator=generator) * scale)
    for ours, theirs in zip(tiny.outputs(model), tiny.outputs(parent.model()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def upcycled(parent, tmp_path_factory):
    directory = tmp_path_factory.mktemp("upcycled") / "c"
    upcycle(parent, directory, ExpertsSpec(routed=8, top_k=2))
    return open_checkpoint(directory)


def test_perturbed_experts_differ_from_the_parent_and_from_each_other(parent, tmp_path):
    upcycle(parent, tmp_path / "c", ExpertsSpec(routed=8, top_k=2), perturb=0.3)
    grown = open_checkpoint(tmp_path / "c")
    first, second = (grown.tensor(f"backbone.language.layers.0.mlp.routed.{e}.up_proj.weight") for e in (0, 1))
    assert not torch.equal(first, second)
    hidden, parents = tiny.outputs(grown.model())[0], tiny.outputs(parent.model())[0]
    assert (hidden - parents).abs().max() > 1e-2


def test_shared_experts_double_the_mlp_before_training(parent, tmp_path):
    upcycle(parent, tmp_path / "c", ExpertsSpec(routed=4, top_k=2, shared=1))
    layer = open_checkpoint(tmp_path / "c").model().backbone.language.layers[0].mlp
    x = torch.randn(5, 64)
    expected = 2 * parent.model().backbone.language.layers[0].mlp(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_only_a_dense_checkpoint_can_be_upcycled(upcycled, tmp_path):
    with pytest.raises(ValueError, match="only a dense checkpoint"):
        upcycle(upcycled, tmp_path / "c", ExpertsSpec(routed=2, top_k=1))


def test_a_synthetic_checkpoint_answers_a_query(tmp_path):
    spec, layout, _ = PRESETS["tiny"]
    synthesize(tmp_path / "c", spec, layout)
    checkpoint = open_checkpoint(tmp_path / "c")
    assert (checkpoint.spec, checkpoint.layout) == (spec, layout)
    policy = checkpoint.policy([IMAGES["arx"]])
    frame = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    observation = Observation([frame], np.zeros(14, np.float32))
    answer = policy.query(observation, "pick the right card", policy.noise(0), max_tokens=8)
    assert answer.chunk.shape == (50, 14)
    assert len(answer.token_ids) == 8
    assert np.isfinite(answer.chunk).all()


def test_the_same_seed_gives_the_same_first_layers_at_any_depth():
    spec, _, _ = PRESETS["tiny"]
    whole, short = random_weights(spec, 1), random_weights(truncated(spec, 1), 1)
    for name in parameter_shapes(truncated(spec, 1)):
        assert torch.equal(whole(name), short(name))
    assert not torch.equal(
        whole("fusion.input_projector.0.weight"), random_weights(spec, 2)("fusion.input_projector.0.weight")
    )


def test_truncation_beyond_the_geometry_is_refused():
    with pytest.raises(ValueError, match=r"1\.\.2"):
        truncated(PRESETS["tiny"][0], 3)


def test_a_second_write_into_the_same_directory_is_refused(tmp_path):
    spec, layout, _ = PRESETS["tiny"]
    synthesize(tmp_path / "c", spec, layout)
    with pytest.raises(CheckpointError):
        synthesize(tmp_path / "c", spec, layout)
