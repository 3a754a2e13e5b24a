"""What stands in place of the language model's MLPs: routed, shared and static experts.

The routing rule is the neutral `TopKMoE` of this project (DESIGN 4.3): router logits in fp32, top-k of the logits,
softmax over the kept ones. That is Mixtral's rule (softmax over all, keep k, renormalise) written without the
division; the public ChatVLA-2 research code computes the same in the model's dtype.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chatvla_edge.export.spec import ExpertsSpec, LanguageSpec


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Router(nn.Module):
    """Chooses k of E experts per token. Always computes in fp32, whatever the model's dtype."""

    def __init__(self, hidden: int, experts: ExpertsSpec) -> None:
        super().__init__()
        self.top_k = experts.top_k
        self.scoring = experts.scoring
        self.renormalize = experts.renormalize
        self.weight = nn.Parameter(torch.empty(experts.routed, hidden))
        self.bias = nn.Parameter(torch.empty(experts.routed)) if experts.router_bias else None
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, hidden] -> weights [T, k] fp32 and expert ids [T, k] int64, best first.

        Equal logits are broken by torch.topk, in no promised order: tests keep away from exact ties.
        """
        bias = None if self.bias is None else self.bias.float()
        if self.scoring == "sigmoid":
            # DeepSeek's rule: the bias steers the choice, the weights come from the unbiased scores.
            scores = F.linear(x.float(), self.weight.float()).sigmoid()
            ids = (scores if bias is None else scores + bias).topk(self.top_k, dim=-1).indices
            kept = scores.gather(-1, ids)
            return kept / kept.sum(-1, keepdim=True) if self.renormalize else kept, ids
        logits = F.linear(x.float(), self.weight.float(), bias)
        kept, ids = logits.topk(self.top_k, dim=-1)
        if self.renormalize:
            return kept.softmax(-1), ids
        return logits.softmax(-1).gather(-1, ids), ids


class MixtureOfExperts(nn.Module):
    """Routed, shared and static experts of one layer, as `ExpertsSpec` combines them."""

    def __init__(self, language: LanguageSpec) -> None:
        super().__init__()
        hidden, experts = language.hidden, language.experts
        self.experts = experts
        if experts.routed:
            self.router = Router(hidden, experts)
            self.routed = nn.ModuleList(MLP(hidden, language.routed_width) for _ in range(experts.routed))
        if experts.shared:
            self.shared = nn.ModuleList(MLP(hidden, language.shared_width) for _ in range(experts.shared))
        if experts.shared_gate:
            self.shared_gate = nn.Linear(hidden, 1, bias=False)
        if experts.static:
            self.static = nn.ModuleList(MLP(hidden, language.intermediate) for _ in range(experts.static))

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        rows = x.reshape(-1, x.shape[-1])
        parts = []
        if self.experts.routed:
            parts.append(self._routed(rows))
        if self.experts.shared:
            shared = torch.stack([expert(rows) for expert in self.shared]).sum(0)
            parts.append(self.shared_gate(rows).sigmoid() * shared if self.experts.shared_gate else shared)
        mixed = sum(parts) if parts else None
        if self.experts.static:
            static = self.static[self.experts.static_active](rows)
            mixed = static if mixed is None else 0.5 * (mixed + static)
        assert isinstance(mixed, Tensor)
        return mixed.reshape(x.shape)

    def _routed(self, rows: Tensor) -> Tensor:
        weights, ids = self.router(rows)
        # Ascending expert index, accumulated in the model's dtype: the order of the public code, hence its rounding.
        out = torch.zeros_like(rows)
        for index, expert in enumerate(self.routed):
            token, slot = torch.where(ids == index)
            if token.numel():
                weight = weights[token, slot, None].to(rows.dtype)
                out.index_add_(0, token, expert(rows[token]) * weight)
        return out


def mlp(language: LanguageSpec) -> nn.Module:
    """The module that takes the place of one layer's MLP."""
    if language.experts.kind == "dense":
        return MLP(language.hidden, language.intermediate)
    return MixtureOfExperts(language)


@contextmanager
def count_routing(model: nn.Module) -> Iterator[Tensor]:
    """Count expert visits of every routed layer while the context is open.

    Yields counts [layers, E] int64, filled in place; [0, 0] for a model without routed experts.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    counts = torch.zeros(len(routers), routers[0].weight.shape[0] if routers else 0, dtype=torch.int64)

    def hook(layer: int) -> object:
        def add(_module: nn.Module, _inputs: object, output: tuple[Tensor, Tensor]) -> None:
            counts[layer] += torch.bincount(output[1].flatten().cpu(), minlength=counts.shape[1])

        return add

    handles = [router.register_forward_hook(hook(layer)) for layer, router in enumerate(routers)]  # type: ignore[arg-type]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
