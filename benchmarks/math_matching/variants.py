"""The policies under test: one checkpoint as the reference, as bundles, and spoilt on purpose."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chatvla_edge.benchmarks.math_matching import geometry
from chatvla_edge.benchmarks.math_matching.closed_loop import Float, Player, Said
from chatvla_edge.benchmarks.math_matching.data import ROBOT
from chatvla_edge.benchmarks.math_matching.texts import INSTRUCTION
from chatvla_edge.export.checkpoint.publish import write_checkpoint
from chatvla_edge.export.checkpoint.reader import Checkpoint, open_checkpoint
from chatvla_edge.export.checkpoint.statistics import find_statistics, load_statistics
from chatvla_edge.export.exporter import Settings, export
from chatvla_edge.export.model.images import Preprocessing
from chatvla_edge.export.model.policy import Observation, ReferencePolicy
from chatvla_edge.export.quantize import BlockFormat, dequantize, quantize
from chatvla_edge.export.robots import load
from chatvla_edge.export.spec import PolicySpec
from chatvla_edge.runtime.bundle import open_bundle
from chatvla_edge.runtime.engines.onnxruntime import Threads
from chatvla_edge.runtime.policy import Policy

MAX_REASONING = 80

BUNDLES = ("fp32", "int8", "int8-row", "int4-row", "int4")
"""Precisions of the exporter: int8 and int4 hold every large matrix in blocks of 128, int8-row in rows; int4-row holds
the experts in int4 blocks and the rest as int8-row."""

Tensors = dict[str, Tensor]


def _experts(tensors: Tensors, change: Callable[[Tensor], Tensor]) -> Tensors:
    return {name: change(value) if ".routed." in name else value for name, value in tensors.items()}


def _blocks(bits: int) -> Callable[[Tensor], Tensor]:
    """Through the blocks of the quantizer and back."""
    form = BlockFormat(bits, 128)

    def change(weight: Tensor) -> Tensor:
        values = weight.float().numpy()
        return torch.from_numpy(dequantize(quantize(values, form), form, values.shape[1]))

    return change


def _two_bits(weight: Tensor) -> Tensor:
    """Blocks of 32 with a scale and an offset, four levels: the best that round-to-nearest can do with two bits."""
    blocks = weight.float().view(len(weight), -1, 32)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    step = (high - low).clamp(min=1e-12) / 3
    levels: Tensor = ((blocks - low) / step).round()
    return (levels * step + low).flatten(1)


def _rotated(tensors: Tensors) -> Tensors:
    """Every token goes to the expert after the one that its router chose."""
    return {name: value.roll(1, 0) if ".router." in name else value for name, value in tensors.items()}


def _same(spec: PolicySpec) -> PolicySpec:
    return spec


def _top_1(spec: PolicySpec) -> PolicySpec:
    experts = spec.language.experts.model_copy(update={"top_k": 1})
    return spec.model_copy(update={"language": spec.language.model_copy(update={"experts": experts})})


@dataclass(frozen=True)
class Change:
    """What is done to a checkpoint before it is exported as fp32. spoilt: it must fail the gates."""

    tensors: Callable[[Tensors], Tensors]
    spec: Callable[[PolicySpec], PolicySpec]
    spoilt: bool
    what: str


CHANGES: dict[str, Change] = {
    "experts int4": Change(lambda t: _experts(t, _blocks(4)), _same, False, "experts in int4 blocks of 128, rest fp32"),
    "experts int2": Change(lambda t: _experts(t, _two_bits), _same, True, "experts in 2 bits, blocks of 32"),
    "experts rotated": Change(_rotated, _same, True, "planted bug: expert ids off by one"),
    "top-1": Change(lambda t: t, _top_1, True, "planted bug: one expert per token instead of two"),
}

VARIANTS = ("reference", *BUNDLES, *CHANGES)


class BundlePlayer:
    """A bundle in the runtime's own policy."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        with open_bundle(path) as bundle:
            self.policy = Policy(path, bundle.manifest, Threads(1))
            self.first_step = bundle.manifest.timing.first_step
            self.dt = 1 / bundle.manifest.timing.rate_hz

    def query(self, frame: NDArray[np.uint8], state: Float, seed: int, draft: list[int]) -> Said:
        """As `closed_loop.Player` says."""
        answer = self.policy.query([frame], state, INSTRUCTION, self.policy.noise(seed), draft=draft)
        return Said(answer.text, answer.token_ids, answer.chunk, answer.routing, answer.passes, answer.accepted)


class ReferencePlayer:
    """The reference model; its noise is the runtime's, so that pairs are pairs."""

    name = "reference"

    def __init__(self, policy: ReferencePolicy) -> None:
        robot = load(ROBOT)
        self.policy, self.first_step, self.dt = policy, robot.timing.first_step, 1 / robot.timing.rate_hz

    def query(self, frame: NDArray[np.uint8], state: Float, seed: int, draft: list[int]) -> Said:
        """As `closed_loop.Player` says; the reference knows no drafts."""
        shape = (self.policy.head_spec.horizon, self.policy.head_spec.action_dim)
        noise = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))
        answer = self.policy.query(Observation([frame], state), INSTRUCTION, noise, max_tokens=MAX_REASONING)
        return Said(answer.text, answer.token_ids, answer.chunk, answer.routing, len(answer.token_ids), 0)


def player(name: str, checkpoint: Path, work: Path) -> Player:
    """A variant by name, its bundle made under `work` unless it is there."""
    if name == "reference":
        return ReferencePlayer(
            open_checkpoint(checkpoint).policy([Preprocessing(load(ROBOT).cameras[0].preprocessing)])
        )
    if name not in VARIANTS:
        raise ValueError(f"found variant {name!r}, expected one of {', '.join(VARIANTS)}")
    bundle = work / name.replace(" ", "-")
    if not bundle.is_dir():
        opened = open_checkpoint(checkpoint if name in BUNDLES else _changed(name, checkpoint, work))
        _export(opened, bundle, name if name in BUNDLES else "fp32")
    return BundlePlayer(name, bundle)


def _changed(name: str, checkpoint: Path, work: Path) -> Path:
    path = work / f"{name.replace(' ', '-')}-checkpoint"
    if not (path / "config.json").is_file():
        opened, change = open_checkpoint(checkpoint), CHANGES[name]
        model = opened.model()
        tensors = change.tensors({key: value.detach().float() for key, value in model.named_parameters()})
        numbers = find_statistics(checkpoint)
        assert numbers is not None
        write_checkpoint(
            path,
            change.spec(opened.spec),
            geometry.LAYOUT,
            tensors.__getitem__,
            dtype=torch.float32,
            statistics=load_statistics(numbers),
            tokenizer=(checkpoint / "tokenizer.json").read_text(encoding="utf-8"),
        )
    return path


def _export(checkpoint: Checkpoint, destination: Path, precision: str) -> None:
    # Trials judge these bundles, and by more than probes of made-up pictures could.
    settings = Settings("cpu", precision, load(ROBOT), max_reasoning=MAX_REASONING, gates=False)
    export(checkpoint, destination, settings, lambda _stage, _count: None)
