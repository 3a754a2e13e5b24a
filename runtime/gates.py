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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.runtime.bundle import Contents, GateResult, components
from chatvla_edge.runtime.engines.onnxruntime import Threads
from chatvla_edge.runtime.policy import Policy

Array = NDArray[Any]
Kind = Literal["lowering_parity", "quantization_error"]
Asked = tuple[Sequence[Array], Array, str, Array]
"""Frames, state, instruction, noise: see `Policy.query`."""

# What a probe file holds. The observation: `frame.CAMERA` of every camera, and
OBSERVATION = ("state", "noise", "instruction")
# What the reference hands its first stage: `patches.CAMERA` [P, 588] of every camera, and
INPUTS = ("prompt_ids", "prompt_positions", "normalized_state")
# Per kind of reference what it computes; `chunk` is `normalized` in the robot's units.
REFERENCE = (
    "image_tokens",
    "token_ids",
    "hidden",
    "routing",
    "prompt_mean",
    "reasoning_mean",
    "modulations",
    "normalized",
    "chunk",
)

# What a failed gate says of its bundle, by the first part of the gate's name.
MEANING: Mapping[str, str] = {
    "preprocessing": "this camera's patches are not the reference's: a step of its preprocessing, the pixels' mean and "
    "std, or the order of the patches",
    "vision": "image tokens of this camera are wrong though its patches are right: the vision stage",
    "cameras": "image tokens stand in another camera's place: the order of the cameras",
    "prompt": "the prompt is not the reference's: template, tokenizer, number of image tokens (ids), or rotary "
    "positions (positions)",
    "language": "hidden states are wrong though prompt and image tokens are right: the language stage (attention, "
    "rotary positions, cache, experts or their weights)",
    "tokens": "the language stage names other tokens for the reference's own text: its last norm or output matrix, or "
    "what fails with `language`",
    "routing": "rows visit other experts than in the reference: the router, or what comes before it",
    "rows": "numbers of a row depend on the rows beside it on this machine: drafts would change answers. Run without "
    "drafts, and report the processor and the version of ONNX Runtime",
    "state": "the normalised state is not the reference's: mean and std of the state, or the order of its components",
    "condition": "modulations are wrong though both means and the state are right: the condition stage",
    "denoise": "the chunk is wrong though its modulations are right: the denoise stage, or the sampler's steps",
    "units": "the chunk in units is not the reference's: the minimum and maximum of the actions",
    "parts": "a block of this stage, fed the reference's own numbers, does not compute what the reference does (for "
    "routing: chooses other experts): `verify BUNDLE --checkpoint C --bisect` names it",
    "query": "the stages pass by themselves and not in a row, where nothing else fails: what carries numbers between "
    "them, or an error that grows",
}


@dataclass(frozen=True)
class Limits:
    """Largest values that pass, per precision; each with the reason why it is that number."""

    # Relative RMS of one stage's output. fp32: sums of up to 9000 products in another order, 1e-6 seen on tiny models.
    # int8 and int4: the engine also rounds activations to int8 per block, 0.4 % of a block's largest value per product
    # and more where blocks are uneven; 2 % were seen over three layers, 5 % leaves room for depth.
    stage: float
    # The same of the language stage, where top-k turns rounding into other experts, and a peaky attention amplifies it:
    # honest int8 and int4 bundles of four layers had 2 % to 16 %, one layer with gate and up exchanged 13 % to 19 %.
    # What is gross fails here; the tight gate of these precisions is `part`.
    language: float
    # Share of rows whose arg-max differs from the reference's when fed the reference's tokens. Ties aside, fp32 has
    # none; rounded activations move a token where two logits lie close, as they do everywhere in random weights: half
    # of twelve was seen.
    tokens: float
    # Share of (row, expert) choices that differ. The router is fp32 always, but its input is not.
    routing: float
    # RMS and largest difference of normalised actions (range [-1, 1]) when the head is fed the reference's vectors, ten
    # steps long. A random head amplifies rounding at single actions, 0.2 was seen in int8; the RMS tells more.
    chunk_rms: float
    chunk_max: float
    # RMS of normalised actions of a whole query. Rounding adds up over the stages and random weights amplify it: of 25
    # queries of a tiny int8 bundle most were at 0.02 and the worst at 0.085; another scene's chunk is 0.8 away.
    query_rms: float
    # Relative RMS of what one part of a stage adds, fed the reference's own numbers (see `Part`): no error piles up
    # here. One rounding of activations or three in a row: 1.7 % was the most seen; 2 % in `condition`, never cut.
    part: float


# A patch value off by more than this is another grey level: one level is 1/255 over a std of 0.27.
GREY = 1e-3
# The same float32 arithmetic on both sides: half a unit in the last place, per operation.
FLOAT32 = 1e-6

# Of expert choices fed the reference's own hidden states: two router logits within rounding of each other may differ.
AGREEMENT = 0.995

_ROUNDED = Limits(
    stage=5e-2, language=0.25, tokens=0.5, routing=0.25, chunk_rms=5e-2, chunk_max=1.0, query_rms=0.2, part=3e-2
)
LIMITS: Mapping[str, Limits] = {
    "fp32": Limits(
        stage=1e-5, language=1e-5, tokens=0.0, routing=0.0, chunk_rms=1e-5, chunk_max=1e-4, query_rms=1e-5, part=1e-5
    ),
    "int8": _ROUNDED,
    "int4": _ROUNDED,
    # One activation scale per row instead of one per 128 values: a quarter more error where rows are even.
    "int8-row": replace(_ROUNDED, part=5e-2),
    "int4-row": replace(_ROUNDED, part=5e-2),
}


@dataclass(frozen=True)
class Measured:
    """One figure of one probe. `gated` is False where the target promises nothing of the kind."""

    name: str
    value: float
    limit: float
    gated: bool = True


def judge(
    root: Path, contents: Contents, probes: Mapping[str, Mapping[str, Array]], threads: int = 1
) -> list[GateResult]:
    """Load the stages below `root` and run all probes through all gates; one result per gate, the worst of the probes.

    probes: file name -> arrays, see `read_probe`. Limits are those of the language stage's precision. Raises ValueError
    for a probe that is not this bundle's.
    """
    policy = Policy(root, contents, Threads(threads))
    limits = LIMITS[contents.stages.language.precision]
    for name, probe in probes.items():
        _refuse_foreign(name, probe, [camera.name for camera in contents.cameras])
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


@dataclass(frozen=True)
class Part:
    """One part of a stage, fed what the reference feeds it: `language`, `layer 2`, `experts`.

    rms: of the difference over that of the reference; cosine: between the two; routing: share of expert choices that
    agree, None where nothing is routed. `limit` is that of `rms`.
    """

    stage: str
    place: str
    what: str
    rms: float
    cosine: float
    routing: float | None
    limit: float

    @property
    def diverges(self) -> bool:
        """Beyond its limit, or not a number."""
        return not self.rms <= self.limit or self.astray

    @property
    def astray(self) -> bool:
        """Rows visit other experts. The router sees the reference's own input in fp32: ties alone may differ."""
        return self.routing is not None and not self.routing >= AGREEMENT

    @property
    def name(self) -> str:
        """`language, layer 2, experts`; the router where that is what diverges."""
        return ", ".join(filter(None, (self.stage, self.place, "router" if self.astray else self.what)))


def compared(
    where: tuple[str, str, str], found: Array, expected: Array, limit: float, routing: tuple[Array, Array] | None = None
) -> Part:
    """Compare one part's output with the reference's; routing: the expert ids of both, [rows, k]."""
    rms = relative_rms(found, expected)
    cosine = float("nan")
    if np.isfinite(rms):
        a, b = (values.astype(np.float64).ravel() for values in (found, expected))
        cosine = float(a @ b / np.sqrt((a @ a) * (b @ b)))
    return Part(*where, rms, cosine, None if routing is None else 1.0 - _disagreement(*routing), limit)


def gates_of(parts: Sequence[Part]) -> list[GateResult]:
    """One gate per stage, its worst part, and one for the routing: tight in every precision, since no error adds up.

    These need the reference itself, so they are judged at export and by `verify --checkpoint`, not on the robot.
    """
    worst: dict[str, Measured] = {}
    for part in parts:
        measured = [Measured(f"parts/{part.stage.split('[')[0]}", part.rms, part.limit)]
        if part.routing is not None:
            measured.append(Measured("parts/routing", 1 - part.routing, 1 - AGREEMENT))
        for each in measured:
            before = worst.get(each.name)
            if before is None or not each.value <= before.value:
                worst[each.name] = each
    return list(_judge("lowering_parity", worst))


def meaning(result: GateResult) -> str:
    """What a failure of this gate says, and where to look."""
    return MEANING[result.name.split("/")[1]]


def _judge(kind: Kind, worst: Mapping[str, Measured]) -> Iterator[GateResult]:
    for measured in worst.values():
        finite = bool(np.isfinite(measured.value))
        verdict: Literal["passed", "failed", "reported"] = "reported"
        if kind == "lowering_parity" and measured.gated:
            verdict = "passed" if finite and measured.value <= measured.limit else "failed"
        yield GateResult(
            name=f"{kind}/{measured.name}",
            kind=kind,
            value=measured.value if finite else None,
            limit=measured.limit,
            verdict=verdict,
        )


def _refuse_foreign(name: str, probe: Mapping[str, Array], cameras: list[str]) -> None:
    kinds = ("lowering_parity", "quantization_error")
    expected = {
        *OBSERVATION,
        *INPUTS,
        *(f"{part}.{camera}" for camera in cameras for part in ("frame", "patches")),
        *(f"{kind}.{output}" for kind in kinds for output in REFERENCE),
    }
    if expected != set(probe):
        raise ValueError(
            f"{name}: a probe of another version or of other cameras: it lacks {sorted(expected - set(probe))}, and "
            f"{sorted(set(probe) - expected)} is unknown. Export the checkpoint anew"
        )


def _measure(policy: Policy, probe: Mapping[str, Array], kind: Kind, limits: Limits) -> Iterator[Measured]:
    expected = {name: probe[f"{kind}.{name}"] for name in REFERENCE}
    frames = [probe[f"frame.{camera.name}"] for camera in policy.manifest.cameras]
    instruction = probe["instruction"].tobytes().decode("utf-8")
    state, noise = probe["state"], probe["noise"]

    if kind == "lowering_parity":  # no weight has a part in these
        yield from _inputs(policy, probe, frames, instruction)
    yield from _vision(policy, policy.see(frames), expected["image_tokens"], limits)
    hidden, tokens, routing = policy.follow(instruction, expected["image_tokens"], expected["token_ids"])
    yield Measured("language", relative_rms(hidden, expected["hidden"]), limits.language)
    # Fed the reference's tokens, row i must say the token that came next in the reference's own text.
    yield Measured("tokens", _differing(tokens, expected["token_ids"]), limits.tokens)
    if routing.size:
        yield Measured("routing", _disagreement(routing, expected["routing"]), limits.routing)
    if kind == "lowering_parity":
        alone = policy.follow_by_rows(instruction, expected["image_tokens"], expected["token_ids"])
        bits = _differing(alone[0], hidden[-len(tokens) :]), _differing(alone[1], tokens)
        # Even rows by construction make this exact on the CPU (docs/decisions.md); elsewhere it is a figure.
        yield Measured("rows", max(bits), 0.0, gated=policy.manifest.target.name == "cpu")
    modulations = policy.modulations(expected["prompt_mean"], expected["reasoning_mean"], state)
    yield Measured("condition", relative_rms(modulations, expected["modulations"]), limits.stage)
    chunk = policy.denoise(expected["modulations"], noise)
    yield from _chunk("denoise", chunk, expected["normalized"], limits.chunk_rms, limits.chunk_max)
    if kind == "lowering_parity":
        yield Measured("units", relative_rms(policy.units(expected["normalized"]), expected["chunk"]), FLOAT32)
    answer = policy.query(frames, state, instruction, noise)
    same = answer.token_ids == expected["token_ids"].tolist()
    yield Measured("query/text", 0.0 if same else 1.0, 0.0 if limits.tokens == 0 else 1.0)
    if same or limits.tokens == 0:
        yield from _chunk("query", answer.normalized, expected["normalized"], limits.query_rms, limits.chunk_max)
        yield from _in_units(policy.manifest, answer.chunk, expected["chunk"], limits)


def _inputs(policy: Policy, probe: Mapping[str, Array], frames: list[Array], instruction: str) -> Iterator[Measured]:
    """What the host hands the first stages: pixels, prompt, state."""
    for camera, patches in policy.patches(frames).items():
        expected = probe[f"patches.{camera}"]
        off = float(np.mean(np.abs(patches - expected) > GREY)) if patches.shape == expected.shape else 1.0
        yield Measured(f"preprocessing/{camera}", off, 0.0)
    rows = policy.prompt(instruction)
    yield Measured("prompt/ids", _differing(rows.ids, probe["prompt_ids"]), 0.0)
    yield Measured("prompt/positions", _differing(rows.positions, probe["prompt_positions"]), 0.0)
    yield Measured("state", relative_rms(policy.state(probe["state"]), probe["normalized_state"]), FLOAT32)


def _vision(policy: Policy, found: Array, expected: Array, limits: Limits) -> Iterator[Measured]:
    """Image tokens per camera, and how many cameras' look more like another camera's."""
    places = policy.image_rows()
    for camera, rows in places.items():
        yield Measured(f"vision/{camera}", relative_rms(found[rows], expected[rows]), limits.stage)
    if len(places) > 1:
        astray = 0
        for rows in places.values():
            alike = [other for other in places.values() if other.stop - other.start == rows.stop - rows.start]
            astray += min(alike, key=lambda other: relative_rms(found[rows], expected[other])) != rows
        yield Measured("cameras", astray / len(places), 0.0)


def _in_units(manifest: Contents, found: Array, expected: Array, limits: Limits) -> Iterator[Measured]:
    """Largest error of the actions in each unit they come in; the limit is that of normalised ones, in this unit."""
    numbers = manifest.normalization
    spans = np.subtract(numbers.action_max, numbers.action_min)
    units = np.array([unit for _, unit in components(manifest.semantics.action)])
    for unit in sorted(set(units)):
        mine = units == unit
        # Normalised actions have a span of 2.
        limit = limits.chunk_max * float(spans[mine].max()) / 2
        yield Measured(
            f"query/{unit}", float(np.abs(found[:, mine].astype(np.float64) - expected[:, mine]).max()), limit
        )


def _chunk(name: str, found: Array, expected: Array, rms: float, largest: float) -> Iterator[Measured]:
    difference = found.astype(np.float64) - expected
    yield Measured(f"{name}/rms", float(np.sqrt(np.mean(difference**2))), rms)
    yield Measured(f"{name}/max", float(np.abs(difference).max()), largest)


def read_probe(data: bytes) -> dict[str, Array]:
    """The arrays of a probe file. Raises ValueError for anything that is not plain arrays."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def relative_rms(found: Array, expected: Array) -> float:
    """RMS of the difference over RMS of what was expected; infinity where there are more or fewer numbers."""
    if found.shape != expected.shape:
        return float("inf")
    difference = found.astype(np.float64) - expected
    return float(np.sqrt(np.mean(difference**2)) / np.sqrt(np.mean(expected.astype(np.float64) ** 2)))


def _differing(found: Array, expected: Array) -> float:
    """Share of values that are not the same; 1 where there are more or fewer."""
    return float(np.mean(found != expected)) if found.shape == expected.shape else 1.0


def _disagreement(found: Array, expected: Array) -> float:
    """Share of expert choices that differ; [layers, rows, k], order within a row aside."""
    if found.shape != expected.shape:
        return 1.0
    return float(np.mean(np.sort(found, axis=-1) != np.sort(expected, axis=-1)))
