"""The reference model over weights that stay in the checkpoint: read, rounded and dropped map by map, slab by slab.

An export judges its engines by the reference. In fp32 that model is four bytes per parameter, twice with the rounded
one beside it: 45 GB each for the paper's policy. Here a linear map's weight is in memory while it multiplies, a slab of
rows at a time; what is small stays. The price is that every pass reads the weights again.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chatvla_edge.export.model.policy import ChatVLA2
from chatvla_edge.export.spec import PolicySpec

Read = Callable[[str], Tensor]
"""Our parameter name -> tensor in its stored dtype, e.g. `Checkpoint.tensor`."""
Values = Callable[[Tensor], Tensor]
"""Some rows of a weight in fp32 -> the values that an engine computes with. Rows must not see each other."""
Rounding = Callable[[str, tuple[int, ...]], Values]
"""Name and shape of a parameter -> what becomes of its rows."""

# Bytes of fp32 parameters that stay in memory, the smallest first: a model that fits is a model like any other.
HELD = 256 << 20
# Bytes of one slab in fp32: small beside everything else, large beside the cost of a call.
SLAB = 16 << 20


def as_stored(rows: Tensor) -> Tensor:
    """No rounding."""
    return rows


def as_trained(_name: str, _shape: tuple[int, ...]) -> Values:
    """No rounding of anything."""
    return as_stored


def streamed(spec: PolicySpec, read: Read, rounding: Rounding = as_trained, held: int = HELD) -> ChatVLA2:
    """The model of `spec` over `read`, holding at most `held` bytes of what can be streamed.

    A tied output head is a weight of its own name, `backbone.lm_head.weight`, for `rounding`: the head is rounded, the
    table that it is read from is not.
    """
    model = ChatVLA2.on_meta(spec)
    tied = spec.language.tied

    def stored(name: str) -> Tensor:
        return read("backbone.language.embed_tokens.weight" if tied and name == "backbone.lm_head.weight" else name)

    # Untied: the head and the table are read, and rounded, each in its own way.
    if tied:
        head = model.backbone.lm_head
        head.weight = nn.Parameter(torch.empty_like(head.weight), requires_grad=False)
    maps = _maps(model)
    room = held
    for name, module in sorted(maps.items(), key=lambda item: item[1].weight.numel()):
        values = rounding(name, tuple(module.weight.shape))
        room -= 4 * module.weight.numel()
        if room >= 0:
            module.weight = _held(values(stored(name).float()))
        elif isinstance(module, nn.Linear):
            module.forward = _multiply(module, partial(stored, name), values)  # type: ignore[method-assign, assignment]
        else:
            module.forward = _look_up(partial(stored, name), values)  # type: ignore[method-assign, assignment]
    for path, module in model.named_modules():
        for own, value in list(module.named_parameters(recurse=False)):
            name = f"{path}.{own}"
            if value.is_meta and name not in maps:
                setattr(module, own, _held(rounding(name, tuple(value.shape))(stored(name).float())))
    model.backbone.restore_rotary()
    return model.eval().requires_grad_(False)


def _maps(model: ChatVLA2) -> Mapping[str, nn.Linear | nn.Embedding]:
    """What can be streamed: weights that nothing but their own module's forward looks at."""
    return {
        f"{path}.weight": module
        for path, module in model.named_modules()
        # The time-step embedder asks its first parameter for dtype and device.
        if isinstance(module, (nn.Linear, nn.Embedding)) and "t_embedder" not in path
    }


def _held(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _multiply(module: nn.Linear, stored: Callable[[], Tensor], values: Values) -> Callable[[Tensor], Tensor]:
    together = max(1, SLAB // (4 * module.in_features))

    def forward(x: Tensor) -> Tensor:
        weight, bias = stored(), module.bias
        out = x.new_empty(*x.shape[:-1], len(weight))
        for rows in _slabs(len(weight), together):
            part = values(weight[rows].float())
            out[..., rows] = F.linear(x, part, None if bias is None else bias[rows])
        return out

    return forward


def _look_up(stored: Callable[[], Tensor], values: Values) -> Callable[[Tensor], Tensor]:
    def forward(ids: Tensor) -> Tensor:
        found = values(stored()[ids.reshape(-1)].float())
        return found.reshape(*ids.shape, -1)

    return forward


def _slabs(count: int, together: int) -> Iterator[slice]:
    for start in range(0, count, together):
        yield slice(start, min(start + together, count))
