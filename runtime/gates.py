"""Does a bundle compute what its checkpoint computes? Probes answer, with numpy alone: at export, after a build on the
robot, and whenever an engineer asks.

A probe is an observation with the reference's outputs of every stage. Each stage is fed the *reference's* inputs, so
an error is found in the stage that makes it; then the whole query runs, and is compared at its end.

Two kinds of gate, never mixed. `lowering_parity` compares with the reference over the weights the engine really holds
(dequantized): it finds wrong arithmetic, on any checkpoint, and is tight. `quantization_error` compares with the
weights as trained: it means something on a trained checkpoint only, and is reported, not gated, until one says so.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.runtime.bundle import Contents, GateResult
from chatvla_edge.runtime.engines.onnxruntime import Threads
from chatvla_edge.runtime.policy import Policy

Array = NDArray[Any]
Kind = Literal["lowering_parity", "quantization_error"]
Asked = tuple[Sequence[Array], Array, str, Array]
"""Frames, state, instruction, noise: see `Policy.query`."""

# What a probe file holds: the observation, and per kind of reference its outputs.
OBSERVATION = ("state", "noise", "instruction")
REFERENCE = (
    "image_tokens",
    "token_ids",
    "hidden",
    "routing",
    "prompt_mean",
    "reasoning_mean",
    "modulations",
    "normalized",
)


@dataclass(frozen=True)
class Limits:
    """Largest values that pass, per precision; each with the reason why it is that number."""

    # Relative RMS of one stage's output. fp32: sums of up to 9000 products in another order, 1e-6 seen on tiny models.
    # int8 and int4: the engine also rounds activations to int8 per block, 0.4 % of a block's largest value per product
    # and more where blocks are uneven; 2 % were seen over three layers, 5 % leaves room for depth.
    stage: float
    # Share of rows whose arg-max differs from the reference's when fed the reference's tokens. Ties aside, fp32 has
    # none; rounded activations move a token where two logits lie close, as they do everywhere in random weights.
    tokens: float
    # Share of (row, expert) choices that differ. The router is fp32 always, but its input is not.
    routing: float
    # RMS and largest difference of normalised actions (range [-1, 1]) when the head is fed the reference's vectors, ten
    # steps long. A random head amplifies rounding at single actions, 0.2 was seen in int8; the RMS tells more.
    chunk_rms: float
    chunk_max: float


LIMITS: Mapping[str, Limits] = {
    "fp32": Limits(stage=1e-5, tokens=0.0, routing=0.0, chunk_rms=1e-5, chunk_max=1e-4),
    "int8": Limits(stage=5e-2, tokens=0.25, routing=0.25, chunk_rms=5e-2, chunk_max=1.0),
    "int4": Limits(stage=5e-2, tokens=0.25, routing=0.25, chunk_rms=5e-2, chunk_max=1.0),
}


@dataclass(frozen=True)
class Measured:
    """One figure of one probe."""

    name: str
    value: float
    limit: float


def judge(
    root: Path, contents: Contents, probes: Mapping[str, Mapping[str, Array]], threads: int = 1
) -> list[GateResult]:
    """Load the stages below `root` and run all probes through all gates; one result per gate, the worst of the probes.

    probes: file name -> arrays, see `read_probe`. Limits are those of the language stage's precision.
    """
    policy = Policy(root, contents, Threads(threads))
    limits = LIMITS[contents.stages.language.precision]
    results: list[GateResult] = []
    kinds: tuple[Kind, ...] = ("lowering_parity", "quantization_error")
    for kind in kinds:
        worst: dict[str, Measured] = {}
        for probe in probes.values():
            for measured in _measure(policy, probe, kind, limits):
                before = worst.get(measured.name)
                if before is None or not measured.value <= before.value:  # NaN is worse than anything
                    worst[measured.name] = measured
        results.extend(_judge(kind, worst))
    return results


def spoken(root: Path, contents: Contents, asked: Sequence[Asked], threads: int = 1) -> list[list[int]]:
    """Token ids that the stages below `root` answer with: drafts for the reference, which then takes fewer passes."""
    policy = Policy(root, contents, Threads(threads))
    return [policy.query(*observation).token_ids for observation in asked]


def _judge(kind: Kind, worst: Mapping[str, Measured]) -> Iterator[GateResult]:
    for measured in worst.values():
        finite = bool(np.isfinite(measured.value))
        verdict: Literal["passed", "failed", "reported"] = "reported"
        if kind == "lowering_parity":
            verdict = "passed" if finite and measured.value <= measured.limit else "failed"
        yield GateResult(
            name=f"{kind}/{measured.name}",
            kind=kind,
            value=measured.value if finite else None,
            limit=measured.limit,
            verdict=verdict,
        )


def _measure(policy: Policy, probe: Mapping[str, Array], kind: Kind, limits: Limits) -> Iterator[Measured]:
    expected = {name: probe[f"{kind}.{name}"] for name in REFERENCE}
    frames = [probe[f"frame_{index}"] for index in range(len(policy.manifest.cameras))]
    instruction = probe["instruction"].tobytes().decode("utf-8")
    state, noise = probe["state"], probe["noise"]

    yield Measured("vision", relative_rms(policy.see(frames), expected["image_tokens"]), limits.stage)
    hidden, tokens, routing = policy.follow(instruction, expected["image_tokens"], expected["token_ids"])
    yield Measured("language", relative_rms(hidden, expected["hidden"]), limits.stage)
    # Fed the reference's tokens, row i must say the token that came next in the reference's own text.
    yield Measured("tokens", float(np.mean(tokens != expected["token_ids"])), limits.tokens)
    if routing.size:
        yield Measured("routing", _disagreement(routing, expected["routing"]), limits.routing)
    modulations = policy.modulations(expected["prompt_mean"], expected["reasoning_mean"], state)
    yield Measured("condition", relative_rms(modulations, expected["modulations"]), limits.stage)
    chunk = policy.denoise(expected["modulations"], noise)
    yield from _chunk("denoise", chunk, expected["normalized"], limits)
    answer = policy.query(frames, state, instruction, noise)
    same = answer.token_ids == expected["token_ids"].tolist()
    yield Measured("query/text", 0.0 if same else 1.0, 0.0 if limits.tokens == 0 else 1.0)
    if same or limits.tokens == 0:
        yield from _chunk("query", answer.normalized, expected["normalized"], limits)


def _chunk(name: str, found: Array, expected: Array, limits: Limits) -> Iterator[Measured]:
    difference = found.astype(np.float64) - expected
    yield Measured(f"{name}/rms", float(np.sqrt(np.mean(difference**2))), limits.chunk_rms)
    yield Measured(f"{name}/max", float(np.abs(difference).max()), limits.chunk_max)


def read_probe(data: bytes) -> dict[str, Array]:
    """The arrays of a probe file. Raises ValueError for anything that is not plain arrays."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def relative_rms(found: Array, expected: Array) -> float:
    """RMS of the difference over RMS of what was expected."""
    difference = found.astype(np.float64) - expected
    return float(np.sqrt(np.mean(difference**2)) / np.sqrt(np.mean(expected.astype(np.float64) ** 2)))


def _disagreement(found: Array, expected: Array) -> float:
    """Share of expert choices that differ; [layers, rows, k], order within a row aside."""
    return float(np.mean(np.sort(found, axis=-1) != np.sort(expected, axis=-1)))
