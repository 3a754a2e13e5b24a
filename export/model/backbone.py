"""Qwen2-VL on transformers' own modules, with the MLPs replaced by the spec's experts.

Parameter names are transformers' own below `visual.` and `language.`; only `language.layers.*.mlp` is ours when it
holds experts. Batch size is 1 everywhere: a robot asks one question at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig, Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel,
    Qwen2VLRotaryEmbedding,
    Qwen2VLTextModel,
    Qwen2VLVisionRotaryEmbedding,
)

from chatvla_edge.export.model.experts import mlp
from chatvla_edge.export.spec import PolicySpec

Grid = tuple[int, int]
"""(rows, columns) of 14-pixel patches of one image, before the 2 x 2 merge."""


def text_config(spec: PolicySpec) -> Qwen2VLTextConfig:
    """transformers' configuration of the language model."""
    language = spec.language
    config = Qwen2VLTextConfig(
        vocab_size=language.vocab,
        hidden_size=language.hidden,
        intermediate_size=language.intermediate,
        num_hidden_layers=language.layers,
        num_attention_heads=language.heads,
        num_key_value_heads=language.kv_heads,
        rms_norm_eps=language.rms_eps,
        max_position_embeddings=language.max_positions,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": language.rope_theta,
            "mrope_section": list(language.mrope_section),
        },
        use_sliding_window=False,
        bos_token_id=spec.tokens.endoftext,
        eos_token_id=spec.tokens.im_end,
    )
    config._attn_implementation = "sdpa"
    return config


def vision_config(spec: PolicySpec) -> Qwen2VLVisionConfig:
    """transformers' configuration of the vision tower."""
    vision = spec.vision
    config = Qwen2VLVisionConfig(
        depth=vision.depth,
        embed_dim=vision.embed_dim,
        hidden_size=spec.language.hidden,
        num_heads=vision.heads,
        mlp_ratio=vision.mlp_ratio,
        patch_size=vision.patch,
        temporal_patch_size=vision.temporal_patch,
        spatial_merge_size=vision.merge,
        in_channels=vision.channels,
    )
    config._attn_implementation = "sdpa"
    return config


def mrope_positions(token_ids: Tensor, grids: Sequence[Grid], image_pad: int, merge: int = 2) -> tuple[Tensor, int]:
    """Three-axis rotary positions of a prompt.

    token_ids: [P] with each image spelled as rows/merge * columns/merge `image_pad` tokens in a row.
    Returns positions [3, P] int64 (time, height, width) and the position of the first token after the prompt.

    Text runs one index on all axes. An image keeps the time index and walks its merged grid from there; the text
    after it goes on at the largest index so far plus one, so 99 tokens of a 9 x 11 grid take 11 positions.
    """
    positions = torch.empty(3, len(token_ids), dtype=torch.int64)
    is_image = (token_ids == image_pad).tolist()
    at, offset = 0, 0
    for rows, columns in grids:
        start = is_image.index(True, at) if True in is_image[at:] else len(is_image)
        positions[:, at:start] = offset + torch.arange(start - at)
        offset += start - at
        height, width = rows // merge, columns // merge
        stop = start + height * width
        if not all(is_image[start:stop]) or stop > len(is_image):
            raise ValueError(
                f"the prompt has too few image tokens: an image of {rows} x {columns} patches needs {height * width} "
                f"from row {start} on, the prompt ends or changes to text before row {stop}"
            )
        positions[0, start:stop] = offset
        positions[1, start:stop] = offset + torch.arange(height).repeat_interleave(width)
        positions[2, start:stop] = offset + torch.arange(width).repeat(height)
        offset += max(height, width)
        at = stop
    if any(is_image[at:]):
        raise ValueError(f"the prompt holds image tokens beyond those of the {len(grids)} images given")
    positions[:, at:] = offset + torch.arange(len(token_ids) - at)
    return positions, offset + len(token_ids) - at


@dataclass(frozen=True)
class Generation:
    """Greedy reasoning and the hidden states it left behind (final norm, as the head sees them).

    token_ids: [N] ends with the end token unless the length bound cut it; prompt: [P, D]; decoded: [N-1, D].
    """

    token_ids: list[int]
    prompt: Tensor
    decoded: Tensor


class Backbone(nn.Module):
    """Vision tower, language model and head of a Qwen2-VL with the spec's experts."""

    def __init__(self, spec: PolicySpec) -> None:
        super().__init__()
        self.spec = spec
        self.visual = Qwen2VisionTransformerPretrainedModel._from_config(vision_config(spec))
        self.language = Qwen2VLTextModel._from_config(text_config(spec))
        for layer in self.language.layers:
            layer.mlp = mlp(spec.language)
        self.lm_head = nn.Linear(spec.language.hidden, spec.language.vocab, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make the output head the embedding itself where the spec says so; call again after replacing parameters."""
        if self.spec.language.tied:
            self.lm_head.weight = self.language.embed_tokens.weight

    def restore_rotary(self) -> None:
        """Make the rotary tables anew, in fp32 on the CPU: a model built on the meta device has none.

        They are not part of any checkpoint; training casts them to bf16 but inference keeps fp32 (public code).
        """
        with torch.device("cpu"):
            self.language.rotary_emb = Qwen2VLRotaryEmbedding(self.language.config)
            self.visual.rotary_pos_emb = Qwen2VLVisionRotaryEmbedding(self.visual.config)

    def images(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Image tokens: patches [sum of rows * columns, 1176] -> [a quarter of them, D]."""
        grid = torch.tensor([[1, rows, columns] for rows, columns in grids], device=patches.device)
        out: Tensor = self.visual(patches.to(self.lm_head.weight.dtype), grid_thw=grid).pooler_output
        return out

    def embed(self, token_ids: Tensor, image_tokens: Tensor | None = None) -> Tensor:
        """[P] ids (and [I, D] image tokens for its image_pad rows, in order) -> [P, D]."""
        embedded: Tensor = self.language.embed_tokens(token_ids)
        if image_tokens is not None:
            embedded = embedded.clone()
            embedded[token_ids == self.spec.tokens.image_pad] = image_tokens.to(embedded.dtype)
        return embedded

    def hidden(self, embedded: Tensor, positions: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """Final-norm hidden states: embedded [T, D], positions [3, T] -> [T, D]; `cache` grows by T rows."""
        out = self.language(
            inputs_embeds=embedded[None],
            position_ids=positions[:, None],
            past_key_values=cache,
            use_cache=cache is not None,
        )
        states: Tensor = out.last_hidden_state[0]
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, D] -> [T, vocab]."""
        out: Tensor = self.lm_head(hidden)
        return out

    @torch.no_grad()
    def generate(
        self, token_ids: Tensor, image_tokens: Tensor | None, grids: Sequence[Grid], max_tokens: int
    ) -> Generation:
        """Greedy decoding of at most `max_tokens` tokens; only the end-of-turn token stops it, as in the public code.

        token_ids: [P]; image_tokens: [I, D] or None.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, found {max_tokens}")
        tokens = self.spec.tokens
        positions, following = mrope_positions(token_ids, grids, tokens.image_pad, self.spec.vision.merge)
        cache = DynamicCache(config=self.language.config)
        prompt = self.hidden(self.embed(token_ids, image_tokens), positions.to(token_ids.device), cache)
        generated = [int(self.logits(prompt[-1:]).argmax(-1))]
        decoded: list[Tensor] = []
        while generated[-1] != tokens.im_end and len(generated) < max_tokens:
            fed = torch.tensor(generated[-1:], device=token_ids.device)
            at = torch.full((3, 1), following + len(decoded), device=token_ids.device)
            decoded.append(self.hidden(self.embed(fed), at, cache))
            generated.append(int(self.logits(decoded[-1]).argmax(-1)))
        rows = torch.cat(decoded) if decoded else prompt[:0]
        return Generation(generated, prompt, rows)
