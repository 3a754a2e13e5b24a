"""From hidden states to the two vectors that cross from the language model to the action head.

Only two means cross: over the prompt and over the reasoning. Which rows are in the second one is the N-1 rule below.
"""

import torch
from torch import Tensor, nn

from chatvla_edge.export.spec import FusionSpec


def reasoning_mean(prompt: Tensor, decoded: Tensor) -> Tensor:
    """Mean hidden state of the reasoning, [D] fp32.

    prompt: [P, D] and decoded: [N-1, D], final-norm hidden states of the prompt rows and of the decode steps.

    Greedy decoding of N tokens runs the prompt and N-1 decode steps: the last token (the end of turn) is never fed
    back, so the mean is over the N-1 hidden states of generated tokens 1..N-1 as *inputs*. Training included the end
    token's row; the skew is the checkpoint's and is reproduced, not repaired.

    N = 1 (the model ends its turn at once) leaves no decode step; the public code divides by zero there (an error or
    a NaN chunk). Here it is the hidden state of the last prompt row: the one row that produced output, a value the
    projector knows, and a function of this query alone.
    """
    rows = decoded if len(decoded) else prompt[-1:]
    return rows.float().mean(0)


def prompt_mean(prompt: Tensor) -> Tensor:
    """Mean hidden state over every prompt row (template, image and instruction tokens), [P, D] -> [D] fp32."""
    return prompt.float().mean(0)


class Projector(nn.Sequential):
    """Two linear layers with an exact GELU between.

    The paper speaks of a LayerNorm in it; in the public code that LayerNorm is the head's `norm_after_pool`.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden))


class FiLM(nn.Module):
    """x * (1 + scale(condition)) + shift(condition)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.scale = nn.Linear(hidden, hidden)
        self.shift = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """[D], [D] -> [D]."""
        out: Tensor = x * (1 + self.scale(condition)) + self.shift(condition)
        return out


class Fusion(nn.Module):
    """Both projectors and the rule that joins them."""

    def __init__(self, hidden: int, fusion: FusionSpec) -> None:
        super().__init__()
        self.input_projector = Projector(hidden)
        self.reasoning_projector = Projector(hidden)
        self.film = FiLM(hidden) if fusion.kind == "film" else None

    def forward(self, prompt: Tensor, reasoning: Tensor) -> tuple[Tensor, Tensor]:
        """Means [D] -> observation vector [D], reasoning vector [D]."""
        dtype = next(self.parameters()).dtype
        prompt, reasoning = prompt.to(dtype), reasoning.to(dtype)
        observed = self.input_projector(prompt)
        reasoned = self.reasoning_projector(reasoning)
        if self.film is not None:
            return self.film(observed, reasoned) + prompt, reasoned
        return torch.add(observed, reasoned), reasoned
