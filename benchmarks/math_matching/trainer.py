"""What the steps of the training share: a loop that can be killed at any time and goes on where it was saved."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from chatvla_edge.benchmarks.math_matching.muon import Optimizer, schedule

SAVE_EVERY = 50


class Step(Protocol):
    """One step of the recipe. `parameters`: what it trains; `loss`: of one batch, with figures for the log."""

    name: str
    rate: float
    other_rate: float
    constant: float
    average: float

    def parameters(self) -> dict[str, nn.Parameter]:
        """By name."""

    def loss(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """Of one batch drawn with rng."""

    def judge(self) -> dict[str, float]:
        """Figures on moments that no step trains on."""


@dataclass
class Log:
    """Lines of JSON; the committed log of a training is this file."""

    path: Path
    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))

    def write(self, step: str, at: int, figures: Mapping[str, float]) -> None:
        """One line, and a readable one on the screen."""
        line = {"step": step, "at": at, **{key: round(value, 5) for key, value in figures.items()}}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.console.print(f"{step} {at}: " + "  ".join(f"{key} {value:.4g}" for key, value in figures.items()))


def run(step: Step, steps: int, folder: Path, log: Log, judge_every: int) -> None:
    """Train a step to its end, from its state file where there is one; then put the averaged weights in place."""
    path = folder / f"{step.name}.pt"
    parameters = step.parameters()
    optimizer = Optimizer(parameters.items(), step.rate, step.other_rate)
    average = {name: value.detach().clone() for name, value in parameters.items()}
    start = 0
    if path.is_file():
        state = torch.load(path, weights_only=True)
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(state["parameters"][name])
                average[name].copy_(state["average"][name])
        optimizer.load(state["optimizer"])
        start = int(state["at"])
    seen: dict[str, list[float]] = {}
    with _bar(log.console) as bar:
        task = bar.add_task(step.name, total=steps, completed=start)
        for at in range(start, steps):
            # Each step draws from a generator of its own: a resumed run sees the batches that it would have seen.
            loss, figures = step.loss(np.random.default_rng([at, 45]))
            optimizer.zero()
            torch.autograd.backward(loss)
            optimizer.step(schedule(at, steps, step.constant))
            decay = min(step.average, (at + 1) / (at + 10))
            with torch.no_grad():
                for name, value in parameters.items():
                    average[name].lerp_(value, 1 - decay)
            for key, figure in figures.items():
                seen.setdefault(key, []).append(figure)
            bar.advance(task)
            last = at + 1 == steps
            if (at + 1) % SAVE_EVERY == 0 or last:
                save(path, _state(at + 1, parameters, average, optimizer))
                log.write(step.name, at + 1, {key: float(np.mean(values)) for key, values in seen.items()})
                seen.clear()
            if (at + 1) % judge_every == 0 and not last:
                log.write(step.name, at + 1, step.judge())
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(average[name])
    log.write(step.name, steps, step.judge())


def averaged(folder: Path, name: str) -> dict[str, Tensor]:
    """The averaged weights that a step has saved, whether it has ended or not.

    Raises ValueError when the step has not been saved yet.
    """
    path = folder / f"{name}.pt"
    if not path.is_file():
        raise ValueError(f"{path} is not there: the step {name!r} comes first")
    weights: dict[str, Tensor] = torch.load(path, weights_only=True)["average"]
    return weights


def save(path: Path, value: Any) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    torch.save(value, part)
    part.replace(path)


def batches(count: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Index batches of a shuffled pass."""
    order = rng.permutation(count)
    for first in range(0, count - size + 1, size):
        yield order[first : first + size]


def _state(
    at: int, parameters: Mapping[str, nn.Parameter], average: Mapping[str, Tensor], optimizer: Optimizer
) -> dict[str, Any]:
    return {
        "at": at,
        "parameters": {name: value.detach() for name, value in parameters.items()},
        "average": dict(average),
        "optimizer": optimizer.state(),
    }


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


Judge = Callable[[], dict[str, float]]
