"""What crosses from the language model to the head: two means, two projectors, one rule."""

import numpy as np
import pytest
import torch
from support import naive

from chatvla_edge.export.model.fusion import Fusion, prompt_mean, reasoning_mean
from chatvla_edge.export.spec import FusionSpec


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fusion(kind: str) -> Fusion:
    built = Fusion(64, FusionSpec(kind=kind)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in built.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return built


@pytest.mark.parametrize("kind", ["sum", "film"])
def test_the_vectors_are_the_published_rule(kind):
    ours = fusion(kind)
    prompt, reasoning = draw(64, seed=1), draw(64, seed=2)
    expected = naive.fuse(naive.weights_of(ours), kind, prompt.double().numpy(), reasoning.double().numpy())
    found = ours(prompt, reasoning)
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-5)


def test_untrained_film_is_the_projected_prompt_beside_its_identity():
    ours = fusion("film")
    for parameter in ours.film.parameters():
        parameter.zero_()
    prompt = draw(64, seed=1)
    torch.testing.assert_close(ours(prompt, draw(64, seed=2))[0], ours.input_projector(prompt) + prompt, rtol=0, atol=0)


def test_the_sum_rule_has_no_film_weights():
    assert not any("film" in name for name in fusion("sum").state_dict())


def test_the_prompt_counts_every_row():
    prompt = draw(132, 64, seed=3)
    np.testing.assert_allclose(prompt_mean(prompt), prompt.double().numpy().mean(0), rtol=0, atol=1e-6)


def test_the_reasoning_counts_the_decode_steps_only():
    prompt, decoded = draw(132, 64, seed=3), draw(46, 64, seed=4)
    expected = decoded.double().numpy().mean(0)
    np.testing.assert_allclose(reasoning_mean(prompt, decoded), expected, rtol=0, atol=1e-6)
    assert torch.equal(reasoning_mean(prompt + 1, decoded), reasoning_mean(prompt, decoded))


def test_an_answer_of_one_token_stands_on_the_last_prompt_row():
    prompt = draw(132, 64, seed=3)
    assert torch.equal(reasoning_mean(prompt, prompt[:0]), prompt[-1])


def test_means_are_taken_in_fp32():
    """In bf16 a running sum of ones stops at 256: a prompt of 400 rows would be 36 % short."""
    rows = (1 + 0.5 * draw(400, 64, seed=5)).bfloat16()
    for mean in (prompt_mean(rows), reasoning_mean(rows[:1], rows), reasoning_mean(rows, rows[:0])):
        assert mean.dtype == torch.float32
    exact = rows.double().numpy().mean(0)
    np.testing.assert_allclose(prompt_mean(rows), exact, rtol=1e-6)
    np.testing.assert_allclose(reasoning_mean(rows[:1], rows), exact, rtol=1e-6)


def test_a_bf16_model_projects_the_rounded_means():
    ours = fusion("sum").bfloat16()
    prompt, reasoning = draw(64, seed=1), draw(64, seed=2)
    for found, expected in zip(ours(prompt, reasoning), ours(prompt.bfloat16(), reasoning.bfloat16()), strict=True):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected)
