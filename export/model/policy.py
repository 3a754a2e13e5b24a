"""The whole policy and one query of it, end to end: images + state + instruction -> reasoning text and chunk."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from chatvla_edge.export.model.backbone import Backbone, Grid
from chatvla_edge.export.model.ddim import Committed
from chatvla_edge.export.model.experts import count_routing
from chatvla_edge.export.model.fusion import Fusion, prompt_mean, reasoning_mean
from chatvla_edge.export.model.images import Preprocessing, patches
from chatvla_edge.export.model.prompt import Prompt
from chatvla_edge.export.model.scaledp import ScaleDP
from chatvla_edge.export.normalization import Normalization
from chatvla_edge.export.spec import PolicySpec

MAX_REASONING = 256  # the public scripts' max_new_tokens; texts of the family have 34-96 tokens


class ChatVLA2(nn.Module):
    """Backbone, fusion and head: the weights of a checkpoint, nothing of its surroundings."""

    def __init__(self, spec: PolicySpec) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = Backbone(spec)
        if spec.head is not None:
            self.fusion = Fusion(spec.language.hidden, spec.fusion)
            self.head = ScaleDP(spec.head)

    @classmethod
    def on_meta(cls, spec: PolicySpec) -> "ChatVLA2":
        """The model without storage: names and shapes for planning, counting and streaming, at any size."""
        with torch.device("meta"):
            return cls(spec).eval()

    @classmethod
    def from_tensors(cls, spec: PolicySpec, tensors: dict[str, Tensor]) -> "ChatVLA2":
        """The model over given tensors (not copied), strictly: every parameter given, no tensor left over."""
        model = cls.on_meta(spec)
        if spec.language.tied:
            tensors = {**tensors, "backbone.lm_head.weight": tensors["backbone.language.embed_tokens.weight"]}
        model.load_state_dict(tensors, strict=True, assign=True)
        model.backbone.tie()
        model.backbone.restore_rotary()
        return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Observation:
    """What one query sees.

    images: one RGB uint8 array [height, width, 3] per camera, in the checkpoint's camera order;
    state: [S] in the robot's units.
    """

    images: Sequence[NDArray[np.uint8]]
    state: NDArray[np.float32]


@dataclass(frozen=True)
class Answer:
    """What one query returns.

    token_ids: N generated ids, end token included; text: without special tokens; normalized: [H, A] in [-1, 1];
    chunk: [H, A] in the robot's units; prompt_mean, reasoning_mean: [D], all that the head knows of the words;
    routing: [layers, E] expert visits.
    """

    token_ids: list[int]
    text: str
    normalized: NDArray[np.float32]
    chunk: NDArray[np.float32]
    prompt_mean: NDArray[np.float32]
    reasoning_mean: NDArray[np.float32]
    routing: NDArray[np.int64]


class ReferencePolicy:
    """A model with everything that turns the world into its inputs and its outputs into the world."""

    def __init__(
        self, model: ChatVLA2, prompt: Prompt, preprocessing: Sequence[Preprocessing], normalization: Normalization
    ) -> None:
        head = model.spec.head
        if head is None:
            raise ValueError("this checkpoint has no action head: it answers questions but makes no chunk")
        normalization.require(action_dim=head.action_dim, state_dim=head.state_dim)
        self.model = model
        self.prompt = prompt
        self.preprocessing = tuple(preprocessing)
        self.normalization = normalization
        self.head_spec = head

    def noise(self, seed: int) -> Tensor:
        """The initial sample of a query, [H, A] fp32 standard normal, from a seed."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.head_spec.horizon, self.head_spec.action_dim, generator=generator)

    @torch.no_grad()
    def query(
        self,
        observation: Observation,
        instruction: str,
        noise: Tensor,
        *,
        max_tokens: int = MAX_REASONING,
        committed: Committed | None = None,
    ) -> Answer:
        """Answer one query. `noise` [H, A] is the initial sample of the diffusion head: inject it to compare runs.

        Raises ValueError when the images, the state, the noise or the committed actions do not fit the checkpoint.
        """
        head, model = self.head_spec, self.model
        if len(observation.images) != len(self.preprocessing):
            raise ValueError(
                f"found {len(observation.images)} images, expected {len(self.preprocessing)}: one per camera"
            )
        if tuple(noise.shape) != (head.horizon, head.action_dim):
            raise ValueError(f"the noise has shape {list(noise.shape)}, expected [{head.horizon}, {head.action_dim}]")
        if committed is not None:
            found = list(committed.prefix.shape), list(committed.mask.shape)
            if found != ([head.horizon, head.action_dim], [head.horizon]):
                raise ValueError(
                    f"the committed prefix and mask have shapes {found[0]} and {found[1]}, "
                    f"expected [{head.horizon}, {head.action_dim}] and [{head.horizon}]"
                )
        if not torch.isfinite(noise).all():
            raise ValueError("the noise holds NaN or infinity")
        state = torch.from_numpy(self.normalization.state(observation.state))
        with count_routing(model) as routing:
            grids, image_tokens = self._see(observation.images)
            token_ids = torch.tensor(self.prompt.ids(grids, instruction))
            generation = model.backbone.generate(token_ids, image_tokens, grids, max_tokens)
        means = prompt_mean(generation.prompt), reasoning_mean(generation.prompt, generation.decoded)
        observed, reasoned = model.fusion(*means)
        conditions = model.head.condition(observed[None], reasoned[None], state[None].to(observed.dtype))
        normalized = model.head.sample(noise[None], conditions, model.spec.sampler, committed)[0].numpy()
        return Answer(
            token_ids=generation.token_ids,
            text=self.prompt.text(generation.token_ids),
            normalized=normalized,
            chunk=self.normalization.chunk(normalized),
            prompt_mean=means[0].numpy(),
            reasoning_mean=means[1].numpy(),
            routing=routing.numpy(),
        )

    def _see(self, images: Sequence[NDArray[np.uint8]]) -> tuple[list[Grid], Tensor | None]:
        if not images:
            return [], None
        seen = [patches(steps(image)) for steps, image in zip(self.preprocessing, images, strict=True)]
        grids = [grid for _, grid in seen]
        rows = torch.from_numpy(np.concatenate([rows for rows, _ in seen]))
        return grids, self.model.backbone.images(rows, grids)
