"""ScaleDP against a float64 implementation written from the published description, for every conditioning."""

import numpy as np
import pytest
import torch
from support import naive, tiny

from chatvla_edge.export.model.scaledp import ScaleDP, timestep_features
from chatvla_edge.export.spec import HeadSpec, ReasoningSpec, SamplerSpec, scaledp

VARIANTS = {
    "DexVLA": {"conditioning": "combine", "reasoning": None, "combine_width": 48},
    "ChatVLA": {"reasoning": None},
    "latter half": {"reasoning": ReasoningSpec(start=2, stop=4)},
    "full": {"reasoning": ReasoningSpec(start=0, stop=4)},
    "former half": {"reasoning": ReasoningSpec(start=0, stop=2, final=False)},
    "one block and the final layer": {"reasoning": ReasoningSpec(start=1, stop=2)},
    "Franka": {"action_dim": 10, "state_dim": 7, "horizon": 16},
}


def head(spec: HeadSpec, seed: int = 0) -> ScaleDP:
    built = ScaleDP(spec).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in built.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return built


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vectors(spec: HeadSpec):
    """Observation, reasoning and state."""
    return draw(1, spec.cond_dim, seed=1) * 2, draw(1, spec.cond_dim, seed=2) * 2, draw(1, spec.state_dim, seed=3)


def in_float64(*tensors):
    return tuple(tensor[0].double().numpy() for tensor in tensors)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_one_prediction_is_the_published_arithmetic(changes):
    spec = tiny.head(**changes)
    ours = head(spec)
    inputs = vectors(spec)
    conditions = ours.condition(*inputs)
    w = naive.split_qkv(naive.weights_of(ours))
    expected = naive.conditions(w, spec, *in_float64(*inputs))
    np.testing.assert_allclose(conditions[0][0], expected[0], rtol=0, atol=1e-5)
    if spec.reasoning is not None:
        np.testing.assert_allclose(conditions[1][0], expected[1], rtol=0, atol=1e-5)
    for t in (0, 10, 50, 90):
        x = draw(1, spec.horizon, spec.action_dim, seed=10 + t)
        noise = naive.predict_noise(w, spec, *in_float64(x), t, *expected)
        np.testing.assert_allclose(ours(x, torch.tensor([t]), conditions)[0], noise, rtol=0, atol=2e-5)
        assert np.abs(noise).max() > 0.3


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_ten_steps_are_the_published_sampler_around_it(changes):
    spec = tiny.head(**changes)
    ours, inputs = head(spec), vectors(spec)
    w = naive.split_qkv(naive.weights_of(ours))
    condition = naive.conditions(w, spec, *in_float64(*inputs))
    noise = draw(1, spec.horizon, spec.action_dim, seed=4)
    expected = naive.sample(*in_float64(noise), lambda x, t: naive.predict_noise(w, spec, x, t, *condition))
    actions = ours.sample(noise, ours.condition(*inputs), SamplerSpec())
    np.testing.assert_allclose(actions[0], expected, rtol=0, atol=1e-4)
    assert actions.dtype == torch.float32
    assert actions.abs().max() <= 1
    assert (np.abs(expected) < 1).mean() > 0.2


def test_split_projections_of_the_research_tree_fuse_into_qkv():
    spec = tiny.head()
    ours, rng = head(spec), np.random.default_rng(0)
    w = naive.split_qkv(naive.weights_of(ours))
    state = ours.state_dict()
    for index in range(spec.depth):
        name = f"blocks.{index}.attn"
        for kind, shape in (("weight", (32,)), ("bias", ())):
            q, kv = rng.normal(0, 0.2, (32, *shape)), rng.normal(0, 0.2, (64, *shape))
            w[f"{name}.q.{kind}"], w[f"{name}.kv.{kind}"] = q, kv
            state[f"{name}.qkv.{kind}"].copy_(torch.from_numpy(np.concatenate([q, kv])))
    inputs, x = vectors(spec), draw(1, spec.horizon, spec.action_dim, seed=5)
    condition = naive.conditions(w, spec, *in_float64(*inputs))
    expected = naive.predict_noise(w, spec, *in_float64(x), 40, *condition)
    np.testing.assert_allclose(ours(x, torch.tensor([40]), ours.condition(*inputs))[0], expected, rtol=0, atol=2e-5)


def test_timestep_features_have_the_published_bf16_roundings_at_every_time_step():
    ours = timestep_features(torch.arange(100))
    assert ours.dtype == torch.bfloat16
    expected = np.stack([naive.timestep_features(t) for t in range(100)])
    np.testing.assert_array_equal(ours.double().numpy(), expected)
    exact = np.exp(-np.log(1e4) * np.arange(128) / 128) * 90
    unrounded = np.concatenate([np.cos(exact), np.sin(exact)])
    assert np.abs(expected[90] - unrounded).max() > 0.1  # not a formality: the rounded table is another function


def test_the_oracle_rounds_to_bf16_as_torch_does():
    x = torch.cat([draw(4096, seed=6), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0.0])])
    np.testing.assert_array_equal(naive.to_bf16(x.numpy()), x.bfloat16().float().numpy())


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_the_reasoning_is_read_exactly_where_the_spec_says(changes):
    spec = tiny.head(**changes)
    ours = head(spec)
    observation, reasoning, state = vectors(spec)
    used = {"observation": [], "reasoning": []}
    conditions = tuple(c.clone() for c in ours.condition(observation, reasoning, state))
    x, t = draw(1, spec.horizon, spec.action_dim, seed=9), torch.tensor([30])
    changed = ours.condition(observation, reasoning + 1, state)
    for layer in [*ours.blocks, ours.final_layer]:
        seen = []
        hook = layer.register_forward_hook(lambda _m, inputs, _o, seen=seen: seen.append(inputs[1]))
        ours(x, t, conditions)
        ours(x, t, changed)
        hook.remove()
        used["observation" if torch.equal(*seen) else "reasoning"].append(layer)
    follows = set()
    if spec.reasoning is not None:
        follows = set(ours.blocks[spec.reasoning.start : spec.reasoning.stop])
        follows |= {ours.final_layer} if spec.reasoning.final else set()
    assert set(used["reasoning"]) == follows
    assert len(used["observation"]) + len(used["reasoning"]) == spec.depth + 1


def test_the_state_reaches_the_head():
    for changes in VARIANTS.values():
        spec = tiny.head(**changes)
        ours, (observation, reasoning, state) = head(spec), vectors(spec)
        before, after = (ours.condition(observation, reasoning, s) for s in (state, state + 1))
        assert all((a - b).abs().max() > 1e-2 for a, b in zip(before, after, strict=True))


def test_action_rows_are_told_apart_by_their_position_only():
    spec = tiny.head()
    ours = head(spec)
    ours.pos_embed.zero_()
    x, order = draw(1, spec.horizon, spec.action_dim, seed=1), torch.randperm(spec.horizon)
    conditions, t = ours.condition(*vectors(spec)), torch.tensor([20])
    torch.testing.assert_close(ours(x[:, order], t, conditions), ours(x, t, conditions)[:, order], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ published sizes


def parameters(spec: HeadSpec) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in ScaleDP(spec).parameters())


def counted_by_hand(spec: HeadSpec) -> int:
    n, joined = spec.width, spec.cond_dim + spec.state_dim
    block = 4 * n * n + 4 * n + 8 * n * n + 5 * n + 6 * n * n + 6 * n  # attention, MLP of width 4 n, modulation
    final = 2 * n * n + 2 * n + n * spec.action_dim + spec.action_dim
    tokens = spec.action_dim * n + n + spec.horizon * n + 256 * n + n + n * n + n
    if spec.conditioning == "combine":
        condition = (joined + 1) * 1024 + 1025 * 1024 + 1025 * spec.cond_dim + (spec.cond_dim + 1) * n
    else:
        condition = 2 * spec.cond_dim + (joined + 1) * n * (2 if spec.reasoning else 1)
    return spec.depth * block + final + tokens + condition


MILLIONS = {  # 14 actions, 14 states, chunk 50: ChatVLA, with reasoning, DexVLA
    "L": (458.4, 460.0, 462.6),
    "H": (951.7, 953.7, 955.9),
}


@pytest.mark.parametrize("size", ["S", "B", "L", "XL", "H"])
def test_published_sizes_have_the_published_parameter_counts(size):
    arx = {"action_dim": 14, "state_dim": 14, "horizon": 50}
    heads = (
        scaledp(size, **arx),
        scaledp(size, reasoning="latter", **arx),
        scaledp(size, conditioning="combine", **arx),
    )
    counts = [parameters(spec) for spec in heads]
    assert counts == [counted_by_hand(spec) for spec in heads]
    assert [spec.size for spec in heads] == [size] * 3
    if size in MILLIONS:
        assert tuple(round(count / 1e6, 1) for count in counts) == MILLIONS[size]


def test_the_one_billion_head_that_follows_its_reasoning_has_953_655_566_parameters():
    assert parameters(scaledp("H", action_dim=14, state_dim=14, horizon=50, reasoning="latter")) == 953_655_566


def test_table_6_rows_name_their_blocks():
    rows = {
        name: scaledp("H", action_dim=14, state_dim=14, horizon=50, reasoning=name).reasoning
        for name in ("latter", "full", "former")
    }
    assert rows["latter"] == ReasoningSpec(start=16, stop=32, final=True)
    assert rows["full"] == ReasoningSpec(start=0, stop=32, final=True)
    assert rows["former"] == ReasoningSpec(start=0, stop=16, final=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditioning": "combine"}, "needs the `norm` conditioning"),
        ({"reasoning": ReasoningSpec(start=2, stop=5)}, "do not lie in 0..4"),
        ({"reasoning": ReasoningSpec(start=2, stop=2)}, "do not lie in 0..4"),
        ({"heads": 5}, "does not divide over 5"),
    ],
)
def test_heads_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.head(**changes)
