"""Probes: observations and what the reference makes of them, to be compared with engines by numpy alone.

Two references per probe: over the weights as trained, and over the weights that a quantized bundle really holds.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chatvla_edge.export.model import ddim
from chatvla_edge.export.model.backbone import mrope_positions
from chatvla_edge.export.model.experts import Router
from chatvla_edge.export.model.fusion import prompt_mean, reasoning_mean
from chatvla_edge.export.model.images import Preprocessing, patches
from chatvla_edge.export.model.policy import ChatVLA2
from chatvla_edge.export.model.prompt import Prompt
from chatvla_edge.export.normalization import Normalization
from chatvla_edge.export.quantize import BlockFormat, Precision, dequantize, quantize
from chatvla_edge.export.spec import PolicySpec

Arrays = dict[str, NDArray[np.generic]]

INSTRUCTION = "Answer the question and pick the card with the correct answer."

# Matrices that no engine multiplies with: rows are gathered from the one, the other is folded into a table.
_NO_MAP = re.compile(r".*(embed_tokens|head\.t_embedder).*")


@dataclass(frozen=True)
class Scene:
    """One observation: frames in camera order, state in the robot's units, initial noise, instruction."""

    frames: Sequence[NDArray[np.uint8]]
    state: NDArray[np.float32]
    noise: NDArray[np.float32]
    instruction: str


def scenes(
    count: int, sizes: Sequence[tuple[int, int]], normalization: Normalization, horizon: int, first: int = 0
) -> list[Scene]:
    """Made-up observations: smooth random pictures, states within two deviations of the training data's mean.

    They are numbered; `first` is the number, and the seed, of the first.
    """
    out = []
    for seed in range(first, first + count):
        rng = np.random.default_rng(seed)
        frames = [_picture(rng, *size) for size in sizes]
        spread = rng.uniform(-2, 2, len(normalization.state_mean)).astype(np.float32)
        state: NDArray[np.float32] = normalization.state_mean + spread * normalization.state_std
        noise = rng.standard_normal((horizon, len(normalization.action_min)), np.float32)
        out.append(Scene(frames, state, noise, INSTRUCTION))
    return out


def _picture(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Coloured patches blown up, with sensor noise: edges and flat areas, unlike white noise."""
    coarse = rng.integers(0, 256, (height // 40 + 1, width // 40 + 1, 3))
    fine = np.kron(coarse, np.ones((40, 40, 1)))[:height, :width] + rng.normal(0, 6, (height, width, 3))
    return np.clip(fine, 0, 255).astype(np.uint8)


def dequantized(model: ChatVLA2, precision: Precision) -> ChatVLA2:
    """The model over the weights that a bundle of this precision holds; fp32 gives the model itself."""
    if not precision.quantizes:
        return model
    tensors: dict[str, Tensor] = {}
    for name, value in model.named_parameters():
        tensors[name] = value.detach()
        form = precision.form(name, tuple(value.shape)) if value.dim() == 2 and not _NO_MAP.fullmatch(name) else None
        if form is not None:
            tensors[name] = _rounded(value, form)
    # The engine sums the two temporal halves of the patch convolution first and rounds the sum.
    name = "backbone.visual.patch_embed.proj.weight"
    folded = tensors[name].sum(dim=2)
    form = precision.form(name, (folded.shape[0], folded[0].numel()))
    if form is not None:
        half = _rounded(folded.flatten(1), form).view_as(folded) / 2
        tensors[name] = torch.stack([half, half], dim=2)
    # The output matrix is rounded, the embedding rows it is tied to are not: two matrices from here on.
    output = model.backbone.language.embed_tokens.weight.detach()
    form = precision.form("backbone.lm_head.weight", tuple(output.shape))
    if model.spec.language.tied and form is not None:
        tensors["backbone.lm_head.weight"] = _rounded(output, form)
        language = model.spec.language.model_copy(update={"tied": False})
        return ChatVLA2.from_tensors(model.spec.model_copy(update={"language": language}), tensors)
    return ChatVLA2.from_tensors(model.spec, tensors)


def _rounded(weight: Tensor, form: BlockFormat) -> Tensor:
    values = weight.detach().float().numpy()
    return torch.from_numpy(dequantize(quantize(values, form), form, values.shape[1]))


@torch.no_grad()
def reference(
    model: ChatVLA2,
    prompt: Prompt,
    preprocessing: Sequence[Preprocessing],
    normalization: Normalization,
    scene: Scene,
    max_tokens: int,
) -> Arrays:
    """What the reference computes at every seam between stages."""
    seen = [patches(steps(frame)) for steps, frame in zip(preprocessing, scene.frames, strict=True)]
    grids = [grid for _, grid in seen]
    image_tokens = model.backbone.images(torch.from_numpy(np.concatenate([rows for rows, _ in seen])), grids)
    ids = torch.tensor(prompt.ids(grids, scene.instruction))
    generation = model.backbone.generate(ids, image_tokens, grids, max_tokens)
    means = prompt_mean(generation.prompt), reasoning_mean(generation.prompt, generation.decoded)
    observed, reasoned = model.fusion(*means)
    state = torch.from_numpy(normalization.state(scene.state))[None]
    conditions = model.head.condition(observed[None], reasoned[None], state)
    hidden = torch.cat([generation.prompt, generation.decoded])
    sampled = model.head.sample(torch.from_numpy(scene.noise)[None], conditions, model.spec.sampler)
    normalized: NDArray[np.float32] = sampled[0].numpy()
    return {
        "image_tokens": image_tokens.numpy(),
        "token_ids": np.asarray(generation.token_ids, np.int64),
        "hidden": hidden.numpy(),
        "routing": _routing(model, ids, image_tokens, grids, generation.token_ids),
        "prompt_mean": means[0].numpy(),
        "reasoning_mean": means[1].numpy(),
        "modulations": modulations(model, conditions),
        "normalized": normalized,
        "chunk": normalization.chunk(normalized),
    }


def _routing(
    model: ChatVLA2, ids: Tensor, image_tokens: Tensor, grids: Sequence[tuple[int, int]], token_ids: Sequence[int]
) -> NDArray[np.int64]:
    """Expert ids [layers, P+N-1, k] of prompt and text rows."""
    chosen: list[Tensor] = []
    routers = [module for module in model.modules() if isinstance(module, Router)]
    if not routers:
        return np.zeros((0, len(ids) + len(token_ids) - 1, 0), np.int64)
    hooks = [router.register_forward_hook(lambda _m, _i, out: chosen.append(out[1])) for router in routers]
    positions, following = mrope_positions(ids, grids, model.spec.tokens.image_pad, model.spec.vision.merge)
    fed = torch.tensor(token_ids[:-1], dtype=torch.int64)
    line = (following + torch.arange(len(fed))).expand(3, -1)
    embedded = torch.cat([model.backbone.embed(ids, image_tokens), model.backbone.embed(fed)])
    model.backbone.hidden(embedded, torch.cat([positions, line], dim=1))
    for hook in hooks:
        hook.remove()
    return torch.stack(chosen).numpy()


def modulations(model: ChatVLA2, conditions: tuple[Tensor, Tensor]) -> NDArray[np.float32]:
    """All adaLN vectors of all steps, [steps, M], in the order in which the `condition` stage writes them."""
    head, which = model.head, model.head.head.reasoning
    rows = []
    for at in ddim.steps(model.spec.sampler):
        time = head.t_embedder(torch.tensor([at.timestep]))
        observed, reasoned = (time + condition for condition in conditions)
        parts = [
            block.get_submodule("adaLN_modulation")(
                reasoned if which and which.start <= index < which.stop else observed
            )
            for index, block in enumerate(head.blocks)
        ]
        parts.append(head.final_layer.adaLN_modulation(reasoned if which and which.final else observed))
        rows.append(torch.cat(parts, dim=-1))
    return torch.cat(rows).numpy()


def observation(
    spec: PolicySpec,
    cameras: Mapping[str, Preprocessing],
    prompt: Prompt,
    normalization: Normalization,
    scene: Scene,
) -> Arrays:
    """A scene, camera by camera, and what the reference hands its first stages: pixels, prompt, state."""
    arrays: Arrays = {
        "state": scene.state,
        "noise": scene.noise,
        "instruction": np.frombuffer(scene.instruction.encode(), np.uint8),
        "normalized_state": normalization.state(scene.state),
    }
    grids = []
    for (name, steps), frame in zip(cameras.items(), scene.frames, strict=True):
        rows, grid = patches(steps(frame))
        grids.append(grid)
        arrays[f"frame.{name}"] = frame
        # Both temporal slices of a patch are this one frame; engines take one.
        arrays[f"patches.{name}"] = folded(rows, spec)
    ids = torch.tensor(prompt.ids(grids, scene.instruction))
    positions, _ = mrope_positions(ids, grids, spec.tokens.image_pad, spec.vision.merge)
    return arrays | {"prompt_ids": ids.numpy(), "prompt_positions": positions.numpy()}


def folded(rows: NDArray[np.float32], spec: PolicySpec) -> NDArray[np.float32]:
    """Patches [P, 1176] of the published processor -> [P, 588] as engines take them: one of two equal slices."""
    vision = spec.vision
    cut = rows.reshape(len(rows), vision.channels, vision.temporal_patch, -1)
    return np.ascontiguousarray(cut[:, :, 0].reshape(len(rows), -1))


def probe_file(observed: Arrays, references: Mapping[str, Arrays]) -> bytes:
    """One probe as an .npz without pickles. references: kind of gate -> outputs."""
    arrays = dict(observed)
    for kind, outputs in references.items():
        arrays |= {f"{kind}.{name}": value for name, value in outputs.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()
