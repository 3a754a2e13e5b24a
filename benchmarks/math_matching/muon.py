"""Muon for matrices and AdamW for the rest (Jordan et al. 2024, "Muon: an optimizer for hidden layers").

A matrix's momentum is replaced by the nearest orthogonal matrix (five Newton-Schulz steps in bf16). The experts of a
layer are many matrices of one size: those of one shape are worked on as one batch.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonal(momentum: Tensor) -> Tensor:
    """[N, rows, columns] -> the same with all singular values near 1."""
    x = momentum.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    out: Tensor = (x.mT if tall else x).to(momentum.dtype)
    return out


class Optimizer:
    """Muon for the given matrices, AdamW for the others; both rates follow one schedule.

    rate: of the matrices; other_rate: of the rest. `step(scale)` multiplies both.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], rate: float, other_rate: float) -> None:
        matrices: dict[tuple[int, ...], list[nn.Parameter]] = {}
        rest: list[nn.Parameter] = []
        for name, parameter in named:
            plain = parameter.dim() == 2 and min(parameter.shape) >= 32
            if plain and not any(word in name for word in ("embed_tokens", "lm_head", "probe")):
                matrices.setdefault(tuple(parameter.shape), []).append(parameter)
            else:
                rest.append(parameter)
        self.rate, self.other_rate, self.momentum = rate, other_rate, 0.95
        self.groups = list(matrices.values())
        self.velocity = [torch.zeros(len(group), *group[0].shape, device=group[0].device) for group in self.groups]
        self.rest = torch.optim.AdamW(rest, lr=other_rate, betas=(0.9, 0.98), weight_decay=0.0)

    def zero(self) -> None:
        """Forget all gradients."""
        for group in self.groups:
            for parameter in group:
                parameter.grad = None
        self.rest.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update with both rates times `scale`."""
        for group, velocity in zip(self.groups, self.velocity, strict=True):
            gradient = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in group])
            velocity.mul_(self.momentum).add_(gradient)
            update = orthogonal(gradient + self.momentum * velocity)
            rows, columns = group[0].shape
            size = self.rate * scale * max(1.0, rows / columns) ** 0.5
            for parameter, change in zip(group, update, strict=True):
                parameter.mul_(1 - self.rate * scale * 0.01).sub_(change, alpha=size)
        for options in self.rest.param_groups:
            options["lr"] = self.other_rate * scale
        self.rest.step()

    def state(self) -> dict[str, Any]:
        """To be saved."""
        return {"velocity": self.velocity, "rest": self.rest.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """From `state`."""
        for mine, theirs in zip(self.velocity, state["velocity"], strict=True):
            mine.copy_(theirs)
        self.rest.load_state_dict(state["rest"])


def schedule(step: int, total: int, constant: float) -> float:
    """Warm-up over 5 % (at most 100 steps), constant up to the share `constant`, then a cosine to 0."""
    warm = max(1, min(100, total // 20))
    if step < warm:
        return (step + 1) / warm
    left = (step / total - constant) / (1 - constant)
    return 1.0 if left <= 0 else 0.5 * (1 + float(torch.cos(torch.tensor(min(left, 1.0) * torch.pi))))
