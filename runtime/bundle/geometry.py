"""The sizes of the policy, as the exporter's `PolicySpec` has them: same names, but nothing has a default.

A default here would be a number that nobody stated, and a bundle is read years after it was written.
"""

from typing import Literal

from pydantic import Field, model_validator

from .values import Count, Data


class Vision(Data):
    """Qwen2-VL's vision tower."""

    depth: Count
    embed_dim: Count
    heads: Count
    mlp_ratio: Count
    patch: Count
    temporal_patch: Count
    merge: Count
    channels: Literal[3]


class Experts(Data):
    """What stands in place of each MLP of the language model; all zero: the dense MLP itself."""

    routed: int = Field(ge=0, description="E")
    top_k: int = Field(ge=0, description="k, routed experts that a token visits")
    routed_width: int = Field(ge=0, description="0: the MLP's intermediate size")
    router_bias: bool
    scoring: Literal["softmax"]  # sigmoid routing is refused at export: no lowering knows it
    renormalize: bool
    shared: int = Field(ge=0)
    shared_width: int = Field(ge=0, description="0: the MLP's intermediate size")
    shared_gate: bool
    static: int = Field(ge=0)
    static_active: int = Field(ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> "Experts":
        if not min(self.routed, 1) <= self.top_k <= self.routed:
            raise ValueError(f"top_k is {self.top_k} of {self.routed} routed experts")
        if self.static_active >= max(self.static, 1):
            raise ValueError(f"static_active is {self.static_active} of {self.static} static experts")
        if self.shared_gate and not self.shared:
            raise ValueError("shared_gate is set but there are no shared experts")
        return self


class Language(Data):
    """Qwen2-VL's decoder."""

    vocab: Count
    hidden: Count
    layers: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    intermediate: Count
    rms_eps: float = Field(gt=0, lt=1)
    rope_theta: float = Field(gt=0)
    mrope_section: tuple[Count, Count, Count]
    max_positions: Count
    tied: bool
    experts: Experts

    @model_validator(mode="after")
    def _consistent(self) -> "Language":
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(
                f"mrope_section {list(self.mrope_section)} sums to {sum(self.mrope_section)}, "
                f"expected half the head dimension, {self.head_dim} / 2"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} attention heads do not divide over {self.kv_heads} key/value heads")
        return self


class Fusion(Data):
    """How pooled prompt and pooled reasoning become the head's observation vector: FiLM, or their sum."""

    kind: Literal["film", "sum"]


class Reasoning(Data):
    """Which blocks of the head follow the reasoning: [start, stop), and whether the final layer does."""

    start: int = Field(ge=0)
    stop: Count
    final: bool


class Head(Data):
    """ScaleDP, the diffusion transformer over the chunk."""

    depth: Count
    width: Count
    heads: Count
    mlp_width: Count
    action_dim: Count
    state_dim: Count
    horizon: Count
    cond_dim: Count
    conditioning: Literal["combine", "norm"]
    combine_width: Count
    reasoning: Reasoning | None

    @model_validator(mode="after")
    def _consistent(self) -> "Head":
        if self.width % self.heads:
            raise ValueError(f"head width {self.width} does not divide over {self.heads} attention heads")
        follows = self.reasoning
        if follows is not None and not follows.start < follows.stop <= self.depth:
            raise ValueError(f"reasoning blocks {follows.start}..{follows.stop} do not lie in 0..{self.depth}")
        return self


class Geometry(Data):
    """The whole policy. A checkpoint without an action head has no bundle: a robot could do nothing with it."""

    vision: Vision
    language: Language
    fusion: Fusion
    head: Head

    @model_validator(mode="after")
    def _consistent(self) -> "Geometry":
        if self.head.cond_dim != self.language.hidden:
            raise ValueError(
                f"head.cond_dim is {self.head.cond_dim}, but language.hidden, whose vectors it takes, is "
                f"{self.language.hidden}"
            )
        return self
