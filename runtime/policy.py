"""A bundle that answers queries: frames + state + instruction -> reasoning text and chunk, without torch.

Engines, buffers, filter tables and the rotary positions of the cameras are laid out once; a query allocates nothing
that grows with the model.
"""

import math
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
from chatvla_edge.runtime.reasoning import (
    LanguageModel,
    LanguageSizes,
    PromptRows,
    Reasoning,
    follow,
    follow_by_rows,
    reason,
    reread,
)

Float = NDArray[np.float32]
Int = NDArray[np.int64]
Frame = NDArray[np.uint8]


@dataclass(frozen=True)
class Committed:
    """Actions that are already on their way: prefix [H, A] normalised, mask [H] (1 committed, 0 free)."""

    prefix: Float
    mask: Float


@dataclass(frozen=True)
class ReasoningSettings:
    """Whether a query may use an earlier query's reasoning instead of making its own: the operator's trade.

    Off by default: every query reasons. Each setting is a bound, and a reasoning is used again while it keeps within
    all that are given. An instruction that changes always asks for a new one.

    every_n_queries: a reasoning serves so many queries, the one that made it included; 1 is off.
    max_age_s: the observation that it was made of is at most so much older than this query's.
    """

    every_n_queries: int | None = None
    max_age_s: float | None = None

    def __post_init__(self) -> None:
        if self.every_n_queries is not None and self.every_n_queries < 1:
            raise ValueError(
                f"every_n_queries must be at least 1 (a new reasoning always), found {self.every_n_queries}"
            )
        if self.max_age_s is not None and not 0 <= self.max_age_s < math.inf:
            raise ValueError(f"max_age_s must be a finite number of seconds, 0 or more, found {self.max_age_s}")

    def allow(self, queries: int, seconds: float) -> bool:
        """Whether a reasoning of this age, in queries and in seconds, may be used once more."""
        if self.every_n_queries is None and self.max_age_s is None:
            return False
        if self.every_n_queries is not None and queries >= self.every_n_queries:
            return False
        # An observation that is older than the reasoning's: somebody's clock is wrong, and no age is known.
        return seconds >= 0 and (self.max_age_s is None or seconds <= self.max_age_s)


@dataclass(frozen=True)
class Answer:
    """What one query returns.

    token_ids: N generated ids, end token included; normalized [H, A] in [-1, 1]; chunk [H, A] in the robot's units;
    routing [layers, E]: expert visits; seconds: per stage; passes: runs of the language stage; accepted: draft tokens
    that were confirmed. reasoning_age_queries, reasoning_age_s: how old the reasoning is that this chunk follows, 0 for
    one of this query's own.
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
    reasoning_age_queries: int
    reasoning_age_s: float
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


@dataclass
class _Kept:
    """A reasoning that later queries may use: what was asked, when it was observed, queries answered since."""

    instruction: str
    words: Reasoning
    observed_ns: int
    queries: int = 0


class Policy:
    """A loaded bundle. Not thread-safe: one query at a time."""

    def __init__(
        self, root: Path, manifest: Contents, threads: Threads, reasoning: ReasoningSettings | None = None
    ) -> None:
        geometry, stages = manifest.geometry, manifest.stages
        if manifest.target.name != "cpu":
            raise ValueError(
                f"{root}: found a bundle for {manifest.target.name}, expected one for cpu, the only target that this "
                "version has an engine for: export the checkpoint with --target cpu"
            )
        self.manifest = manifest
        self.reasoning = reasoning or ReasoningSettings()
        self._kept: _Kept | None = None
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

    def forget(self) -> None:
        """Let the next query make a reasoning of its own, e.g. when an episode begins."""
        self._kept = None

    # The stages one by one, for gates and benchmarks; each is a view or a copy of what `query` computes.

    def patches(self, frames: Sequence[Frame]) -> Mapping[str, Float]:
        """Camera -> patches [P, 588] of its frame."""
        return self._see.patches(frames)

    def image_rows(self) -> Mapping[str, slice]:
        """Camera -> its rows among the image tokens."""
        return {camera.name: rows for camera, rows in zip(self.manifest.cameras, self._see.slices, strict=True)}

    def prompt(self, instruction: str) -> PromptRows:
        """The prompt as the language stage takes it."""
        return self._prompt.rows(instruction)

    def state(self, state: Float) -> Float:
        """[S] in the robot's units -> [S] normalised."""
        return np.array(self._head.state(state)[0])

    def units(self, normalized: Float) -> Float:
        """[H, A] in [-1, 1] -> the robot's units."""
        return self._head.units(normalized)

    def follow_by_rows(self, instruction: str, image_tokens: Float, token_ids: NDArray[np.int64]) -> tuple[Float, Int]:
        """What `follow` says in its last N rows, a pass for each token as plain decoding does it: hidden, tokens."""
        return follow_by_rows(self._language, self._prompt.rows(instruction), image_tokens, token_ids)

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
        observed_ns: int | None = None,
    ) -> Answer:
        """Answer one query.

        frames: one RGB uint8 [height, width, 3] per camera, in the manifest's order; state [S] in the robot's units;
        noise [H, A]; draft: tokens to try first, e.g. the previous answer's `token_ids`. Tokens, means and chunk do
        not depend on the draft. observed_ns: host time (CLOCK_MONOTONIC) of the observation, now if not given; only
        the age of a reasoning that is used again is counted by it. Raises ValueError for inputs that do not fit the
        bundle.
        """
        observed_ns = time.monotonic_ns() if observed_ns is None else observed_ns
        seconds = self._seconds = Seconds()
        normalized_state = self._head.state(state)
        noise = self._head.noise(noise)
        image_tokens = self._see(frames, seconds)
        if instruction != self._instruction[0]:
            self._instruction = (instruction, self._prompt.rows(instruction))
        words, age = self._reason(instruction, image_tokens, draft, observed_ns)
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
            reasoning_age_queries=age[0],
            reasoning_age_s=age[1],
            seconds=seconds.spent,
        )

    def _reason(
        self, instruction: str, image_tokens: Float, draft: Sequence[int], observed_ns: int
    ) -> tuple[Reasoning, tuple[int, float]]:
        """The reasoning that this query goes by, and its age in queries and seconds."""
        kept, rows = self._kept, self._instruction[1]
        if kept is not None and kept.instruction == instruction:
            age = kept.queries + 1, (observed_ns - kept.observed_ns) / 1e9
            if self.reasoning.allow(*age):
                words = reread(self._language, rows, image_tokens, kept.words)
                kept.queries += 1
                return words, age
        prompt = self.manifest.prompt
        words = reason(
            self._language,
            rows,
            image_tokens,
            stop=prompt.tokens.stop[0],
            max_tokens=prompt.max_reasoning_tokens,
            draft=draft,
        )
        self._kept = _Kept(instruction, words, observed_ns)
        return words, (0, 0.0)


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
        self.values = vision.channels * vision.patch**2
        self.batches = {}
        for grid in engines:
            members = [index for index, camera in enumerate(self.cameras) if camera.grid == grid]
            patches = np.zeros((len(members), grid[0] * grid[1], self.values), np.float32)
            seen = np.zeros((len(members), grid[0] * grid[1] // vision.merge**2, hidden), np.float32)
            self.batches[grid] = (members, patches, seen)

    def patches(self, frames: Sequence[Frame]) -> dict[str, Float]:
        """Camera -> [P, 588], fresh arrays."""
        self._refuse_miscounted(frames)
        found = {}
        for index, (camera, frame) in enumerate(zip(self.cameras, frames, strict=True)):
            found[camera.name] = np.zeros((self.pipelines[index].n_patches, self.values), np.float32)
            self._cut(index, frame, found[camera.name])
        return found

    def _cut(self, index: int, frame: Frame, patches: Float) -> None:
        try:
            self.pipelines[index].run(frame, patches)
        except ValueError as error:
            raise ValueError(f"camera {self.cameras[index].name}: {error}") from None

    def _refuse_miscounted(self, frames: Sequence[Frame]) -> None:
        if len(frames) != len(self.cameras):
            names = ", ".join(camera.name for camera in self.cameras)
            raise ValueError(f"found {len(frames)} frames, expected {len(self.cameras)}: one each of {names}")

    def __call__(self, frames: Sequence[Frame], seconds: Seconds) -> Float:
        """[sum of image tokens, D], a view that the next query overwrites."""
        self._refuse_miscounted(frames)
        for grid, (members, patches, seen) in self.batches.items():
            for place, index in enumerate(members):
                self._cut(index, frames[index], patches[place])
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
