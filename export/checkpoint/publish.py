"""Write a policy in the public layout: config.json, sharded safetensors, tokenizer, statistics."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chatvla_edge.export.checkpoint.config import SpecReader
from chatvla_edge.export.checkpoint.errors import refusal
from chatvla_edge.export.checkpoint.names import Bond, Layout, bonds
from chatvla_edge.export.checkpoint.statistics import Statistics
from chatvla_edge.export.checkpoint.writer import PlannedTensor, SafetensorsWriter
from chatvla_edge.export.model.policy import ChatVLA2
from chatvla_edge.export.spec import PolicySpec

Supply = Callable[[str], Tensor]
"""Our parameter name -> its tensor; called once per parameter, in the model's order."""


def config_of(spec: PolicySpec, layout: Layout) -> dict[str, Any]:
    """config.json of a policy, in the keys of the public research tree, every value written out."""
    language, vision, experts = spec.language, spec.vision, spec.language.experts
    config: dict[str, Any] = {
        "architectures": ["Qwen2VLForConditionalGenerationForVLA" if spec.head else "Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vla" if spec.head else "qwen2_vl",
        "vocab_size": language.vocab,
        "hidden_size": language.hidden,
        "intermediate_size": language.intermediate,
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": language.rms_eps,
        "rope_theta": language.rope_theta,
        # Saved as `default` by the public code; the sections are what makes it M-RoPE.
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": list(language.mrope_section)},
        "max_position_embeddings": language.max_positions,
        "use_sliding_window": False,
        "tie_word_embeddings": language.tied,
        "vision_config": {
            "depth": vision.depth,
            "embed_dim": vision.embed_dim,
            "hidden_size": language.hidden,
            "num_heads": vision.heads,
            "mlp_ratio": vision.mlp_ratio,
            "patch_size": vision.patch,
            "temporal_patch_size": vision.temporal_patch,
            "spatial_merge_size": vision.merge,
            "in_chans": vision.channels,
        },
        "vision_start_token_id": spec.tokens.vision_start,
        "vision_end_token_id": spec.tokens.vision_end,
        "image_token_id": spec.tokens.image_pad,
        "im_start_token_id": spec.tokens.im_start,
        "im_end_token_id": spec.tokens.im_end,
        "endoftext_token_id": spec.tokens.endoftext,
        "using_moe": experts.kind != "dense",
    }
    if experts.kind != "dense":
        config |= {
            "using_static_expert": experts.static > 0,
            "using_shared_routed_expert": layout.experts == "moevla" and experts.routed + experts.shared > 0,
            "using_deepseek_moe": layout.experts == "deepseek",
            "shared_expert_num": experts.shared,
            "routed_expert_num": experts.routed,
            "routed_top_k": experts.top_k,
        }
    if layout.experts not in ("moevla", "deepseek"):
        config |= {
            "num_experts_per_tok": experts.top_k,
            "norm_topk_prob": experts.renormalize,
            "moe_intermediate_size": language.routed_width,
        }
    if spec.head is not None:
        config |= _head_config(spec)
    return config


def _head_config(spec: PolicySpec) -> dict[str, Any]:
    head, sampler = spec.head, spec.sampler
    assert head is not None
    kind = "dit_diffusion_policy" if head.reasoning else "scale_dp_policy"
    section: dict[str, Any] = {
        "model_type": kind,
        "input_dim": head.action_dim,
        "output_dim": head.action_dim,
        "state_dim": head.state_dim,
        "cond_dim": head.cond_dim,
        "prediction_horizon": head.horizon,
        "num_queries": head.horizon,
        "depth": head.depth,
        "n_emb": head.width,
        "num_heads": head.heads,
        "mlp_ratio": head.mlp_width / head.width,
        "num_train_timesteps": sampler.train_steps,
        "num_inference_timesteps": sampler.steps,
        "noise_samples": 1,
        "learn_sigma": False,
        "time_as_cond": True,
        "obs_as_cond": True,
        "is_tinyvla": False,
    }
    if head.reasoning is not None:
        section["reasoning_layer_id"] = head.reasoning.start
        # The public code knows only "from here to the end"; anything else is said in two keys of our own.
        if (head.reasoning.stop, head.reasoning.final) != (head.depth, True):
            section |= {"reasoning_layer_end": head.reasoning.stop, "reasoning_final": head.reasoning.final}
    return {
        "policy_head_type": kind,
        "policy_head_size": f"{'DiT' if head.reasoning else 'ScaleDP'}_{head.size}",
        "policy_head_config": section,
        "using_film": spec.fusion.kind == "film",
        "with_llm_head": True,
    }


def write_checkpoint(
    directory: Path,
    spec: PolicySpec,
    layout: Layout,
    supply: Supply,
    *,
    dtype: torch.dtype = torch.bfloat16,
    statistics: Statistics | None = None,
    tokenizer: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a whole checkpoint directory; the weights are streamed, one group of tensors in memory at a time.

    tokenizer: text of a tokenizer.json. config.json is written last: without it nothing opens the directory.
    Raises CheckpointError when the directory already holds weights or the disk is too small.
    """
    everything = list(bonds(parameter_shapes(spec), layout))
    plan = _plan(everything, dtype)
    config = {**config_of(spec, layout), "torch_dtype": str(dtype).removeprefix("torch.")}
    _check_expressible(config, plan, spec, directory)
    with SafetensorsWriter(directory, plan, max_shard_bytes=max_shard_bytes, progress=progress) as out:
        for bond in everything:
            ours = [supply(name).to(dtype) for name in bond.ours]
            for name, tensor in zip(bond.theirs, bond.to_theirs(ours), strict=True):
                out.write(name, tensor.contiguous())
    if statistics is not None:
        (directory / "dataset_stats.json").write_text(statistics.to_json(), encoding="utf-8")
    if tokenizer is not None:
        (directory / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_expressible(
    config: Mapping[str, Any], plan: Iterable[PlannedTensor], spec: PolicySpec, directory: Path
) -> None:
    """Refuse before writing what would read back as another policy: not every layout can say every variant."""
    shapes = {tensor.name: tensor.shape for tensor in plan}
    read, _ = SpecReader(config, shapes, directory / "config.json").read()
    if read != spec:
        raise refusal(
            directory,
            found=f"{spec.language.experts!r}, {spec.fusion!r}, {spec.head!r}",
            expected=f"a policy this layout can express; it would read back as {read.language.experts!r}, "
            f"{read.fusion!r}, {read.head!r}",
            do="Choose another layout, or a variant that the layout's family has.",
        )


def parameter_shapes(spec: PolicySpec) -> dict[str, tuple[int, ...]]:
    """Our parameter names and shapes, in the model's order; the tied output head counts as the embedding."""
    return {name: tuple(value.shape) for name, value in ChatVLA2.on_meta(spec).named_parameters()}


def public_tensors(tensors: Mapping[str, Tensor], layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """The public tensors of parameters in memory."""
    for bond in bonds({name: tuple(value.shape) for name, value in tensors.items()}, layout):
        yield from zip(bond.theirs, bond.to_theirs([tensors[name] for name in bond.ours]), strict=True)


def _plan(everything: Iterable[Bond], dtype: torch.dtype) -> list[PlannedTensor]:
    return [PlannedTensor(name, shape, dtype) for bond in everything for name, shape in bond.theirs.items()]
