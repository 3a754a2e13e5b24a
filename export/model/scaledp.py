"""ScaleDP: a diffusion transformer over the chunk's time steps, conditioned by adaLN-Zero alone.

No image or text token reaches it: the condition is one vector (two with reasoning-following), made once per query.
Facts: the public DexVLA, ChatVLA and ChatVLA-2 heads; adaLN-Zero after Peebles & Xie (2212.09748).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chatvla_edge.export.model import ddim
from chatvla_edge.export.spec import HeadSpec, SamplerSpec

FREQUENCIES = 256  # width of the sinusoidal time-step embedding, the same at every published size


def timestep_features(timestep: Tensor) -> Tensor:
    """Sinusoidal features of diffusion time steps, [S] -> [S, 256]: cosines first.

    The published heads hard-code bf16 for the frequency table *and* for the result, so every trained weight behind it
    has only ever seen these rounded numbers. They are part of the checkpoint's meaning and are rounded here as there.
    """
    half = FREQUENCIES // 2
    table = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.bfloat16) / half)
    angles = timestep.float()[:, None] * table[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(torch.bfloat16)


class TimestepEmbedder(nn.Module):
    """256 features -> width, through one hidden SiLU layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep: Tensor) -> Tensor:
        """[S] time steps -> [S, width]."""
        features = timestep_features(timestep).to(next(self.parameters()))
        out: Tensor = self.mlp(features)
        return out


class Attention(nn.Module):
    """Plain multi-head self-attention over the H action tokens: no mask, no rotary, biases everywhere."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, width] -> [B, H, width]."""
        batch, horizon, width = x.shape
        qkv = self.qkv(x).view(batch, horizon, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0))
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, horizon, width))
        return out


class FeedForward(nn.Module):
    """fc1 -> GELU (tanh approximation) -> fc2."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, width] -> [B, H, width]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


def norm(x: Tensor) -> Tensor:
    """LayerNorm without affine parameters: adaLN supplies them."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, H, n], shift and scale [B, n]."""
    return x * (1 + scale[:, None]) + shift[:, None]


def modulation(width: int, parts: int) -> nn.Sequential:
    """SiLU and one linear layer that makes `parts` vectors out of the condition."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class Block(nn.Module):
    """adaLN-Zero transformer block."""

    def __init__(self, head: HeadSpec) -> None:
        super().__init__()
        self.attn = Attention(head.width, head.heads)
        self.mlp = FeedForward(head.width, head.mlp_width)
        self.adaLN_modulation = modulation(head.width, 6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, H, n], condition [B, n] -> [B, H, n]."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(6, dim=-1)
        x = x + gate_a[:, None] * self.attn(modulate(norm(x), shift_a, scale_a))
        out: Tensor = x + gate_m[:, None] * self.mlp(modulate(norm(x), shift_m, scale_m))
        return out


class FinalLayer(nn.Module):
    """Modulated norm and the projection to the action dimension."""

    def __init__(self, head: HeadSpec) -> None:
        super().__init__()
        self.linear = nn.Linear(head.width, head.action_dim)
        self.adaLN_modulation = modulation(head.width, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, H, n], condition [B, n] -> [B, H, A]."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        out: Tensor = self.linear(modulate(norm(x), shift, scale))
        return out


class ScaleDP(nn.Module):
    """Predicts the noise in a chunk. Parameter names are the published ones under `policy_head.`."""

    def __init__(self, head: HeadSpec) -> None:
        super().__init__()
        self.head = head
        self.x_embedder = nn.Linear(head.action_dim, head.width)
        self.t_embedder = TimestepEmbedder(head.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, head.horizon, head.width))
        joined = head.cond_dim + head.state_dim
        if head.conditioning == "combine":
            middle = head.combine_width
            self.combine = nn.Sequential(
                nn.Linear(joined, middle),
                nn.ReLU(),
                nn.Linear(middle, middle),
                nn.ReLU(),
                nn.Linear(middle, head.cond_dim),
            )
            self.cond_obs_emb = nn.Linear(head.cond_dim, head.width)
        else:
            self.norm_after_pool = nn.LayerNorm(head.cond_dim)  # eps 1e-5, unlike every other norm of the head
            self.cond_obs_emb = nn.Linear(joined, head.width)
        if head.reasoning is not None:
            self.cond_reasoning_emb = nn.Linear(joined, head.width)
        self.blocks = nn.ModuleList(Block(head) for _ in range(head.depth))
        self.final_layer = FinalLayer(head)

    def condition(self, observation: Tensor, reasoning: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The conditions without their time part: [B, D], [B, D], [B, S] -> obs [B, n], reasoning [B, n].

        Without reasoning-following the second one is the first.
        """
        if self.head.conditioning == "combine":
            observed = self.cond_obs_emb(self.combine(torch.cat([observation, state], dim=-1)))
            return observed, observed
        observed = self.cond_obs_emb(torch.cat([self.norm_after_pool(observation), state], dim=-1))
        if self.head.reasoning is None:
            return observed, observed
        return observed, self.cond_reasoning_emb(torch.cat([self.norm_after_pool(reasoning), state], dim=-1))

    def forward(self, x: Tensor, timestep: Tensor, conditions: tuple[Tensor, Tensor]) -> Tensor:
        """Noise in x: x [B, H, A] normalised actions, timestep [1] or [B], conditions from `condition` -> [B, H, A]."""
        time = self.t_embedder(timestep)
        observed, reasoned = (time + condition for condition in conditions)
        x = self.x_embedder(x) + self.pos_embed
        which = self.head.reasoning
        for index, block in enumerate(self.blocks):
            follows = which is not None and which.start <= index < which.stop
            x = block(x, reasoned if follows else observed)
        out: Tensor = self.final_layer(x, reasoned if which is not None and which.final else observed)
        return out

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        conditions: tuple[Tensor, Tensor],
        sampler: SamplerSpec,
        committed: ddim.Committed | None = None,
    ) -> Tensor:
        """Denoise `noise` [B, H, A] into normalised actions in [-1, 1], [B, H, A] fp32.

        x stays fp32 through all steps; the public code rounds it to bf16 after each, which costs up to 2.6e-2 on a
        normalised action and buys nothing.
        """
        x = noise.float()
        for at in ddim.steps(sampler):
            timestep = torch.tensor([at.timestep], device=x.device)
            x = ddim.step(x, self(x.to(self.pos_embed.dtype), timestep, conditions), at, committed)
        return x
