"""Dense Qwen2-VL -> experts, as the paper initialises them: every expert starts as a copy of the trained MLP.

With all routed experts equal and weights that sum to 1, the result computes what its parent computes, whatever the
router says: the strongest oracle there is for routing and export before trained ChatVLA-2 weights are public.
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from chatvla_edge.export.checkpoint.errors import refusal
from chatvla_edge.export.checkpoint.names import Layout
from chatvla_edge.export.checkpoint.publish import parameter_shapes, write_checkpoint
from chatvla_edge.export.checkpoint.reader import Checkpoint
from chatvla_edge.export.checkpoint.statistics import find_statistics
from chatvla_edge.export.spec import ExpertsSpec, PolicySpec

_EXPERT = re.compile(r"(.*\.mlp\.)(?:routed|shared|static)\.\d+\.(.+)")


def upcycled_spec(spec: PolicySpec, experts: ExpertsSpec) -> PolicySpec:
    """The parent's spec with experts. Raises ValueError when the parent already has some, or sizes were given."""
    if spec.language.experts.kind != "dense":
        raise ValueError(f"only a dense checkpoint can be upcycled, this one is {spec.language.experts.summary}")
    if experts.routed_width or experts.shared_width:
        raise ValueError("upcycled experts have the MLP's own width; leave the widths at 0")
    return spec.model_copy(update={"language": spec.language.model_copy(update={"experts": experts})})


def equals_parent(experts: ExpertsSpec) -> bool:
    """Whether the upcycled policy computes exactly what its parent does, for any router.

    Shared experts are added unweighted to the routed ones, so with them the MLP's output starts doubled.
    """
    return not experts.shared and not experts.shared_gate and experts.renormalize


def upcycle(
    parent: Checkpoint,
    directory: Path,
    experts: ExpertsSpec,
    *,
    layout: Layout | None = None,
    perturb: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the upcycled checkpoint, streamed.

    perturb: relative size of noise added to each expert's weights (of their own RMS), to make experts differ.
    dtype: of the weights written; None keeps the parent's.
    """
    spec = upcycled_spec(parent.spec, experts)
    shapes = parameter_shapes(spec)
    tokenizer = next((f for f in (parent.path, parent.path.parent) if (f / "tokenizer.json").is_file()), None)
    if tokenizer is None:
        raise refusal(
            parent.path,
            found="no tokenizer.json",
            expected="the parent's tokenizer, to go with the upcycled checkpoint",
            do="Copy Qwen2-VL's tokenizer.json beside the weights.",
        )

    def supply(name: str) -> Tensor:
        generator = torch.Generator().manual_seed(_seed(seed, name))
        if ".mlp.router." in name or ".mlp.shared_gate." in name:
            # The default initialisation of a linear layer, which the research code leaves in place.
            bound = spec.language.hidden**-0.5
            return torch.empty(shapes[name]).uniform_(-bound, bound, generator=generator)
        copied = _EXPERT.fullmatch(name)
        if copied is None:
            return parent.tensor(name)
        tensor = parent.tensor(copied[1] + copied[2])
        if not perturb:
            return tensor
        noise = torch.randn(tensor.shape, generator=generator)
        return tensor.float() + perturb * tensor.float().pow(2).mean().sqrt() * noise

    statistics = parent.statistics() if spec.head is not None and find_statistics(parent.path) else None
    write_checkpoint(
        directory,
        spec,
        layout or parent.layout,
        supply,
        dtype=dtype or parent.dtype,
        statistics=statistics,
        tokenizer=(tokenizer / "tokenizer.json").read_text(encoding="utf-8"),
        progress=progress,
    )


def _seed(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
