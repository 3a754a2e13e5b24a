"""The sampler is diffusers' DDIM; committed actions ride through it unchanged."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from support import naive

from chatvla_edge.export.model import ddim
from chatvla_edge.export.spec import SamplerSpec

SHAPE = (1, 16, 10)


def diffusers_ddim(sampler: SamplerSpec) -> DDIMScheduler:
    """As the public heads construct it."""
    scheduler = DDIMScheduler(
        num_train_timesteps=sampler.train_steps,
        beta_schedule="squaredcos_cap_v2",
        clip_sample=True,
        set_alpha_to_one=True,
        steps_offset=0,
        prediction_type="epsilon",
    )
    scheduler.set_timesteps(sampler.steps)
    return scheduler


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SAMPLERS = [SamplerSpec(), SamplerSpec(steps=5), SamplerSpec(steps=7), SamplerSpec(train_steps=1000, steps=20)]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{s.train_steps}-{s.steps}")
def test_the_schedule_is_diffusers_own(sampler):
    theirs = diffusers_ddim(sampler)
    assert torch.equal(ddim.alpha_bars(sampler), theirs.alphas_cumprod)
    assert [at.timestep for at in ddim.steps(sampler)] == theirs.timesteps.tolist()


def test_the_published_sampler_visits_90_to_0_with_the_published_signal_power():
    steps = ddim.steps(SamplerSpec())
    assert [at.timestep for at in steps] == [90, 80, 70, 60, 50, 40, 30, 20, 10, 0]
    published = [0.019544, 0.085146, 0.190727, 0.326115, 0.478265, 0.632516, 0.774006, 0.889103, 0.966717, 0.999369]
    assert [round(at.signal**2, 6) for at in steps] == published
    np.testing.assert_allclose(ddim.alpha_bars(SamplerSpec()), naive.alpha_bars(), rtol=2e-5, atol=1e-9)
    for at, after in zip(steps, [*steps[1:], None], strict=True):
        assert at.coefficients == (at.signal, at.noise, at.next_signal, at.next_noise)
        assert (at.next_signal, at.next_noise) == ((after.signal, after.noise) if after else (1.0, 0.0))


@pytest.mark.parametrize("index", range(10))
def test_each_step_is_diffusers_step(index):
    theirs, at = diffusers_ddim(SamplerSpec()), ddim.steps(SamplerSpec())[index]
    x, epsilon = draw(*SHAPE, seed=index) * 1.5, draw(*SHAPE, seed=100 + index)
    expected = theirs.step(model_output=epsilon, timestep=at.timestep, sample=x).prev_sample
    torch.testing.assert_close(ddim.step(x, epsilon, at), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{s.train_steps}-{s.steps}")
@pytest.mark.parametrize("seed", range(5))
def test_a_whole_run_is_diffusers_run(sampler, seed):
    theirs = diffusers_ddim(sampler)
    ours = expected = draw(*SHAPE, seed=seed)
    for index, (at, timestep) in enumerate(zip(ddim.steps(sampler), theirs.timesteps, strict=True)):
        epsilon = draw(*SHAPE, seed=1000 * seed + index)
        ours = ddim.step(ours, epsilon, at)
        expected = theirs.step(model_output=epsilon, timestep=timestep, sample=expected).prev_sample
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_x0_is_clamped_and_the_last_step_returns_it():
    at = ddim.steps(SamplerSpec())[-1]
    x, epsilon = draw(*SHAPE) * 2, draw(*SHAPE, seed=1)
    expected = ((x - at.noise * epsilon) / at.signal).clamp(-1, 1)
    assert torch.equal(ddim.step(x, epsilon, at), expected)
    assert expected.abs().max() == 1
    assert expected.abs().min() < 1


def test_the_noise_is_kept_as_predicted_where_x0_is_clamped():
    at = ddim.steps(SamplerSpec())[0]
    x, epsilon = torch.full(SHAPE, 3.0), torch.zeros(SHAPE)
    torch.testing.assert_close(ddim.step(x, epsilon, at), torch.full(SHAPE, at.next_signal), rtol=0, atol=0)


def test_a_bf16_model_still_samples_in_fp32():
    at = ddim.steps(SamplerSpec())[3]
    x, epsilon = draw(*SHAPE).bfloat16(), draw(*SHAPE, seed=1).bfloat16()
    out = ddim.step(x, epsilon, at)
    assert out.dtype == torch.float32
    assert torch.equal(out, ddim.step(x.float(), epsilon.float(), at))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [({"steps": 0}, "greater than or equal to 1"), ({"train_steps": 5}, "10 inference steps do not fit into 5")],
)
def test_a_sampler_that_cannot_be_is_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        SamplerSpec(**numbers)


# ------------------------------------------------------------------------------------------- committed prefix


def run(noise, epsilons, committed=None):
    x, seen = noise, []
    for at, epsilon in zip(ddim.steps(SamplerSpec()), epsilons, strict=True):
        x = ddim.step(x, epsilon, at, committed)
        seen.append(x)
    return seen


@pytest.fixture
def noise():
    return draw(*SHAPE, seed=7)


@pytest.fixture
def epsilons():
    return [draw(*SHAPE, seed=50 + index) for index in range(10)]


@pytest.fixture
def prefix():
    return draw(16, 10, seed=8).clamp(-1, 1)


def test_fully_committed_rows_come_back_exactly_whatever_the_model_predicts(noise, epsilons, prefix):
    mask = torch.zeros(16)
    mask[:5] = 1
    free, held = run(noise, epsilons)[-1][0], run(noise, epsilons, ddim.Committed(prefix, mask))[-1][0]
    assert torch.equal(held[:5], prefix[:5])
    assert torch.equal(held[5:], free[5:])
    wild = run(noise, [100 * epsilon for epsilon in epsilons], ddim.Committed(prefix, mask))[-1][0]
    assert torch.equal(wild[:5], prefix[:5])


def test_a_zero_mask_changes_nothing_bit_for_bit(noise, epsilons, prefix):
    unused = ddim.Committed(torch.zeros(16, 10), torch.zeros(16))
    for free, same, other in zip(
        run(noise, epsilons),
        run(noise, epsilons, unused),
        run(noise, epsilons, ddim.Committed(prefix, torch.zeros(16))),
        strict=True,
    ):
        assert torch.equal(free, same)
        assert torch.equal(free, other)


def test_committed_rows_walk_the_noising_path_of_their_prefix_with_the_noise_they_started_from(noise, epsilons, prefix):
    bars = naive.alpha_bars()
    x, action = noise[0].double().numpy(), prefix.double().numpy()
    started_from = (x - np.sqrt(bars[90]) * action) / np.sqrt(1 - bars[90])
    seen = run(noise, epsilons, ddim.Committed(prefix, torch.ones(16)))
    for level, state in zip([*bars[80::-10], 1.0], seen, strict=True):
        expected = np.sqrt(level) * action + np.sqrt(1 - level) * started_from
        np.testing.assert_allclose(state[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pull", [0.25, 0.5, 0.9])
def test_a_soft_mask_lies_in_proportion_between_free_and_committed(noise, epsilons, prefix, pull):
    for at, epsilon in zip(ddim.steps(SamplerSpec()), epsilons, strict=True):
        free = ddim.step(noise, epsilon, at)
        held = ddim.step(noise, epsilon, at, ddim.Committed(prefix, torch.ones(16)))
        between = ddim.step(noise, epsilon, at, ddim.Committed(prefix, torch.full((16,), pull)))
        torch.testing.assert_close(between, torch.lerp(free, held, pull), rtol=0, atol=1e-5)
