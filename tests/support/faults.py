"""Faults planted on the way from a checkpoint to a bundle, while the reference is built from the honest checkpoint."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch

from chatvla_edge.export import exporter
from chatvla_edge.export.checkpoint.publish import write_checkpoint
from chatvla_edge.export.checkpoint.reader import Checkpoint, open_checkpoint
from chatvla_edge.export.checkpoint.synth import PRESETS, random_weights, synthetic_statistics
from chatvla_edge.export.checkpoint.tokenizer import byte_level_tokenizer
from chatvla_edge.export.spec import ReasoningSpec
from chatvla_edge.export.stages.graph import Graph
from chatvla_edge.export.stages.weights import Parameters, Read
from chatvla_edge.runtime.bundle import Bundle
from support.small_cameras import ROBOT

LANGUAGE, VISION, HEAD = "backbone.language.layers", "backbone.visual.blocks", "head.blocks"


@dataclass(frozen=True)
class Fault:
    """weights: from our parameter name and the honest reader to a tensor; spec: what the lowering believes;
    graph: a lowered stage, changed in place.
    """

    weights: Callable[[str, Read], torch.Tensor] | None = None
    spec: Callable | None = None
    graph: Callable[[Graph], None] | None = None


def scaled(parameter: str, factor: float = 1.2) -> Fault:
    return Fault(weights=lambda name, read: read(name) * factor if name == parameter else read(name))


def transposed(parameter: str) -> Fault:
    return Fault(weights=lambda name, read: read(name).T.contiguous() if name == parameter else read(name))


def rolled(parameter: str) -> Fault:
    """Its rows stand one further."""
    return Fault(weights=lambda name, read: read(name).roll(1, 0) if name == parameter else read(name))


def renamed(rename: Callable[[str], str]) -> Fault:
    return Fault(weights=lambda name, read: read(rename(name)))


def experts_rotated(count: int, layer: str = "") -> Fault:
    """Expert e stands where expert e - 1 belongs, in one layer or in all."""

    def rename(name: str) -> str:
        head, found, tail = name.partition(".mlp.routed.")
        if not found or (layer and not head.endswith(f".{layer}")):
            return name
        index, _, part = tail.partition(".")
        return f"{head}.mlp.routed.{(int(index) + 1) % count}.{part}"

    return renamed(rename)


def gate_for_up(layer: str) -> Fault:
    def rename(name: str) -> str:
        if f"{LANGUAGE}.{layer}.mlp.routed." not in name:
            return name
        return _exchanged(name, "gate_proj", "up_proj")

    return renamed(rename)


def _exchanged(name: str, one: str, other: str) -> str:
    return name.replace(one, other) if one in name else name.replace(other, one)


def believed(**changes) -> Fault:
    """The lowering works from other numbers of the language model, or of its experts, than the checkpoint's."""

    def spec(right):
        experts = {name: value for name, value in changes.items() if hasattr(right.language.experts, name)}
        sizes = {name: value for name, value in changes.items() if name not in experts}
        language = right.language.model_copy(
            update={**sizes, "experts": right.language.experts.model_copy(update=experts)}
        )
        return right.model_copy(update={"language": language})

    return Fault(spec=spec)


def sections_exchanged(layer: int) -> Fault:
    """Height and width turn each other's frequencies, in one layer."""

    def change(graph: Graph) -> None:
        nodes = [node for node in graph.nodes if node.op_type == "RotaryEmbedding"][2 * layer : 2 * layer + 2]
        for node in nodes:
            for index in (2, 3):
                right = next(other for other in graph.nodes if node.input[index] in other.output)
                time, height, width = right.input
                wrong = onnx.helper.make_node("Concat", [time, width, height], [f"wrong/{node.name}/{index}"], axis=1)
                graph.nodes.insert(graph.nodes.index(node), wrong)
                node.input[index] = wrong.output[0]

    return Fault(graph=change)


@contextmanager
def planted(fault: Fault, monkeypatch) -> Iterator[None]:
    """Exports inside carry the fault; what a reference is made of does not."""
    lower = exporter.cpu.lower
    with monkeypatch.context() as patch:
        if fault.weights is not None:
            weights = fault.weights
            patch.setattr(exporter, "Parameters", lambda read, _: Parameters(lambda name: weights(name, read)))

        def wrong(graph, spec, target):
            lowered = lower(graph, fault.spec(spec) if fault.spec else spec, target)
            if fault.graph is not None and graph.name == "language":
                fault.graph(lowered)
            return lowered

        patch.setattr(exporter.cpu, "lower", wrong)
        yield


def checkpoint(directory: Path, sharpness: float = 1, layers: int = 4, variant: str = "chatvla2-2b") -> Checkpoint:
    """That many layers of language and of the head, one less of vision; experts, fusion and head of a preset.

    sharpness: of the attention; its logits are multiplied by the square. Random weights look at all rows alike.
    """
    spec, like = PRESETS["tiny"][0], PRESETS[variant][0]
    follows = ReasoningSpec(start=layers // 2, stop=layers) if like.head.reasoning else None
    spec = spec.model_copy(
        update={
            "fusion": like.fusion,
            "vision": spec.vision.model_copy(update={"depth": layers - 1}),
            "language": spec.language.model_copy(
                update={"layers": layers, "rope_theta": 100.0, "experts": like.language.experts}
            ),
            "head": spec.head.model_copy(
                update={
                    "depth": layers,
                    "reasoning": follows,
                    "conditioning": like.head.conditioning,
                }
            ),
        }
    )
    weights = random_weights(spec, seed=0)
    sharp = re.compile(r".*self_attn\.[qk]_proj\.weight")
    write_checkpoint(
        directory,
        spec,
        PRESETS[variant][1],
        lambda name: weights(name) * (sharpness if sharp.fullmatch(name) else 1),
        dtype=torch.float32,
        statistics=synthetic_statistics(spec.head),
        tokenizer=byte_level_tokenizer(spec.tokens),
    )
    return open_checkpoint(directory)


def export(opened: Checkpoint, destination: Path, precision: str, *, cameras=("top",), **changes) -> Bundle:
    settings = exporter.Settings(
        target="cpu", precision=precision, robot=ROBOT(*cameras), max_reasoning=12, probes=1, **changes
    )
    return exporter.export(opened, destination, settings, lambda _name, _count: None)
