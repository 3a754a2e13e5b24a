"""The tour of what stands: a checkpoint is written, inspected, upcycled and asked, all on the reference model."""

import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich import box
from rich.console import Console
from rich.table import Table

from chatvla_edge.export.checkpoint.reader import Checkpoint, open_checkpoint
from chatvla_edge.export.checkpoint.synth import PRESETS, synthesize
from chatvla_edge.export.checkpoint.upcycle import upcycle
from chatvla_edge.export.model.images import PRESETS as PREPROCESSING
from chatvla_edge.export.model.policy import Answer, Observation
from chatvla_edge.export.spec import ExpertsSpec, PolicySpec

INSTRUCTION = "Answer the question and pick the card with the correct answer."
BARS = "▁▂▃▄▅▆▇█"


def run(console: Console) -> None:
    """Run the tour in a temporary folder and print it."""
    spec, layout, _ = PRESETS["tiny"]
    dense = _dense(spec)
    with tempfile.TemporaryDirectory() as folder:
        parent, grown = Path(folder, "dense"), Path(folder, "experts")
        console.rule("1  a dense checkpoint, in the public layout")
        synthesize(parent, dense, layout)
        checkpoint = open_checkpoint(parent)
        console.print(f"{len(checkpoint.entries)} tensors, {checkpoint.nbytes / 1e6:.1f} MB, every one accounted for")

        console.rule("2  its MLPs become 8 experts, top-2, as the paper initialises them")
        upcycle(checkpoint, grown, ExpertsSpec(routed=8, top_k=2))
        experts = open_checkpoint(grown)
        console.print(f"{experts.spec.variant}: {experts.spec.language.experts.summary}, {experts.nbytes / 1e6:.1f} MB")

        console.rule("3  one query: an image, a state and an instruction go in")
        before, after = _ask(checkpoint), _ask(experts)
        seconds, answer = after
        console.print(f"instruction  {INSTRUCTION}")
        ids = " ".join(str(token) for token in answer.token_ids[:12])
        console.print(f"reasoning    {len(answer.token_ids)} tokens of noise: {ids} ...", highlight=False)
        console.print(_chart(answer))
        visits = answer.routing.sum(0)
        console.print(f"expert visits  {' '.join(str(count) for count in visits)}   {seconds:.2f} s on this CPU")

        console.rule("4  the oracle: equal experts answer as their parent does")
        same = before[1].token_ids == answer.token_ids
        distance = float(np.abs(before[1].normalized - answer.normalized).max())
        console.print(f"same tokens: {same}, largest difference of a normalised action: {distance:.1e}")
    console.print(
        "\n[bold]What was real:[/bold] the files, the strict reading, the whole arithmetic from pixels to actions in "
        "PyTorch.\n[bold]What was not:[/bold] the weights are random, so the reasoning is noise and the chunk moves "
        "nothing sensible; no robot, no engine and no export took part."
    )


def _dense(spec: PolicySpec) -> PolicySpec:
    return spec.model_copy(update={"language": spec.language.model_copy(update={"experts": ExpertsSpec()})})


def _ask(checkpoint: Checkpoint) -> tuple[float, Answer]:
    policy = checkpoint.policy([PREPROCESSING["arx"]])
    observation = Observation([_whiteboard()], np.zeros(14, np.float32))
    start = time.perf_counter()
    answer = policy.query(observation, INSTRUCTION, policy.noise(seed=0), max_tokens=24)
    return time.perf_counter() - start, answer


def _whiteboard() -> NDArray[np.uint8]:
    """A 640 x 480 picture in the spirit of the paper's game: a board, an equation, three cards."""
    image = Image.new("RGB", (640, 480), (133, 106, 78))
    draw = ImageDraw.Draw(image)
    draw.rectangle((140, 30, 500, 190), fill=(240, 240, 236), outline=(60, 60, 60), width=4)
    draw.text((250, 70), "7 + 5 =", fill=(20, 30, 120), font_size=56)
    for index, number in enumerate((12, 10, 35)):
        left = 90 + 170 * index
        draw.rectangle((left, 300, left + 110, 400), fill=(250, 250, 250), outline=(40, 40, 40), width=3)
        draw.text((left + 26, 320), str(number), fill=(150, 20, 20), font_size=48)
    return np.asarray(image)


def _chart(answer: Answer) -> Table:
    """Each action component over the horizon, as bars between its own extremes."""
    table = Table("action", "over the horizon", "first", box=box.SIMPLE, title="chunk in the robot's units")
    for index, values in enumerate(answer.chunk.T):
        low, high = float(values.min()), float(values.max())
        level = (values - low) / (high - low or 1) * (len(BARS) - 1)
        bars = "".join(BARS[round(float(height))] for height in level)
        table.add_row(str(index), bars, f"{values[0]:+.3f}")
    return table
