"""From a checkpoint's config.json and the shapes of its tensors to a `PolicySpec` and a `Layout`.

Where both speak, the tensors win and the difference is said: published configs are diffs to class defaults, carry
size names that no longer fit, and leave out what routing needs. What tensors cannot tell (head counts, epsilons,
rotary base, top-k, the reasoning layer) must be in the config, or have one value in all public code, which is then
said too.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from chatvla_edge.export.checkpoint.errors import CheckpointError, refusal
from chatvla_edge.export.checkpoint.names import EXPERT_STYLES, PREFIXES, SHARED_GATE, Layout, Shape
from chatvla_edge.export.spec import (
    ExpertsSpec,
    FusionSpec,
    HeadSpec,
    LanguageSpec,
    PolicySpec,
    ReasoningSpec,
    SamplerSpec,
    TokenSpec,
    VisionSpec,
)

View = Literal["robot", "vqa"]
Config = Mapping[str, Any]

LARGEST_CONFIG = 1 << 24

# Every published VLA checkpoint has these; another value is another arithmetic.
_HEAD_FLAGS = {"learn_sigma": False, "time_as_cond": True, "obs_as_cond": True, "is_tinyvla": False}
_HEAD_TYPES = ("scale_dp_policy", "dit_diffusion_policy")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint."""
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"{path.stat().st_size} bytes, a configuration has a few thousand")
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_distinct, parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise refusal(
            path, found=str(error)[:300], expected="a readable JSON file", do="Copy the file again."
        ) from None
    if not isinstance(value, dict):
        raise refusal(path, found=type(value).__name__, expected="a JSON object", do="Copy the file again.")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different: of two values for one key, neither can be trusted."""
    table = dict(pairs)
    if len(table) != len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"the key {twice!r} twice")
    return table


def _no_constant(name: str) -> float:
    raise ValueError(f"{name}, which is no JSON number")


class SpecReader:
    """Derives the spec of one checkpoint.

    config: the parsed config.json; shapes: public tensor names -> shapes; where: the config file, for messages.
    After `read`, `notes` holds a sentence for each difference and each assumption.
    """

    def __init__(self, config: Config, shapes: Mapping[str, Shape], where: Path) -> None:
        # Newer transformers nest the language model's fields.
        self.where = where
        self.config: dict[str, Any] = {**config, **self._section(config, "text_config")}
        self.shapes = shapes
        self.notes: list[str] = []

    def read(self, view: View = "robot") -> tuple[PolicySpec, Layout]:
        """The spec and the layout. Raises CheckpointError when something needed is neither in config nor tensors."""
        nested = any(name.startswith("model.language_model.") for name in self.shapes)
        self.prefixes: Literal["flat", "nested"] = "nested" if nested else "flat"
        (_, self.visual), (_, self.text) = PREFIXES[self.prefixes]
        has_head = any(name.startswith("policy_head.") for name in self.shapes)
        experts, style = self._experts(view)
        split = "policy_head.blocks.0.attn.q.weight" in self.shapes
        layout = Layout(prefixes=self.prefixes, experts=style, head_qkv="split" if split else "fused")
        language = self._language(experts)
        spec = PolicySpec(
            vision=self._vision(language.hidden),
            language=language,
            fusion=FusionSpec(kind=self._fusion()),
            head=self._head(language.hidden) if has_head and view == "robot" else None,
            sampler=self._sampler(),
            tokens=self._tokens(),
        )
        return spec, layout

    # ----------------------------------------------------------------------------------------------- look-ups

    def _shape(self, name: str, dims: int) -> Shape:
        shape = self.shapes.get(name)
        if shape is None:
            raise refusal(
                f"{self.where.parent}: tensor {name!r}",
                found="no tensor of this name",
                expected="one: the geometry is read from it",
                do="The checkpoint is incomplete, or its layout is not one this version reads.",
            )
        if len(shape) != dims:
            raise refusal(
                f"{self.where.parent}: tensor {name!r}",
                found=f"shape {list(shape)}",
                expected=f"{dims} dimensions",
                do="The tensor is damaged or of another model.",
            )
        return shape

    def _need(self, key: str, section: Config | None = None) -> Any:
        value = (self.config if section is None else section).get(key)
        if value is None:
            raise refusal(
                self.where,
                found=f"no {key!r}",
                expected="a value: it cannot be read off the tensors",
                do=f"Add {key!r} as the model was trained (class defaults of public code are those of the 72B model).",
            )
        return value

    def _section(self, config: Config, key: str) -> Config:
        """An object inside the config; absent or null is an empty one."""
        value = config.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return value

    def _wrong(self, key: str, value: object, expected: str) -> CheckpointError:
        return refusal(
            self.where, found=f"{key} = {ascii(value)[:80]}", expected=expected, do="Write it as the model was trained."
        )

    def _integer(self, key: str, section: Config | None = None, default: int | None = None) -> int:
        """A positive whole number; needed where there is no default."""
        value = (self.config if section is None else section).get(key, default)
        value = self._need(key, section) if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise self._wrong(key, value, "a whole number from 1 to 2^31")
        return value

    def _positive(self, key: str, section: Config | None = None) -> float:
        """A finite number above 0."""
        value = self._need(key, section)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
            raise self._wrong(key, value, "a finite number above 0")
        return float(value)

    def _flag(self, key: str, section: Config | None = None, default: bool | None = None) -> bool:
        """True or false; needed where there is no default."""
        value = (self.config if section is None else section).get(key, default)
        value = self._need(key, section) if value is None else value
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def _only(self, key: str, allowed: tuple[str, ...], section: Config | None = None) -> None:
        """Refuse a stated value whose arithmetic is not ours."""
        value = (self.config if section is None else section).get(key)
        if value is not None and value not in allowed:
            raise self._wrong(key, value, " or ".join(allowed))

    def _whole(self, what: str, found: int, key: str, section: Config | None = None) -> None:
        """Refuse fewer layers than the config states: a lost shard must not pass for a smaller model."""
        stated = (self.config if section is None else section).get(key)
        if isinstance(stated, int) and found < stated:
            raise refusal(
                self.where.parent,
                found=f"tensors of {found} {what}",
                expected=f"{stated}, as {key} in {self.where.name} says",
                do=f"The last {stated - found} are missing: copy the checkpoint again, or correct {key}.",
            )
        self._agree(f"the number of {what}", found, key, section)

    def _count(self, pattern: str) -> int:
        """1 + the largest number in the group of `pattern` over all names; 0 if none matches.

        A gap surfaces later as a missing tensor; a number beyond the tensors there are is refused here, before a
        model of that size is laid out.
        """
        matcher = re.compile(pattern)
        largest, name = max(
            ((int(match[1]), name) for name in self.shapes if (match := matcher.match(name))), default=(-1, "")
        )
        if largest >= len(self.shapes):
            raise refusal(
                f"{self.where.parent}: tensor {name!r}",
                found=f"the number {largest} in a checkpoint of {len(self.shapes)} tensors",
                expected="consecutive numbers",
                do="The tensor is misnamed.",
            )
        return largest + 1

    def _agree(self, what: str, found: Any, key: str, section: Config | None = None) -> None:
        stated = (self.config if section is None else section).get(key)
        if stated is not None and stated != found:
            self.notes.append(
                f"{what} is {found} by the tensors; {key} = {ascii(stated)[:80]} in {self.where.name} is not used."
            )

    # ------------------------------------------------------------------------------------------------- parts

    def _language(self, experts: ExpertsSpec) -> LanguageSpec:
        vocab, hidden = self._shape(f"{self.text}embed_tokens.weight", 2)
        layers = self._count(re.escape(self.text) + r"layers\.(\d+)\.")
        heads, kv_heads = self._integer("num_attention_heads"), self._integer("num_key_value_heads")
        rows = self._shape(f"{self.text}layers.0.self_attn.q_proj.weight", 2)[0]
        self._agree("the vocabulary", vocab, "vocab_size")
        self._agree("the hidden size", hidden, "hidden_size")
        self._whole("layers", layers, "num_hidden_layers")
        self._only("hidden_act", ("silu",))
        width = self._dense_width()
        if width is None:
            # No MLP of the common width exists; Qwen's families state the experts' own width beside it.
            own = self.config.get("moe_intermediate_size") == experts.routed_width
            width = self._integer("intermediate_size") if own or not experts.routed else experts.routed_width
        self._agree("the intermediate size", width, "intermediate_size")
        rope = self._section(self.config, "rope_parameters") or self._section(self.config, "rope_scaling")
        section = self._need("mrope_section", rope)
        if not isinstance(section, list) or len(section) != 3 or not all(type(n) is int and n > 0 for n in section):
            raise self._wrong("mrope_section", section, "three whole numbers above 0")
        for key in ("type", "rope_type"):
            self._only(key, ("default", "mrope"), rope)
        if self.config.get("use_sliding_window"):
            raise refusal(
                self.where,
                found="use_sliding_window = true",
                expected="false, as in every published checkpoint",
                do="Attention over a window is not supported; set it to false if the model was trained without.",
            )
        tied = None if self.config.get("tie_word_embeddings") is None else self._flag("tie_word_embeddings")
        has_output = "lm_head.weight" in self.shapes
        if tied is None:
            tied = not has_output
            self.notes.append(
                f"tie_word_embeddings is not stated; read as {tied}: lm_head.weight is "
                f"{'there' if has_output else 'not there'}."
            )
        # A width given per expert kind equal to the MLP's is the default of the spec: say it once.
        same = {name: 0 for name in ("routed_width", "shared_width") if getattr(experts, name) == width}
        return LanguageSpec(
            vocab=vocab,
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=rows // heads,
            intermediate=width,
            rms_eps=self._positive("rms_norm_eps"),
            rope_theta=self._positive("rope_theta", rope if "rope_theta" in rope else None),
            mrope_section=tuple(section),
            max_positions=self._integer("max_position_embeddings", default=32768),
            tied=bool(tied),
            experts=experts.model_copy(update=same),
        )

    def _dense_width(self) -> int | None:
        """The width of a full MLP of layer 0: the dense one, a static expert's, or none."""
        for name in ("mlp.gate_proj.weight", "static_expert.experts.0.gate_proj.weight"):
            shape = self.shapes.get(f"{self.text}layers.0.{name}")
            if shape is not None:
                return shape[0]
        return None

    def _experts(self, view: View) -> tuple[ExpertsSpec, Any]:
        layer = f"{self.text}layers.0."
        if any("deepspeed_expert." in name for name in self.shapes):
            raise refusal(
                self.where.parent,
                found="DeepSpeed experts (deepspeed_expert.*)",
                expected="a routing whose result does not depend on the batch",
                do="DeepSpeed drops tokens by capacity, so the same token gives different numbers in different "
                "company; this variant is not supported. Retrain with using_shared_routed_expert.",
            )
        static = self._count(re.escape(layer) + r"static_expert\.experts\.(\d+)\.")
        static_active = 0
        if static:
            # The public code answers questions with expert 0 and moves the robot with expert 1.
            static_active = 0 if view == "vqa" else min(1, static - 1)
        style = self._style(layer)
        if style is None:
            return ExpertsSpec(static=static, static_active=static_active), "moevla"
        names = EXPERT_STYLES[style]
        routed, width = self._routed(layer, style)
        shared, shared_width = self._shared(layer, style)
        return ExpertsSpec(
            routed=routed,
            top_k=self._top_k(style, routed),
            routed_width=width,
            router_bias=f"{layer}{names.router}.bias" in self.shapes,
            scoring="sigmoid" if style == "deepseek" else "softmax",
            renormalize=self._renormalize(style),
            shared=shared,
            shared_width=shared_width,
            shared_gate=f"{layer}{SHARED_GATE}.weight" in self.shapes,
            static=static,
            static_active=static_active,
        ), style

    def _style(self, layer: str) -> str | None:
        if f"{layer}mlp.experts.gate_up_proj" in self.shapes:
            hidden = self._shape(f"{self.text}embed_tokens.weight", 2)[1]
            _, rows, columns = self._shape(f"{layer}mlp.experts.gate_up_proj", 3)
            down = self._shape(f"{layer}mlp.experts.down_proj", 3)
            # [E, 2I, H] with [E, H, I], or both transposed; 2I = H and I = H cannot both hold.
            upright = columns == hidden and down[1] == hidden and 2 * down[2] == rows
            return "stacked" if upright else "stacked-transposed"
        for style in ("moevla", "deepseek", "mixtral", "qwen"):
            if f"{layer}{EXPERT_STYLES[style].router}.weight" in self.shapes:
                return style
        # Shared experts may stand alone in the research tree.
        if any(name.startswith(f"{layer}share_moe_expert.") for name in self.shapes):
            return "moevla"
        return None

    def _routed(self, layer: str, style: str) -> tuple[int, int]:
        names = EXPERT_STYLES[style]
        if style.startswith("stacked"):
            count, *rest = self._shape(f"{layer}mlp.experts.down_proj", 3)
            return count, rest[1] if style == "stacked" else rest[0]
        template = re.escape(layer + names.routed).replace(r"\{e\}", r"(\d+)").replace(r"\{p\}", names.projections[0])
        count = self._count(template)
        if count == 0:
            return 0, 0
        first = layer + names.routed.format(e=0, p=names.projections[0]) + ".weight"
        return count, self._shape(first, 2)[0]

    def _shared(self, layer: str, style: str) -> tuple[int, int]:
        template = layer + EXPERT_STYLES[style].shared
        first = self.shapes.get(template.format(e=0, p="gate_proj") + ".weight")
        if first is None:
            return 0, 0
        count = (
            self._count(re.escape(template).replace(r"\{e\}", r"(\d+)").replace(r"\{p\}", "gate_proj"))
            if "{e}" in template
            else 1
        )
        return count, first[0]

    def _top_k(self, style: str, routed: int) -> int:
        if not routed:
            return 0
        if style == "deepseek":
            # Hard-coded in the public gate; a routed_top_k in the config is not looked at there.
            return max(1, routed // 2)
        if style == "moevla":
            stated = self.config.get("routed_top_k")
            if not stated:
                self.notes.append(
                    f"routed_top_k is {'0' if stated == 0 else 'not stated'}: the public code takes half of the "
                    f"{routed} experts, top-{max(1, routed // 2)}."
                )
                return max(1, routed // 2)
            return self._integer("routed_top_k")
        return self._integer("num_experts_per_tok")

    def _renormalize(self, style: str) -> bool:
        # Mixtral and Qwen3-VL-MoE always renormalise; Qwen2-MoE says, and its class default is false.
        if style != "qwen" and "norm_topk_prob" not in self.config:
            return True
        return self._flag("norm_topk_prob")

    def _vision(self, hidden: int) -> VisionSpec:
        section = self._section(self.config, "vision_config")
        self._only("hidden_act", ("quick_gelu",), section)
        embed_dim, channels, temporal, patch, _ = self._shape(f"{self.visual}patch_embed.proj.weight", 5)
        depth = self._count(re.escape(self.visual) + r"blocks\.(\d+)\.")
        self._whole("vision blocks", depth, "depth", section)
        self._agree("the vision tower's width", embed_dim, "embed_dim", section)
        merged, out = self._shape(f"{self.visual}merger.mlp.0.weight", 2)[1], hidden
        self._agree("the vision tower's output", out, "hidden_size", section)
        return VisionSpec(
            depth=depth,
            embed_dim=embed_dim,
            heads=self._integer("num_heads", section, default=16),
            mlp_ratio=self._shape(f"{self.visual}blocks.0.mlp.fc1.weight", 2)[0] // embed_dim,
            patch=patch,
            temporal_patch=temporal,
            merge=round((merged / embed_dim) ** 0.5),
            channels=channels,
        )

    def _fusion(self) -> Literal["film", "sum"]:
        film = "reasoning_film.scale_fc.weight" in self.shapes
        stated = self.config.get("using_film")
        if stated is not None and bool(stated) != film:
            self.notes.append(
                f"FiLM is {'there' if film else 'not there'} by the tensors; using_film = {stated} is not used."
            )
        return "film" if film else "sum"

    def _head(self, hidden: int) -> HeadSpec:
        kind = self.config.get("policy_head_type")
        if kind is not None and kind not in _HEAD_TYPES:
            raise refusal(
                self.where,
                found=f"policy_head_type = {ascii(kind)[:80]}",
                expected=" or ".join(_HEAD_TYPES),
                do="Only the ScaleDP family is supported, not e.g. a U-Net diffusion head.",
            )
        section = self._section(self.config, "policy_head_config")
        for flag, needed in (
            ("learn_sigma", False),
            ("time_as_cond", True),
            ("obs_as_cond", True),
            ("is_tinyvla", False),
        ):
            if section.get(flag, needed) != needed:
                raise refusal(
                    self.where,
                    found=f"policy_head_config.{flag} = {section[flag]}",
                    expected=f"{needed}, as in every published VLA checkpoint",
                    do="This head's arithmetic is not supported.",
                )
        width, action_dim = self._shape("policy_head.x_embedder.weight", 2)
        horizon = self._shape("policy_head.pos_embed", 3)[1]
        depth = self._count(r"policy_head\.blocks\.(\d+)\.")
        combine = self.shapes.get("policy_head.combine.0.weight")
        joined = combine or self._shape("policy_head.cond_obs_emb.weight", 2)
        # Absent means the class default, 16, in all three public code lines.
        heads = self._integer("num_heads", section, default=16)
        self._agree("the action dimension", action_dim, "input_dim", section)
        self._agree("the horizon", horizon, "prediction_horizon", section)
        self._whole("head blocks", depth, "depth", section)
        self._agree("the head's width", width, "n_emb", section)
        self._agree("the state dimension", joined[1] - hidden, "state_dim", section)
        spec = HeadSpec(
            depth=depth,
            width=width,
            heads=heads,
            mlp_width=self._shape("policy_head.blocks.0.mlp.fc1.weight", 2)[0],
            action_dim=action_dim,
            state_dim=joined[1] - hidden,
            horizon=horizon,
            cond_dim=hidden,
            conditioning="combine" if combine else "norm",
            combine_width=combine[0] if combine else 1024,
            reasoning=self._reasoning(section, depth),
        )
        name = str(self.config.get("policy_head_size", ""))
        if name and name.rsplit("_", 1)[-1] != spec.size:
            self.notes.append(
                f"the head is {spec.size} by the tensors; policy_head_size = {ascii(name)[1:81].rstrip(chr(39))} in "
                f"{self.where.name} is not used."
            )
        return spec

    def _reasoning(self, section: Config, depth: int) -> ReasoningSpec | None:
        if "policy_head.cond_reasoning_emb.weight" not in self.shapes:
            if section.get("reasoning_layer_id", -1) > -1:
                # Strict reading would find the missing tensor too, but not say why it is needed.
                self._shape("policy_head.cond_reasoning_emb.weight", 2)
            return None
        start = self._need("reasoning_layer_id", section)
        if type(start) is not int or not 0 <= start < depth:
            raise self._wrong("reasoning_layer_id", start, f"a block of the head, 0 to {depth - 1}")
        return ReasoningSpec(
            start=start,
            stop=self._integer("reasoning_layer_end", section, default=depth),
            final=self._flag("reasoning_final", section, default=True),
        )

    def _sampler(self) -> SamplerSpec:
        section = self._section(self.config, "policy_head_config")
        return SamplerSpec(
            train_steps=self._integer("num_train_timesteps", section, default=100),
            steps=self._integer("num_inference_timesteps", section, default=10),
        )

    def _tokens(self) -> TokenSpec:
        keys = {
            "vision_start": "vision_start_token_id",
            "vision_end": "vision_end_token_id",
            "image_pad": "image_token_id",
            "im_start": "im_start_token_id",
            "im_end": "im_end_token_id",
            "endoftext": "endoftext_token_id",
        }
        return TokenSpec(
            **{ours: int(self.config[key]) for ours, key in keys.items() if self.config.get(key) is not None}
        )
