"""Experts: every row of the paper's tables against a per-token float64 oracle and against transformers' own blocks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import naive, tiny
from transformers import MixtralConfig, Qwen2MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextSparseMoeBlock

from chatvla_edge.export.model import experts
from chatvla_edge.export.spec import ExpertsSpec

VARIANTS = {
    # Table 3 of the paper
    "static, vision-language": ExpertsSpec(static=2, static_active=0),
    "static, robot": ExpertsSpec(static=2, static_active=1),
    "dynamic 8/2": ExpertsSpec(routed=8, top_k=2),
    "shared + dynamic": ExpertsSpec(routed=8, top_k=2, shared=1),
    "static + dynamic": ExpertsSpec(routed=8, top_k=2, static=2, static_active=1),
    "static + shared + dynamic": ExpertsSpec(routed=6, top_k=3, shared=1, static=2, static_active=1),
    "static + shared": ExpertsSpec(shared=1, static=2, static_active=1),
    # Table 5, and the runs that the public scripts evaluate
    "dynamic 6/3": ExpertsSpec(routed=6, top_k=3),
    "dynamic 4/2": ExpertsSpec(routed=4, top_k=2),
    "4/2 + 1 shared": ExpertsSpec(routed=4, top_k=2, shared=1),
    "2/1 + 1 shared": ExpertsSpec(routed=2, top_k=1, shared=1),
    "every expert": ExpertsSpec(routed=4, top_k=4),
    # what other families ask for
    "no router bias": ExpertsSpec(routed=8, top_k=2, router_bias=False),
    "not renormalised": ExpertsSpec(routed=8, top_k=2, renormalize=False),
    "two shared, gated": ExpertsSpec(routed=8, top_k=2, shared=2, shared_gate=True),
    "sigmoid": ExpertsSpec(routed=8, top_k=4, scoring="sigmoid"),
    "sigmoid, no bias": ExpertsSpec(routed=6, top_k=3, scoring="sigmoid", router_bias=False),
    "sigmoid, not renormalised": ExpertsSpec(routed=6, top_k=3, scoring="sigmoid", renormalize=False),
    "own widths": ExpertsSpec(routed=8, top_k=2, shared=1, routed_width=20, shared_width=72),
}


def layer(spec: ExpertsSpec, seed: int = 0) -> torch.nn.Module:
    built = experts.mlp(tiny.language(spec)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in built.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return built


def rows(count: int = 37, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))


def assert_same(ours: torch.Tensor, expected) -> None:
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("spec", VARIANTS.values(), ids=VARIANTS)
def test_each_variant_is_the_per_token_sum_of_its_experts(spec):
    ours, x = layer(spec), rows()
    expected, visits = naive.mixture(naive.weights_of(ours), spec, x.double().numpy())
    with experts.count_routing(ours) as counts:
        assert_same(ours(x), expected)
    if spec.routed:
        assert counts.tolist() == [visits.tolist()]
        assert visits.sum() == len(x) * spec.top_k


def test_dense_is_the_swiglu_mlp():
    ours, x = layer(tiny.DENSE), rows()
    w = {f"mlp.{name}": value for name, value in naive.weights_of(ours).items()}
    assert_same(ours(x), naive.swiglu(w, "mlp", x.double().numpy()))


@pytest.mark.parametrize("spec", VARIANTS.values(), ids=VARIANTS)
def test_one_token_alone_is_that_token_among_others(spec):
    ours, x = layer(spec), rows()
    torch.testing.assert_close(ours(x[:1]), ours(x)[:1], rtol=1e-5, atol=1e-5)


def test_own_widths_are_the_shapes_of_the_weights():
    ours = layer(VARIANTS["own widths"])
    assert {tuple(expert.gate_proj.weight.shape) for expert in ours.routed} == {(20, 64)}
    assert {tuple(expert.down_proj.weight.shape) for expert in ours.shared} == {(64, 72)}


def test_leading_axes_are_kept():
    ours, x = layer(tiny.DYNAMIC), rows(12)
    torch.testing.assert_close(ours(x.view(1, 3, 4, 64)).view(12, 64), ours(x), rtol=0, atol=0)


# ------------------------------------------------------------------------------------- transformers as the oracle


def stack(modules) -> dict[str, torch.Tensor]:
    """Our experts in the stacked layout of transformers' blocks."""
    return {
        "experts.gate_up_proj": torch.stack([torch.cat([m.gate_proj.weight, m.up_proj.weight]) for m in modules]),
        "experts.down_proj": torch.stack([m.down_proj.weight for m in modules]),
    }


def test_dynamic_is_mixtrals_block():
    ours = layer(ExpertsSpec(routed=8, top_k=2, router_bias=False))
    config = MixtralConfig(hidden_size=64, intermediate_size=48, num_local_experts=8, num_experts_per_tok=2)
    theirs = MixtralSparseMoeBlock(config).eval()
    theirs.load_state_dict(stack(ours.routed) | {"gate.weight": ours.router.weight}, strict=True)
    assert_same(ours(rows()), theirs(rows()[None])[0].detach().numpy())


def test_dynamic_is_qwen3_vl_moes_block():
    ours = layer(ExpertsSpec(routed=6, top_k=3, router_bias=False))
    config = Qwen3VLMoeTextConfig(hidden_size=64, moe_intermediate_size=48, num_experts=6, num_experts_per_tok=3)
    theirs = Qwen3VLMoeTextSparseMoeBlock(config).eval()
    theirs.load_state_dict(stack(ours.routed) | {"gate.weight": ours.router.weight}, strict=True)
    assert_same(ours(rows()), theirs(rows()[None])[0].detach().numpy())


@pytest.mark.parametrize("renormalize", [False, True])
def test_shared_and_gated_is_qwen2_moes_block(renormalize):
    spec = ExpertsSpec(
        routed=8, top_k=4, router_bias=False, renormalize=renormalize, shared=1, shared_width=80, shared_gate=True
    )
    ours = layer(spec)
    config = Qwen2MoeConfig(
        hidden_size=64,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=80,
        num_experts=8,
        num_experts_per_tok=4,
        norm_topk_prob=renormalize,
    )
    theirs = Qwen2MoeSparseMoeBlock(config).eval()
    state = stack(ours.routed) | {
        "gate.weight": ours.router.weight,
        "shared_expert_gate.weight": ours.shared_gate.weight,
    }
    state |= {f"shared_expert.{name}": value for name, value in ours.shared[0].state_dict().items()}
    theirs.load_state_dict(state, strict=True)
    assert_same(ours(rows()), theirs(rows()[None])[0].detach().numpy())


# --------------------------------------------------------------------------------------------- upcycled experts


def upcycle(dense: experts.MLP, spec: ExpertsSpec) -> experts.MixtureOfExperts:
    """Every routed expert a copy of the dense MLP, as the authors initialise them."""
    built = layer(spec)
    for expert in built.routed:
        expert.load_state_dict(dense.state_dict())
    return built


@settings(max_examples=40, deadline=None)
@given(
    geometry=st.sampled_from([(8, 2), (6, 3), (4, 2), (2, 1), (4, 4)]),
    bias=st.booleans(),
    scale=st.sampled_from([0.0, 1e-4, 0.1, 1.0, 1e3]),
    seed=st.integers(0, 2**31),
)
def test_upcycled_experts_equal_their_dense_parent_for_any_router(geometry, bias, scale, seed):
    dense = layer(tiny.DENSE)
    ours = upcycle(dense, ExpertsSpec(routed=geometry[0], top_k=geometry[1], router_bias=bias))
    generator = torch.Generator().manual_seed(seed)
    for parameter in ours.router.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    x = rows(9)
    assert_same(ours(x), dense(x).numpy())


def test_a_perturbed_expert_changes_exactly_the_tokens_that_visit_it():
    dense = layer(tiny.DENSE)
    spec = ExpertsSpec(routed=8, top_k=2)
    ours, x = upcycle(dense, spec), rows(64)
    before = ours(x)
    ours.routed[3].up_proj.weight.mul_(1.01)
    changed = (ours(x) != before).any(-1)
    weights = naive.weights_of(ours)
    visits = [3 in naive.route(weights, spec, row) for row in x.double().numpy()]
    assert changed.tolist() == visits
    assert 0 < sum(visits) < len(x)
    assert (ours(x) - dense(x)).abs().max() > 1e-3


# -------------------------------------------------------------------------------------------------- the corners


def test_experts_that_nobody_visits_do_nothing():
    spec = ExpertsSpec(routed=8, top_k=2)
    ours, x = layer(spec), rows()
    ours.router.bias.copy_(torch.tensor([0, -1e4, -1e4, 0, -1e4, -1e4, -1e4, -1e4]))
    for index in (1, 2, 4, 5, 6, 7):
        for parameter in ours.routed[index].parameters():
            parameter.fill_(torch.nan)
    weights = naive.weights_of(ours)
    with experts.count_routing(ours) as counts:
        assert_same(ours(x), naive.mixture(weights, spec, x.double().numpy())[0])
    assert counts.tolist() == [[37, 0, 0, 37, 0, 0, 0, 0]]


def test_all_tokens_may_go_to_one_expert():
    spec = ExpertsSpec(routed=4, top_k=1)
    ours, x = layer(spec), rows()
    ours.router.bias.copy_(torch.tensor([0, 0, 1e4, 0]))
    assert_same(ours(x), ours.routed[2](x).numpy())


def test_routing_is_decided_in_fp32_even_in_a_bf16_model():
    spec = ExpertsSpec(routed=8, top_k=2)
    ours, x = layer(spec).bfloat16(), rows(200).bfloat16()
    weights, ids = ours.router(x)
    assert weights.dtype == torch.float32
    w = naive.weights_of(ours)
    for row, kept, chosen in zip(x.double().numpy(), weights.numpy(), ids.tolist(), strict=True):
        expected = naive.route(w, spec, row)
        assert chosen == list(expected)
        np.testing.assert_allclose(kept, list(expected.values()), rtol=1e-5)


def test_counts_are_per_layer_and_stop_with_the_context():
    spec = ExpertsSpec(routed=6, top_k=3)
    model, x = torch.nn.Sequential(layer(spec, 0), layer(spec, 1)), rows()
    with experts.count_routing(model) as counts:
        model(x)
        model(x)
    middle = model[0](x)
    first = naive.mixture(naive.weights_of(model[0]), spec, x.double().numpy())[1]
    second = naive.mixture(naive.weights_of(model[1]), spec, middle.double().numpy())[1]
    assert counts.tolist() == [(2 * first).tolist(), (2 * second).tolist()]
    model(x)
    assert counts.sum() == 2 * 2 * 3 * len(x)


def test_counting_stops_after_an_error_too():
    model = layer(tiny.DYNAMIC)
    with pytest.raises(RuntimeError, match="shapes"), experts.count_routing(model) as counts:
        model(torch.zeros(1, 63))
    model(rows())
    assert counts.sum() == 0


def test_a_model_without_routed_experts_counts_nothing():
    with experts.count_routing(layer(tiny.DENSE)) as counts:
        pass
    assert counts.shape == (0, 0)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"top_k": 2}, "no routed experts"),
        ({"routed": 8}, "top_k must lie in 1..8"),
        ({"routed": 4, "top_k": 5}, "top_k must lie in 1..4"),
        ({"static": 2, "static_active": 2}, "static_active must be below static = 2"),
        ({"shared_gate": True}, "no shared experts"),
        ({"routed_experts": 8}, "Extra inputs"),
    ],
)
def test_experts_that_cannot_be_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        ExpertsSpec(**numbers)


def test_the_variants_carry_the_papers_names():
    assert ExpertsSpec().kind == "dense"
    assert VARIANTS["static, robot"].kind == "static"
    assert VARIANTS["dynamic 8/2"].kind == "dynamic"
    assert VARIANTS["shared + dynamic"].kind == "shared + dynamic"
    assert VARIANTS["static + dynamic"].kind == "static + dynamic"
