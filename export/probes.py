"""Probes: observations and what the reference makes of them, to be compared with engines by numpy alone.

Two references per probe: over the weights as trained, and over the weights that a quantized bundle really holds.
"""

import io
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from chatvla_edge.export.model import ddim
from chatvla_edge.export.model.backbone import Generation, Grid, mrope_positions
from chatvla_edge.export.model.experts import Router
from chatvla_edge.export.model.fusion import prompt_mean, reasoning_mean
from chatvla_edge.export.model.images import Preprocessing, patches
from chatvla_edge.export.model.policy import ChatVLA2
from chatvla_edge.export.model.prompt import Prompt
from chatvla_edge.export.normalization import Normalization
from chatvla_edge.export.quantize import BlockFormat, Precision, dequantize, quantize
from chatvla_edge.export.spec import PolicySpec
from chatvla_edge.export.streaming import Rounding, Values, as_stored, streamed

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
    """The model over the weights that a bundle of this precision holds, all in memory; fp32 gives the model itself."""
    if not precision.quantizes:
        return model
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    return streamed(model.spec, tensors.__getitem__, rounding(precision), held=sys.maxsize)


def rounding(precision: Precision) -> Rounding:
    """What a bundle of this precision makes of each parameter, for `streamed`."""

    def of(name: str, shape: tuple[int, ...]) -> Values:
        columns = math.prod(shape[1:]) // (shape[2] if len(shape) == 5 else 1)
        if len(shape) not in (2, 5) or _NO_MAP.fullmatch(name):
            return as_stored
        form = precision.form(name, (shape[0], columns))
        if form is None:
            return as_stored
        return partial(_rounded if len(shape) == 2 else _folded, form=form)

    return of


def _folded(weight: Tensor, form: BlockFormat) -> Tensor:
    """The engine sums the two temporal halves of the patch convolution [N, C, 2, 14, 14] first, and rounds the sum."""
    summed = weight.sum(dim=2)
    half = _rounded(summed.flatten(1), form).view_as(summed) / 2
    return torch.stack([half, half], dim=2)


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
    draft: Sequence[int] = (),
) -> Arrays:
    """What the reference computes at every seam between stages.

    draft: what it will probably say; the better the guess, the fewer passes. It changes nothing but rounding.
    """
    seen = [patches(steps(frame)) for steps, frame in zip(preprocessing, scene.frames, strict=True)]
    grids = [grid for _, grid in seen]
    image_tokens = model.backbone.images(torch.from_numpy(np.concatenate([rows for rows, _ in seen])), grids)
    ids = torch.tensor(prompt.ids(grids, scene.instruction))
    generation, routing = speak(model, ids, image_tokens, grids, max_tokens, draft)
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
        "routing": routing,
        "prompt_mean": means[0].numpy(),
        "reasoning_mean": means[1].numpy(),
        "modulations": modulations(model, conditions),
        "normalized": normalized,
        "chunk": normalization.chunk(normalized),
    }


@torch.no_grad()
def speak(
    model: ChatVLA2,
    token_ids: Tensor,
    image_tokens: Tensor | None,
    grids: Sequence[Grid],
    max_tokens: int,
    draft: Sequence[int] = (),
) -> tuple[Generation, NDArray[np.int64]]:
    """`Backbone.generate` in fewer passes, and the expert ids [layers, P+N-1, k] of all rows.

    Where weights are read anew in every pass, a pass over many rows costs little more than one over a single row. So
    the draft is fed along with the prompt and what the model says at each of its rows is compared with it; at a miss
    the model's own token is taken, and guesses go on behind it, few at first.
    """
    backbone, tokens = model.backbone, model.spec.tokens
    positions, following = mrope_positions(token_ids, grids, tokens.image_pad, model.spec.vision.merge)
    stop = next((index for index, token in enumerate(draft) if token == tokens.im_end), len(draft))
    draft = draft[: min(stop, max_tokens - 1)]
    cache = DynamicCache(config=backbone.language.config)
    said: list[int] = []
    rows: list[Tensor] = []
    guess, window = list(draft), 4
    with _Routing(model) as routing:
        while not said or (said[-1] != tokens.im_end and len(said) < max_tokens):
            after = torch.tensor([*said[-1:], *guess], dtype=torch.int64)
            at = (following + max(0, len(said) - 1) + torch.arange(len(after))).expand(3, -1)
            embedded = backbone.embed(after)
            if not said:
                embedded = torch.cat([backbone.embed(token_ids, image_tokens), embedded])
                at = torch.cat([positions, at], dim=1)
            hidden = backbone.hidden(embedded, at, cache)
            certain = len(embedded) - len(guess)
            found = backbone.logits(hidden[certain - 1 :]).argmax(-1).tolist()
            hits = next((index for index, token in enumerate(guess) if token != found[index]), len(guess))
            said += found[: hits + 1]
            rows.append(hidden[: certain + hits])
            routing.keep(certain + hits)
            cache.crop(hits - len(guess))
            window = 2 * window if hits == len(guess) else 4
            guess = list(draft[len(said) :][: min(window, max_tokens - len(said) - 1)])
    everything = torch.cat(rows)
    prompt = len(token_ids)
    return Generation(said, everything[:prompt], everything[prompt:]), routing.ids()


class _Routing:
    """Listens to the routers while the context is open."""

    def __init__(self, model: ChatVLA2) -> None:
        self._routers = [module for module in model.modules() if isinstance(module, Router)]
        self._heard: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._rows = 0

    def __enter__(self) -> "_Routing":
        self._handles = [
            router.register_forward_hook(lambda _m, _i, out: self._heard.append(out[1])) for router in self._routers
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def keep(self, rows: int) -> None:
        """Of the pass just heard, the first rows are part of the answer."""
        self._rows += rows
        if self._routers:
            self._kept.append(torch.stack(self._heard)[:, :rows])
        self._heard.clear()

    def ids(self) -> NDArray[np.int64]:
        """[layers, rows, k]."""
        if not self._routers:
            return np.zeros((0, self._rows, 0), np.int64)
        found: NDArray[np.int64] = torch.cat(self._kept, dim=1).numpy()
        return found


def modulations(model: ChatVLA2, conditions: tuple[Tensor, Tensor]) -> NDArray[np.float32]:
    """All adaLN vectors of all steps, [steps, M], in the order in which the `condition` stage writes them."""
    head, which = model.head, model.head.head.reasoning
    time = head.t_embedder(torch.tensor([at.timestep for at in ddim.steps(model.spec.sampler)]))
    observed, reasoned = (time + condition for condition in conditions)
    parts = [
        block.get_submodule("adaLN_modulation")(reasoned if which and which.start <= index < which.stop else observed)
        for index, block in enumerate(head.blocks)
    ]
    parts.append(head.final_layer.adaLN_modulation(reasoned if which and which.final else observed))
    modulations: NDArray[np.float32] = torch.cat(parts, dim=-1).numpy()
    return modulations


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
