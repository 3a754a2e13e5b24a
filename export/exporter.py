"""Checkpoint -> bundle: lay out the stages, lower them, stream their weights, judge them by probes, put them in place.

Everything that can be refused is refused before the first byte is written: layout and lowering take milliseconds, and a
target that cannot run what it would get says so then. What takes longer is done in steps, each finished for good: an
export that was interrupted goes on where it stopped (`ResumableWriter`).
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import helper
from pydantic import BaseModel
from torch import Tensor

from chatvla_edge.export import identity, room
from chatvla_edge.export.bisect import bisect
from chatvla_edge.export.checkpoint.reader import Checkpoint
from chatvla_edge.export.checkpoint.tokenizer import find_tokenizer
from chatvla_edge.export.lower import cuda
from chatvla_edge.export.lower import onnxruntime as cpu
from chatvla_edge.export.model import ddim
from chatvla_edge.export.model.images import MEAN, STD, Preprocessing
from chatvla_edge.export.model.prompt import SYSTEM
from chatvla_edge.export.probes import INSTRUCTION, observation, probe_file, reference, rounding, scenes
from chatvla_edge.export.quantize import Precision
from chatvla_edge.export.robots import Robot
from chatvla_edge.export.spec import HeadSpec
from chatvla_edge.export.stages.denoise import condition, denoise
from chatvla_edge.export.stages.graph import Graph, Port
from chatvla_edge.export.stages.language import language
from chatvla_edge.export.stages.vision import vision
from chatvla_edge.export.stages.weights import Parameters
from chatvla_edge.export.streaming import streamed
from chatvla_edge.runtime import bundle as b
from chatvla_edge.runtime.gates import Part, gates_of, judge, meaning, read_probe, spoken

TEMPLATE = (
    f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
    "{images}{instruction}<|im_end|>\n<|im_start|>assistant\n"
)
# Room for an instruction, in multiples of the family's usual one: 13 tokens in Qwen2's vocabulary.
INSTRUCTION_LENGTHS = 4
MAX_REASONING = 256
TOKENIZER, PARITY = "tokenizer.json", "parity.json"

LOWERINGS = {"cpu": cpu, "cuda": cuda}

Progress = Callable[[str, int], None]
"""Stage (or READING: the checkpoint, REFERENCE: weights that it multiplied with), bytes of it done just now."""
READING, REFERENCE = "checkpoint", "reference"
Say = Callable[[str], None]
"""A sentence for the user."""


@dataclass(frozen=True)
class Settings:
    """What the user chooses. capacity 0: as much as prompt, instruction and reasoning need."""

    target: str
    precision: str
    robot: Robot
    task: str | None = None
    max_reasoning: int = MAX_REASONING
    capacity: int = 0
    probes: int = 2
    gates: bool = True
    allow_failed_gates: bool = False
    threads: int = 1


class GateError(ValueError):
    """Gates failed, and the export was not told to go on."""


@dataclass(frozen=True)
class Plan:
    """Lowered stages, laid out but not written."""

    graphs: tuple[Graph, ...]
    capacity: int
    form: Precision


def plan(checkpoint: Checkpoint, settings: Settings) -> Plan:
    """Lay out and lower everything, in a blink. Raises ValueError for whatever the target cannot run."""
    spec = checkpoint.spec
    if spec.head is None:
        raise ValueError(f"{checkpoint.path} has no action head: a robot could do nothing with it")
    if settings.target not in LOWERINGS:
        expected = " or ".join(LOWERINGS)
        raise ValueError(f"found target {settings.target!r}, expected {expected}: the others are not built yet")
    if settings.target == "cuda":
        cuda.require(spec, settings.precision)
        if settings.gates:
            raise ValueError(
                "the gates of a cuda bundle take a machine with CUDA, and an engine for it that this version does not "
                "have: export with --no-gates, knowing that nothing shows that the bundle computes its checkpoint"
            )
    checkpoint.normalization(settings.task)
    _fits(settings.robot, spec.head)
    cameras = settings.robot.cameras
    capacity = settings.capacity or _capacity(checkpoint, cameras, settings.max_reasoning)
    target = cpu.Target(settings.precision, capacity)
    parameters = Parameters(checkpoint.tensor, lambda name: checkpoint.entries[name].dtype)
    grids = sorted({camera.grid for camera in cameras})
    graphs = [
        *(vision(spec, parameters, grid) for grid in grids),
        language(spec, parameters),
        condition(spec, parameters),
        denoise(spec, parameters),
    ]
    lowering = LOWERINGS[settings.target]
    return Plan(tuple(lowering.lower(graph, spec, target) for graph in graphs), capacity, target.form)


def export(
    checkpoint: Checkpoint,
    destination: Path,
    settings: Settings,
    progress: Progress,
    say: Say = lambda _line: None,
) -> b.Bundle:
    """Write a bundle. Raises ValueError, in seconds, for what the target cannot run; GateError after the probes.

    Interrupted, it keeps the steps that were finished and says so; the next call with the same checkpoint and settings
    goes on from there.
    """
    planned = plan(checkpoint, settings)
    with b.ResumableWriter(destination) as writer:
        kept = sum(step.bytes for step in writer.finished.values())
        room.require(planned.graphs, checkpoint, settings.gates, writer.destination, kept)
        try:
            return _write(checkpoint, settings, planned, writer, progress, say)
        except BaseException:
            say(_kept(writer))
            raise


def _write(
    checkpoint: Checkpoint,
    settings: Settings,
    planned: Plan,
    writer: b.ResumableWriter,
    progress: Progress,
    say: Say,
) -> b.Bundle:
    stamp = identity.stamp(checkpoint)
    digest = identity.checkpoint_digest(checkpoint, partial(progress, READING))
    common: dict[str, object] = {
        "checkpoint": digest,
        "spec": checkpoint.spec.model_dump(mode="json"),
        "robot": settings.robot.model_dump(mode="json"),
        "target": settings.target,
        "precision": settings.precision,
        "tools": identity.tools(),
        "source": identity.source_digest(),
    }
    for graph in planned.graphs:
        key = identity.key(common, graph.digest())
        if writer.take_over(graph.name, key, partial(progress, graph.name)):
            say(f"{graph.name}: finished earlier, verified")
            continue
        with writer.step(graph.name, key):
            graph.write(_file(graph), writer.create, partial(progress, graph.name))
            identity.require_unchanged(checkpoint, stamp)
    tokenizer = find_tokenizer(checkpoint.path).read_bytes()
    writer.add(TOKENIZER, tokenizer)
    contents = _contents(checkpoint, settings, planned, digest)
    if settings.gates:
        common |= {
            "tokenizer": hashlib.sha256(tokenizer).hexdigest(),
            "normalization": contents.normalization.model_dump(mode="json"),
            "max_reasoning": settings.max_reasoning,
        }
        probes = _probes(checkpoint, settings, planned, contents, writer, common, progress, say)
        identity.require_unchanged(checkpoint, stamp)
        room.give_back()
        arrays = {name: read_probe((writer.directory / name).read_bytes()) for name in probes}
        say("judging the engines by the reference (probes) ...")
        results = judge(writer.directory, contents, arrays, settings.threads)
        parts = _parts(checkpoint, settings, planned, contents, writer.directory, arrays[probes[0]])
        contents = _judged(contents, [*results, *gates_of(parts)], parts, probes, settings)
    writer.add(PARITY, _json(contents.gates))
    return writer.commit(contents)


def _probes(
    checkpoint: Checkpoint,
    settings: Settings,
    planned: Plan,
    contents: b.Contents,
    writer: b.ResumableWriter,
    common: dict[str, object],
    progress: Progress,
    say: Say,
) -> list[str]:
    """The probe files: observations, and what the reference makes of them."""
    names = [f"probes/{index}.npz" for index in range(settings.probes)]
    todo = {}
    for index, name in enumerate(names):
        key = identity.key(common, name)
        if writer.take_over(name, key):
            say(f"{name}: finished earlier, verified")
        else:
            todo[index] = key
    if not todo:
        return names
    head, cameras = checkpoint.spec.head, settings.robot.cameras
    assert head is not None
    say("running the reference over the probes ...")
    prompt, normalization = checkpoint.prompt(), checkpoint.normalization(settings.task)
    preprocessing = [Preprocessing(camera.preprocessing) for camera in cameras]
    named = {camera.name: steps for camera, steps in zip(cameras, preprocessing, strict=True)}
    sizes = [(camera.height, camera.width) for camera in cameras]
    seen = scenes(settings.probes, sizes, normalization, head.horizon)
    asked = [(seen[index].frames, seen[index].state, seen[index].instruction, seen[index].noise) for index in todo]
    drafts = spoken(writer.directory, contents, asked, settings.threads)
    room.give_back()

    def read(name: str) -> Tensor:
        tensor = checkpoint.tensor(name)
        progress(REFERENCE, tensor.nbytes)
        return tensor

    held = streamed(checkpoint.spec, read, rounding(planned.form))
    model = streamed(checkpoint.spec, read) if planned.form.quantizes else held
    for (index, key), draft in zip(todo.items(), drafts, strict=True):
        given = (prompt, preprocessing, normalization, seen[index], settings.max_reasoning)
        outputs = {"lowering_parity": reference(held, *given, draft)}
        draft = outputs["lowering_parity"]["token_ids"].tolist()
        outputs["quantization_error"] = outputs["lowering_parity"] if model is held else reference(model, *given, draft)
        with writer.step(names[index], key):
            observed = observation(checkpoint.spec, named, prompt, normalization, seen[index])
            writer.add(names[index], probe_file(observed, outputs))
    return names


def _parts(
    checkpoint: Checkpoint,
    settings: Settings,
    planned: Plan,
    contents: b.Contents,
    directory: Path,
    probe: Mapping[str, NDArray[np.generic]],
) -> list[Part]:
    """Every part of every stage by itself, beside the reference, on the observation of a probe."""
    room.give_back()
    held = streamed(checkpoint.spec, checkpoint.tensor, rounding(planned.form))
    # What the reference said there is the draft of what it will say again.
    observed = {**probe, "draft": probe["lowering_parity.token_ids"]}
    return bisect(directory, contents, held, observed, settings.threads)


def _kept(writer: b.ResumableWriter) -> str:
    """What an export that did not finish leaves behind."""
    steps = writer.finished
    if not steps:
        return "stopped: no step was finished, nothing is kept"
    size = sum(step.bytes for step in steps.values())
    return (
        f"stopped: {', '.join(steps)} ({size:,} bytes) finished and kept in {writer.directory}; the same call goes on "
        "from there. Remove that directory to give them up"
    )


def _fits(robot: Robot, head: HeadSpec) -> None:
    """Refuse a description of another robot than the head was trained for."""
    sizes = (("action", robot.semantics.action, head.action_dim), ("state", robot.semantics.state, head.state_dim))
    for side, parts, expected in sizes:
        if (found := len(b.components(parts))) != expected:
            raise ValueError(
                f"the robot description states an {side} of {found} numbers, the checkpoint's head has {expected}: it "
                "describes another robot. Choose the description that the training data came from (--robot)"
            )


def _judged(
    contents: b.Contents,
    results: Sequence[b.GateResult],
    parts: Sequence[Part],
    probes: list[str],
    settings: Settings,
) -> b.Contents:
    failed = [result for result in results if result.verdict == "failed"]
    if failed and not settings.allow_failed_gates:
        lines = "; ".join(
            f"{result.name}: {result.value} (limit {result.limit}), {meaning(result)}" for result in failed
        )
        first = next((f"The first part to diverge: {part.name}. " for part in parts if part.diverges), "")
        raise GateError(
            f"the engines do not compute what the checkpoint computes: {lines}. {first}No bundle was written. Choose a "
            "higher precision, or --allow-failed-gates to write the bundle with these failures in its manifest"
        )
    gates = b.Gates(results=tuple(results), allowed_failed_gates=tuple(result.name for result in failed))
    return contents.model_copy(update={"gates": gates, "probes": tuple(probes)})


def _capacity(checkpoint: Checkpoint, cameras: Sequence[b.Camera], max_reasoning: int) -> int:
    merge = checkpoint.spec.vision.merge
    images = sum(2 + camera.grid[0] * camera.grid[1] // merge**2 for camera in cameras)
    words = len(checkpoint.prompt().ids([], " ".join([INSTRUCTION] * INSTRUCTION_LENGTHS)))
    rows = images + words + max_reasoning + 2  # one row of padding, and an even number
    return -(-rows // 16) * 16


def _file(graph: Graph) -> str:
    return f"stages/{graph.name}.onnx"


def _json(value: BaseModel) -> bytes:
    return (value.model_dump_json(indent=2) + "\n").encode()


# ------------------------------------------------------------------------------------------------------ the manifest


def _contents(checkpoint: Checkpoint, settings: Settings, planned: Plan, digest: str) -> b.Contents:
    spec, robot = checkpoint.spec, settings.robot
    head, tokens = spec.head, spec.tokens
    assert head is not None
    normalization = checkpoint.normalization(settings.task)
    capacity = planned.capacity
    by_name = {graph.name: graph for graph in planned.graphs}
    visions = [(grid, by_name[f"vision_{grid[0]}x{grid[1]}"]) for grid in sorted({c.grid for c in robot.cameras})]
    dump = spec.model_dump()
    tools = identity.tools()
    dims = {
        "T": (2, 2, capacity),
        "I": (0, 99, capacity),
        "n": (2, 2, capacity),
        "N": (1, 1, len(robot.cameras)),
    }
    layers = range(spec.language.layers)
    names = [f"{kind}_{layer}" for layer in layers for kind in ("key", "value")]

    def stage(graph: Graph) -> dict[str, object]:
        def tensors(ports: Sequence[Port]) -> tuple[b.Tensor, ...]:
            return tuple(_tensor(port, capacity) for port in ports)

        inputs, outputs = tensors(graph.inputs), tensors(graph.outputs)
        symbols = {axis for tensor in (*inputs, *outputs) for axis in tensor.shape if isinstance(axis, str)}
        return {
            "file": _file(graph),
            "data": (f"{_file(graph)}.data",),
            "precision": settings.precision,
            "inputs": inputs,
            "outputs": outputs,
            "dims": {
                name: b.Extent(min=low, typical=typical, max=high)
                for name, (low, typical, high) in dims.items()
                if name in symbols
            },
        }

    return b.Contents(
        geometry=b.Geometry.model_validate(
            {
                "vision": dump["vision"],
                "language": dump["language"],
                "fusion": dump["fusion"],
                "head": dump["head"],
            }
        ),
        semantics=robot.semantics,
        timing=robot.timing,
        normalization=b.Normalization(
            state_mean=tuple(map(float, normalization.state_mean)),
            state_std=tuple(map(float, normalization.state_std)),
            action_min=tuple(map(float, normalization.action_min)),
            action_max=tuple(map(float, normalization.action_max)),
        ),
        cameras=robot.cameras,
        pixels=b.Pixels(mean=_triple(MEAN), std=_triple(STD)),
        sampler=b.Sampler(
            kind="ddim",
            train_steps=spec.sampler.train_steps,
            clip=1.0,
            steps=tuple(
                b.SamplerStep(
                    timestep=at.timestep,
                    signal=at.signal,
                    noise=at.noise,
                    next_signal=at.next_signal,
                    next_noise=at.next_noise,
                )
                for at in ddim.steps(spec.sampler)
            ),
        ),
        prompt=b.Prompt(
            template=TEMPLATE,
            tokens=b.Tokens(**tokens.model_dump(), stop=(tokens.im_end,)),
            max_reasoning_tokens=settings.max_reasoning,
        ),
        target=b.Target.model_validate(
            {
                "name": settings.target,
                "engine": b.Engine(
                    kind="onnxruntime", lowered_with=_numbers(tools["onnxruntime"]), at_least="1.22", below=None
                ),
                "sm": (),
                "jetpack": None,
            }
        ),
        stages=b.Stages(
            vision=tuple(b.VisionStage.model_validate({**stage(graph), "grid": grid}) for grid, graph in visions),
            language=b.LanguageStage.model_validate(
                {
                    **stage(by_name["language"]),
                    "kv": b.KvCache(
                        capacity=capacity,
                        dtype=_tensor(by_name["language"].inputs[-1], capacity).dtype,
                        sharing="in_place",
                        past=tuple(f"past_{name}" for name in names),
                        present=tuple(f"present_{name}" for name in names),
                    ),
                    "embeddings": None,
                }
            ),
            condition=b.Stage.model_validate(stage(by_name["condition"])),
            denoise=b.Stage.model_validate(stage(by_name["denoise"])),
        ),
        tokenizer=TOKENIZER,
        parity=PARITY,
        probes=(),
        plugin=(),
        documents=(),
        gates=b.Gates(results=(), allowed_failed_gates=()),
        provenance=b.Provenance(
            checkpoint_sha256=digest,
            checkpoint_name=checkpoint.path.name,
            variant=spec.variant,
            tools=tools,
            calibration=None,
            created=None,
        ),
    )


def _tensor(port: Port, capacity: int) -> b.Tensor:
    dtype = str(helper.tensor_dtype_to_np_dtype(port.dtype))
    shape = tuple(capacity if axis == "C" else axis for axis in port.shape)
    return b.Tensor.model_validate({"name": port.name, "dtype": dtype, "shape": shape})


def _triple(values: Iterable[float]) -> tuple[float, float, float]:
    first, second, third = map(float, values)
    return first, second, third


def _numbers(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:3])
