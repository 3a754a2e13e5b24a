"""A bundle that answers queries: frames + state + instruction -> reasoning text and chunk, without torch.

Engines, buffers, filter tables and the rotary positions of the cameras are laid out once; a query allocates nothing
that grows with the model.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.runtime.bundle import Contents
from chatvla_edge.runtime.engines import Engine
from chatvla_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine, Threads
from chatvla_edge.runtime.preprocessing import Pipeline
from chatvla_edge.runtime.prompt import PromptBuilder
from chatvla_edge.runtime.reasoning import LanguageModel, LanguageSizes, follow, reason

Float = NDArray[np.float32]
Int = NDArray[np.int64]
Frame = NDArray[np.uint8]


@dataclass(frozen=True)
class Committed:
    """Actions that are already on their way: prefix [H, A] normalised, mask [H] (1 committed, 0 free)."""

    prefix: Float
    mask: Float


@dataclass(frozen=True)
class Answer:
    """What one query returns.

    token_ids: N generated ids, end token included; normalized [H, A] in [-1, 1]; chunk [H, A] in the robot's units;
    routing [layers, E]: expert visits; seconds: per stage; passes: runs of the language stage; accepted: draft tokens
    that were confirmed.
    """

    token_ids: list[int]
    text: str
    normalized: Float
    chunk: Float
    routing: NDArray[np.int64]
    prompt_mean: Float
    reasoning_mean: Float
    passes: int
    accepted: int
    seconds: Mapping[str, float] = field(compare=False)


@dataclass
class Seconds:
    """Time per stage of one query."""

    spent: dict[str, float] = field(default_factory=dict)
    since: float = field(default_factory=time.perf_counter)

    def lap(self, stage: str) -> None:
        """Book the time since the last lap."""
        now = time.perf_counter()
        self.spent[stage] = self.spent.get(stage, 0.0) + now - self.since
        self.since = now


class Policy:
    """A loaded bundle. Not thread-safe: one query at a time."""

    def __init__(self, root: Path, manifest: Contents, threads: Threads) -> None:
        geometry, stages = manifest.geometry, manifest.stages
        if manifest.target.name != "cpu":
            raise ValueError(
                f"{root}: found a bundle for {manifest.target.name}, expected one for cpu, the only target that this "
                "version has an engine for: export the checkpoint with --target cpu"
            )
        self.manifest = manifest
        self._seconds = Seconds()

        def load(file: str) -> Engine:
            return OnnxRuntimeEngine(root / file, threads)

        self._vision = {stage.grid: load(stage.file) for stage in stages.vision}
        self._condition, self._denoise = load(stages.condition.file), load(stages.denoise.file)
        language = geometry.language
        routed = range(language.layers) if language.experts.routed else range(0)
        sizes = LanguageSizes(
            language.layers,
            language.hidden,
            language.kv_heads,
            language.head_dim,
            language.experts.routed,
            language.experts.top_k,
            stages.language.kv.capacity,
        )
        self._language = LanguageModel(load(stages.language.file), sizes, routed)
        grids = [camera.grid for camera in manifest.cameras]
        self._prompt = PromptBuilder.from_file(root / manifest.tokenizer, manifest.prompt, grids, geometry.vision.merge)
        self._see = _Eyes(manifest, self._vision)
        self._head = _Head(manifest, self._condition, self._denoise)
        self._instruction = ("", self._prompt.rows("wait"))

    def noise(self, seed: int) -> Float:
        """The initial sample of a query, [H, A] standard normal, from a seed."""
        head = self.manifest.geometry.head
        return np.random.default_rng(seed).standard_normal((head.horizon, head.action_dim), np.float32)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a reasoning text, to be a draft."""
        return self._prompt.tokens(text)

    # The stages one by one, for gates and benchmarks; each is a view or a copy of what `query` computes.

    def see(self, frames: Sequence[Frame]) -> Float:
        """Image tokens of the frames, [I, D]."""
        return np.array(self._see(frames, Seconds()), np.float32)

    def follow(self, instruction: str, image_tokens: Float, token_ids: NDArray[np.int64]) -> tuple[Float, Int, Int]:
        """What the model says along a given text of N tokens.

        Returns hidden [P+N-1, D] of prompt and text rows, tokens [N] that it says should come (the first after the
        prompt), and routing [layers, P+N-1, k].
        """
        prompt = self._prompt.rows(instruction)
        return follow(self._language, prompt, image_tokens, token_ids)

    def modulations(self, prompt_mean: Float, reasoning_mean: Float, state: Float) -> Float:
        """[steps, M] from the two means and a state in the robot's units."""
        self._head.condition(prompt_mean, reasoning_mean, self._head.state(state))
        return np.array(self._head.modulations, np.float32)

    def denoise(self, modulations: Float, noise: Float) -> Float:
        """[H, A] normalised from given modulations."""
        np.copyto(self._head.modulations, modulations)
        return self._head.sample(self._head.noise(noise), None)

    def query(
        self,
        frames: Sequence[Frame],
        state: Float,
        instruction: str,
        noise: Float,
        *,
        draft: Sequence[int] = (),
        committed: Committed | None = None,
    ) -> Answer:
        """Answer one query.

        frames: one RGB uint8 [height, width, 3] per camera, in the manifest's order; state [S] in the robot's units;
        noise [H, A]; draft: tokens to try first, e.g. the previous answer's `token_ids`. Tokens, means and chunk do
        not depend on the draft. Raises ValueError for inputs that do not fit the bundle.
        """
        seconds = self._seconds = Seconds()
        normalized_state = self._head.state(state)
        noise = self._head.noise(noise)
        image_tokens = self._see(frames, seconds)
        if instruction != self._instruction[0]:
            self._instruction = (instruction, self._prompt.rows(instruction))
        prompt = self.manifest.prompt
        words = reason(
            self._language,
            self._instruction[1],
            image_tokens,
            stop=prompt.tokens.stop[0],
            max_tokens=prompt.max_reasoning_tokens,
            draft=draft,
        )
        seconds.lap("language")
        self._head.condition(words.prompt_mean, words.reasoning_mean, normalized_state)
        seconds.lap("condition")
        normalized = self._head.sample(noise, committed)
        seconds.lap("denoise")
        return Answer(
            token_ids=words.token_ids,
            text=self._prompt.text(words.token_ids),
            normalized=normalized,
            chunk=self._head.units(normalized),
            routing=words.routing,
            prompt_mean=words.prompt_mean,
            reasoning_mean=words.reasoning_mean,
            passes=words.passes,
            accepted=words.accepted,
            seconds=seconds.spent,
        )


class _Eyes:
    """Frames -> image tokens in the prompt's order; cameras of one grid run as one batch."""

    def __init__(self, manifest: Contents, engines: Mapping[tuple[int, int], Engine]) -> None:
        vision, hidden = manifest.geometry.vision, manifest.geometry.language.hidden
        self.cameras = manifest.cameras
        self.engines = engines
        self.pipelines = [
            Pipeline(camera.preprocessing, height=camera.height, width=camera.width) for camera in self.cameras
        ]
        counts = [camera.grid[0] * camera.grid[1] // vision.merge**2 for camera in self.cameras]
        starts = np.concatenate([[0], np.cumsum(counts)])
        self.tokens = np.zeros((int(starts[-1]), hidden), np.float32)
        self.slices = [slice(int(a), int(b)) for a, b in pairwise(starts)]
        self.batches = {}
        for grid in engines:
            members = [index for index, camera in enumerate(self.cameras) if camera.grid == grid]
            patches = np.zeros((len(members), grid[0] * grid[1], vision.channels * vision.patch**2), np.float32)
            seen = np.zeros((len(members), grid[0] * grid[1] // vision.merge**2, hidden), np.float32)
            self.batches[grid] = (members, patches, seen)

    def __call__(self, frames: Sequence[Frame], seconds: Seconds) -> Float:
        """[sum of image tokens, D], a view that the next query overwrites."""
        if len(frames) != len(self.cameras):
            names = ", ".join(camera.name for camera in self.cameras)
            raise ValueError(f"found {len(frames)} frames, expected {len(self.cameras)}: one each of {names}")
        for grid, (members, patches, seen) in self.batches.items():
            for place, index in enumerate(members):
                self.pipelines[index].run(frames[index], patches[place])
            seconds.lap("preprocessing")
            self.engines[grid].run({"patches": patches}, {"image_tokens": seen})
            for place, index in enumerate(members):
                self.tokens[self.slices[index]] = seen[place]
            seconds.lap("vision")
        return self.tokens


class _Head:
    """Means and state -> chunk."""

    def __init__(self, manifest: Contents, condition: Engine, denoise: Engine) -> None:
        head, self.steps = manifest.geometry.head, manifest.sampler.steps
        self.spec = head
        self.engines = (condition, denoise)
        numbers = manifest.normalization
        self.mean, self.std, self.low, self.high = (
            np.asarray(values, np.float32)
            for values in (numbers.state_mean, numbers.state_std, numbers.action_min, numbers.action_max)
        )
        width = (6 * head.depth + 2) * head.width
        self.modulations = np.zeros((len(self.steps), width), np.float32)
        self.coefficients = np.array(
            [[step.signal, step.noise, step.next_signal, step.next_noise] for step in self.steps], np.float32
        )
        shape = (head.horizon, head.action_dim)
        self.x = [np.zeros(shape, np.float32) for _ in range(2)]
        self.nothing = Committed(np.zeros(shape, np.float32), np.zeros(head.horizon, np.float32))

    def state(self, state: Float) -> Float:
        """[S] in units -> [1, S] normalised."""
        if np.shape(state) != self.mean.shape or not np.isfinite(state).all():
            raise ValueError(
                f"the state must be {len(self.mean)} finite numbers in the order that the bundle states, found "
                f"{np.size(state)}: {np.asarray(state)}"
            )
        normalized: Float = ((np.asarray(state, np.float32) - self.mean) / self.std)[None]
        return normalized

    def noise(self, noise: Float) -> Float:
        """Checked."""
        if np.shape(noise) != self.x[0].shape or not np.isfinite(noise).all():
            raise ValueError(f"the noise must be finite, of shape {list(self.x[0].shape)}, found {list(noise.shape)}")
        return np.ascontiguousarray(noise, np.float32)

    def condition(self, prompt_mean: Float, reasoning_mean: Float, state: Float) -> None:
        """Compute all modulations of this query."""
        inputs = {"prompt_mean": prompt_mean[None], "reasoning_mean": reasoning_mean[None], "state": state}
        self.engines[0].run(inputs, {"modulations": self.modulations})

    def sample(self, noise: Float, committed: Committed | None) -> Float:
        """Run all steps; [H, A] normalised, a fresh array."""
        held = committed or self.nothing
        prefix, mask = (np.ascontiguousarray(values, np.float32) for values in (held.prefix, held.mask))
        if prefix.shape != noise.shape or mask.shape != noise.shape[:1]:
            raise ValueError(f"a committed prefix has shape {list(noise.shape)}, found {list(prefix.shape)}")
        np.copyto(self.x[0], noise)
        for index in range(len(self.steps)):
            inputs = {
                "x": self.x[index % 2],
                "modulation": self.modulations[index : index + 1],
                "coefficients": self.coefficients[index],
                "prefix": prefix,
                "mask": mask,
            }
            self.engines[1].run(inputs, {"x_next": self.x[(index + 1) % 2]})
        return np.array(self.x[len(self.steps) % 2])

    def units(self, normalized: Float) -> Float:
        """[H, A] in [-1, 1] -> the robot's units."""
        span: Float = self.high - self.low
        chunk: Float = (normalized + np.float32(1)) / np.float32(2) * span + self.low
        return chunk
