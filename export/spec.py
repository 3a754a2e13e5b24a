"""The policy as data: every variant of ChatVLA-2 that the paper and the public code know is a value of `PolicySpec`.

Nothing here imports torch. The reference model is built from a spec, a checkpoint reader produces one, a synthetic
checkpoint starts from one; no variant is a fork of the code.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from chatvla_edge.runtime.bundle import SCALEDP_SIZES as SCALEDP_SIZES
from chatvla_edge.runtime.bundle import expert_kind, experts_in_words, head_size


class Data(BaseModel):
    """A frozen value; unknown fields are errors, so that a misspelt setting is never silently a default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class VisionSpec(Data):
    """Qwen2-VL vision tower. Defaults are those of every published size; saved configs are diffs to them."""

    depth: int = Field(default=32, ge=1)
    embed_dim: int = Field(default=1280, ge=1)
    heads: int = Field(default=16, ge=1)
    mlp_ratio: int = Field(default=4, ge=1)
    patch: int = Field(default=14, ge=1)
    temporal_patch: int = Field(default=2, ge=1)
    merge: int = Field(default=2, ge=1)
    channels: int = Field(default=3, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> "VisionSpec":
        # Two rotary halves of whole pairs: a head's width is a multiple of 4.
        if self.embed_dim % (4 * self.heads):
            raise ValueError(f"vision width {self.embed_dim} does not divide into {self.heads} heads of whole quarters")
        return self

    @property
    def patch_values(self) -> int:
        """Values of one flattened patch as the published processor makes it: C * 2 * 14 * 14 = 1176."""
        return self.channels * self.temporal_patch * self.patch**2


class ExpertsSpec(Data):
    """What stands in place of each MLP of the language model. All zero: the dense MLP itself.

    y = sum over the top-k routed experts, weighted
        + sum over shared experts, unweighted (or through a sigmoid gate, as Qwen2-MoE does),
    and where static experts stand beside routed ones, the mean of the two (public research code).
    Every expert is a full SwiGLU MLP.
    """

    routed: int = Field(default=0, ge=0, description="E, number of routed experts")
    top_k: int = Field(default=0, ge=0, description="k, routed experts that a token visits")
    routed_width: int = Field(default=0, ge=0, description="intermediate size of a routed expert; 0 = the MLP's")
    router_bias: bool = True
    scoring: Literal["softmax", "sigmoid"] = Field(
        default="softmax",
        description="sigmoid is the DeepSeek-style research variant: its bias selects only, the weights ignore it",
    )
    renormalize: bool = Field(
        default=True, description="weights of the kept k sum to 1 (with softmax: that over the kept logits)"
    )
    shared: int = Field(default=0, ge=0, description="experts that every token visits")
    shared_width: int = Field(default=0, ge=0, description="intermediate size of a shared expert; 0 = the MLP's")
    shared_gate: bool = False
    static: int = Field(default=0, ge=0, description="unrouted experts chosen by task: 0 vision-language, 1 robot")
    static_active: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> "ExpertsSpec":
        if self.routed == 0 and self.top_k:
            raise ValueError(f"top_k is {self.top_k} but there are no routed experts; set `routed` or drop `top_k`")
        if self.routed and not 1 <= self.top_k <= self.routed:
            raise ValueError(f"top_k must lie in 1..{self.routed} (the routed experts), found {self.top_k}")
        if self.static and self.static_active >= self.static:
            raise ValueError(f"static_active must be below static = {self.static}, found {self.static_active}")
        if self.shared_gate and not self.shared:
            raise ValueError("shared_gate is set but there are no shared experts")
        return self

    @property
    def kind(self) -> str:
        """The variant's name in the paper's Table 3."""
        return expert_kind(self.model_dump())

    @property
    def summary(self) -> str:
        """One phrase for tables: `dynamic, 8 experts, top-2`."""
        return experts_in_words(self.model_dump())


class LanguageSpec(Data):
    """Qwen2-VL decoder. No defaults for sizes: the class defaults of public configs are those of the 72B model."""

    vocab: int = Field(ge=1)
    hidden: int = Field(ge=1)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    intermediate: int = Field(ge=1)
    rms_eps: float = Field(default=1e-6, gt=0, lt=1)
    rope_theta: float = Field(default=1e6, gt=0, allow_inf_nan=False)
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    max_positions: int = 32768
    tied: bool = True
    experts: ExpertsSpec = ExpertsSpec()

    @model_validator(mode="after")
    def _consistent(self) -> "LanguageSpec":
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(
                f"mrope_section {list(self.mrope_section)} sums to {sum(self.mrope_section)}, "
                f"expected half the head dimension, {self.head_dim} / 2"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} attention heads do not divide over {self.kv_heads} key/value heads")
        return self

    @property
    def routed_width(self) -> int:
        """Intermediate size of one routed expert."""
        return self.experts.routed_width or self.intermediate

    @property
    def shared_width(self) -> int:
        """Intermediate size of one shared expert."""
        return self.experts.shared_width or self.intermediate


class FusionSpec(Data):
    """How the pooled prompt and the pooled reasoning become the observation vector of the head.

    film: obs = input * (1 + scale(reasoning)) + shift(reasoning) + mean(prompt)   (DexVLA, ChatVLA v1)
    sum:  obs = input + reasoning                                                 (ChatVLA-2)
    """

    kind: Literal["film", "sum"] = "sum"


class ReasoningSpec(Data):
    """Which blocks of the head follow the reasoning instead of the observation: [start, stop), and the final layer.

    ChatVLA-2 conditions the latter half and the final layer (`reasoning_layer_id` = depth / 2 in its configs).
    """

    start: int = Field(ge=0)
    stop: int = Field(ge=1)
    final: bool = True


class HeadSpec(Data):
    """ScaleDP: a diffusion transformer over the chunk, conditioned through adaLN-Zero by one vector (or two).

    conditioning:
      combine     obs and state through a 3-layer MLP, then one linear        (DexVLA)
      norm        LayerNorm(obs) beside the state, then one linear            (ChatVLA v1)
      with `reasoning` set, a second condition made like `norm` from the reasoning vector drives the blocks it names
      (ChatVLA-2).
    """

    depth: int = Field(ge=1)
    width: int = Field(ge=1)
    heads: int = Field(ge=1)
    mlp_width: int = Field(ge=1)
    action_dim: int = Field(ge=1)
    state_dim: int = Field(ge=1)
    horizon: int = Field(ge=1)
    cond_dim: int = Field(ge=1)
    conditioning: Literal["combine", "norm"] = "norm"
    combine_width: int = 1024
    reasoning: ReasoningSpec | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "HeadSpec":
        if self.width % self.heads:
            raise ValueError(f"head width {self.width} does not divide over {self.heads} attention heads")
        if self.reasoning is not None:
            if self.conditioning != "norm":
                raise ValueError("reasoning-following needs the `norm` conditioning: they share its LayerNorm")
            if not self.reasoning.start < self.reasoning.stop <= self.depth:
                raise ValueError(
                    f"reasoning blocks {self.reasoning.start}..{self.reasoning.stop} do not lie in 0..{self.depth}"
                )
        return self

    @property
    def size(self) -> str:
        """The published size name that these numbers have, or `depth x width`."""
        return head_size(self.model_dump())


class SamplerSpec(Data):
    """DDIM, eta 0, epsilon prediction, leading timesteps, clipped x0, squared-cosine schedule."""

    train_steps: int = Field(default=100, ge=1)
    steps: int = Field(default=10, ge=1)
    max_beta: float = Field(default=0.999, gt=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> "SamplerSpec":
        if self.steps > self.train_steps:
            raise ValueError(f"{self.steps} inference steps do not fit into {self.train_steps} training steps")
        return self


class TokenSpec(Data):
    """Ids of the special tokens the prompt is made of, and the one that ends the reasoning."""

    im_start: int = 151644
    im_end: int = 151645
    vision_start: int = 151652
    vision_end: int = 151653
    image_pad: int = 151655
    endoftext: int = 151643


class PolicySpec(Data):
    """A whole policy. `head` is None for the vision-language view (Qwen2-VL itself, ChatVLA v1 answering questions)."""

    vision: VisionSpec
    language: LanguageSpec
    fusion: FusionSpec = FusionSpec()
    head: HeadSpec | None = None
    sampler: SamplerSpec = SamplerSpec()
    tokens: TokenSpec = TokenSpec()

    @model_validator(mode="after")
    def _consistent(self) -> "PolicySpec":
        beyond = {name: token for name, token in self.tokens if token >= self.language.vocab}
        if beyond and self.head is not None:
            raise ValueError(f"the special tokens {beyond} lie beyond the vocabulary of {self.language.vocab}")
        if self.head is not None and self.head.cond_dim != self.language.hidden:
            raise ValueError(
                f"the head expects vectors of {self.head.cond_dim}, the language model makes {self.language.hidden}"
            )
        return self

    @property
    def variant(self) -> str:
        """The family this policy belongs to, in words."""
        if self.head is None:
            return "Qwen2-VL" if self.language.experts.kind == "dense" else "Qwen2-VL with experts"
        if self.head.reasoning is not None:
            return "ChatVLA-2 (reasoning-following)"
        if self.head.conditioning == "combine":
            return "DexVLA"
        return "ChatVLA" if self.fusion.kind == "film" else "ChatVLA-2 without reasoning-following"


def scaledp(
    size: str,
    *,
    action_dim: int,
    state_dim: int,
    horizon: int,
    cond_dim: int = 1536,
    conditioning: Literal["combine", "norm"] = "norm",
    reasoning: Literal["latter", "full", "former"] | None = None,
) -> HeadSpec:
    """A head of a published size. `reasoning` names a row of the paper's Table 6.

    The final layer follows the reasoning in the latter half and in full, as in the public code; with the former half
    it keeps the observation (the public code has no such setting: this is the reading under which former and latter
    are complements).
    """
    depth, width, heads = SCALEDP_SIZES[size]
    half = depth // 2
    blocks = {
        "latter": ReasoningSpec(start=half, stop=depth),
        "full": ReasoningSpec(start=0, stop=depth),
        "former": ReasoningSpec(start=0, stop=half, final=False),
    }
    return HeadSpec(
        depth=depth,
        width=width,
        heads=heads,
        mlp_width=4 * width,
        action_dim=action_dim,
        state_dim=state_dim,
        horizon=horizon,
        cond_dim=cond_dim,
        conditioning=conditioning,
        reasoning=blocks[reasoning] if reasoning else None,
    )


QWEN2_VL_2B = LanguageSpec(vocab=151936, hidden=1536, layers=28, heads=12, kv_heads=2, head_dim=128, intermediate=8960)
