"""DDIM as the public heads run it: 100 training steps, 10 inference steps, deterministic.

The schedule is computed in fp32 whatever the model's dtype. Public code built under bf16 rounds alpha-bar(0) to
exactly 1 and divides by zero at the last step; in fp32 the sampler is finite and differs from the authors' patched
run by less than 1e-4.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from chatvla_edge.export.spec import SamplerSpec


@dataclass(frozen=True)
class Step:
    """One inference step: its training time step and the four square roots that its arithmetic needs."""

    timestep: int
    signal: float  # sqrt(alpha_bar_t)
    noise: float  # sqrt(1 - alpha_bar_t)
    next_signal: float  # sqrt(alpha_bar_prev); 1 at the last step
    next_noise: float  # sqrt(1 - alpha_bar_prev); 0 at the last step

    @property
    def coefficients(self) -> tuple[float, float, float, float]:
        """In the order in which the `denoise` stage takes them."""
        return self.signal, self.noise, self.next_signal, self.next_noise


@dataclass(frozen=True)
class Committed:
    """Actions that are already on their way and must come back unchanged (real-time chunking).

    prefix: [H, A] normalised actions; mask: [H], 1 = committed, 0 = free, between = pulled towards the prefix.
    """

    prefix: Tensor
    mask: Tensor


def alpha_bars(sampler: SamplerSpec) -> Tensor:
    """Cumulative signal power of the squared-cosine schedule, [train_steps] fp32 (Nichol & Dhariwal, 2102.09672)."""

    def level(fraction: float) -> float:
        return math.cos((fraction + 0.008) / 1.008 * math.pi / 2) ** 2

    total = sampler.train_steps
    betas = [min(1 - level((i + 1) / total) / level(i / total), sampler.max_beta) for i in range(total)]
    return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float32), dim=0)


def steps(sampler: SamplerSpec) -> list[Step]:
    """The inference steps, noisiest first: leading spacing (90, 80, ..., 0 for 100 -> 10), final alpha-bar 1."""
    bars = alpha_bars(sampler)
    stride = sampler.train_steps // sampler.steps
    out = []
    for index in reversed(range(sampler.steps)):
        timestep = index * stride
        bar = bars[timestep]
        before = bars[timestep - stride] if timestep >= stride else torch.tensor(1.0)
        roots = [float(value.sqrt()) for value in (bar, 1 - bar, before, 1 - before)]
        out.append(Step(timestep, *roots))
    return out


def step(x: Tensor, epsilon: Tensor, at: Step, committed: Committed | None = None) -> Tensor:
    """One denoising step. x, epsilon: [..., H, A] -> x of the next (less noisy) step, fp32.

    x0 is clamped to [-1, 1] while epsilon is kept as predicted (diffusers' `clip_sample` without
    `use_clipped_model_output`), so at the last step the result is the clamped x0 itself.

    A committed row walks the DDIM path whose end is its prefix, with the noise it started from; a partly masked row
    lies between that path and its own.
    """
    x, epsilon = x.float(), epsilon.float()
    x0 = ((x - at.noise * epsilon) / at.signal).clamp(-1, 1)
    free = at.next_signal * x0 + at.next_noise * epsilon
    if committed is None:
        return free
    prefix, mask = committed.prefix.float(), committed.mask.float()[:, None]
    held = at.next_signal * prefix + at.next_noise * (x - at.signal * prefix) / at.noise
    return (1 - mask) * free + mask * held  # exact at both ends, unlike free + mask * (held - free)
