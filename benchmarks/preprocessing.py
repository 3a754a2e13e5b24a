"""How long one camera frame takes to become patches: ours, the reference's, and transformers' Qwen2-VL processor.

All run in one process on one thread, one call each per round in an order drawn anew, so that all meet the same machine;
a ratio is the median over rounds of the time of one over that of another in the same round. The processor runs twice
per round: its time over its own is what the machine adds to a ratio (A/A). Before that, patches are compared.

The picture is smooth with a little noise, as a camera's: only the JPEG codec's time depends on it.

    python -m chatvla_edge.benchmarks.preprocessing --quick --json out.json
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL import __version__ as pillow_version
from rich.console import Console
from rich.table import Table
from transformers import __version__ as transformers_version
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from chatvla_edge.export.model.images import PRESETS, Preprocessing, Resize, patches
from chatvla_edge.runtime.preprocessing import FOLDED, UNFOLDED, Pipeline

GOAL = 5.0
# What the processor makes of a 480 x 640 frame by default, and the path that policies use: 320 x 240 into 252 x 308.
SAME_WORK = {
    (480, 640): Preprocessing.of(Resize(height=476, width=644, filter="bicubic")),
    (240, 320): PRESETS["plain"],
}
Work = Callable[[], object]


def camera(height: int, width: int) -> NDArray[np.uint8]:
    """[height, width, 3]: slow drift and a sensor's noise."""
    rng = np.random.default_rng(0)
    drift = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return np.clip(np.asarray(drift) + rng.normal(0, 4, (height, width, 3)), 0, 255).astype(np.uint8)


def in_turns(works: dict[str, Work], rounds: int) -> dict[str, NDArray[np.float64]]:
    """Milliseconds of each call, [rounds] each."""
    names = list(works)
    took = {name: np.zeros(rounds) for name in names}
    draw = random.Random(0)  # noqa: S311
    for turn in range(-2, rounds):  # two rounds to warm up
        draw.shuffle(names)
        for name in names:
            before = perf_counter_ns()
            works[name]()
            if turn >= 0:
                took[name][turn] = (perf_counter_ns() - before) / 1e6
    return took


def spread(over: NDArray[np.float64], of: NDArray[np.float64]) -> dict[str, float]:
    """Median and quartiles of the ratio, round by round."""
    low, middle, high = np.percentile(over / of, [25, 50, 75])
    return {"p25": float(low), "p50": float(middle), "p75": float(high)}


def ours(steps: Preprocessing, frame: NDArray[np.uint8], values: int, plain: bool = False) -> Work:
    """One call of a compiled pipeline into room that is there already."""
    pipeline = Pipeline(steps.root, height=frame.shape[0], width=frame.shape[1], kernels="plain" if plain else "auto")
    out = np.empty((pipeline.n_patches, values), np.float32)
    return lambda: pipeline.run(frame, out)


def differing(steps: Preprocessing, frame: NDArray[np.uint8]) -> dict[str, int]:
    """Grey levels and patch values in which the pipeline is not the reference."""
    expected = steps(frame)
    pipeline = Pipeline(steps.root, height=frame.shape[0], width=frame.shape[1])
    out = np.empty((pipeline.n_patches, UNFOLDED), np.float32)
    pipeline.run(frame, out)
    return {
        "grey_levels": int((pipeline.picture(frame) != expected).sum()),
        "patch_values": int((out != patches(expected)[0]).sum()),
    }


def main() -> int:
    """Compare, measure, print a table and the goals, write JSON. Exit code 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="about 15 s instead of two minutes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    rounds = 25 if arguments.quick else 201
    torch.set_num_threads(1)

    processor = Qwen2VLImageProcessorPil()
    console = Console()
    table = Table("frame", "what", "p50 ms", "p99 ms", "processor / it", "quartiles")
    results: dict[str, dict[str, object]] = {}
    speed, differ = {}, 0
    for (height, width), steps in SAME_WORK.items():
        frame = camera(height, width)
        works: dict[str, Work] = {
            "processor": lambda frame=frame: processor(images=[frame], return_tensors="np"),  # type: ignore[misc]
            "processor again (A/A)": lambda frame=frame: processor(images=[frame], return_tensors="np"),  # type: ignore[misc]
            "reference": lambda frame=frame, steps=steps: patches(steps(frame)),  # type: ignore[misc]
            "ours, both slices": ours(steps, frame, UNFOLDED),
            "ours": ours(steps, frame, FOLDED),
            "ours, plain C": ours(steps, frame, FOLDED, plain=True),
        }
        took = in_turns(works, rounds)
        name = f"{width}x{height}"
        results[name] = report(table, name, took, "processor")
        speed[name] = spread(took["processor"], took["ours, both slices"])["p50"]
        differ += sum(differing(steps, frame).values())
    frame = camera(480, 640)
    for name, steps in PRESETS.items():
        took = in_turns(
            {"reference": lambda steps=steps: patches(steps(frame)), "ours": ours(steps, frame, FOLDED)},  # type: ignore[misc]
            rounds,
        )
        results[name] = report(table, f"640x480, {name}", took, "reference")
        differ += sum(differing(steps, frame).values())

    goals = [
        {
            "name": "640x480 to patches, times as fast as the Qwen2-VL processor (same output, both slices)",
            "value": speed["640x480"],
            "goal": f">= {GOAL:g}",
            "ok": speed["640x480"] >= GOAL,
        },
        {"name": "values that differ from the reference", "value": differ, "goal": "0", "ok": differ == 0},
    ]
    table.title = f"one frame to patches, one thread, {rounds} rounds, load {os.getloadavg()[0]:.1f}"
    table.caption = f"Pillow {pillow_version}, transformers {transformers_version}, torch {torch.__version__}"
    console.print(table)
    console.print("presets stand over the reference instead of the processor, which does not know their steps")
    for goal in goals:
        console.print(f"{'met ' if goal['ok'] else 'MISSED'} {goal['name']}: {goal['value']:.3g} (goal {goal['goal']})")
    if arguments.json:
        versions = {"pillow": pillow_version, "transformers": transformers_version, "torch": torch.__version__}
        result = {"ms": results, "rounds": rounds, "load": os.getloadavg()[0], "versions": versions, "goals": goals}
        arguments.json.write_text(json.dumps(result, indent=1))
    return int(not all(goal["ok"] for goal in goals))


def report(table: Table, title: str, took: dict[str, NDArray[np.float64]], baseline: str) -> dict[str, object]:
    """Rows of the table, and the same for the JSON."""
    found: dict[str, object] = {}
    for name, ms in took.items():
        against = spread(took[baseline], ms)
        p50, p99 = (float(np.percentile(ms, q)) for q in (50, 99))
        found[name] = {"p50": p50, "p99": p99, f"{baseline}_over_it": against}
        table.add_row(
            title,
            name,
            f"{p50:.2f}",
            f"{p99:.2f}",
            f"{against['p50']:.2f}",
            f"{against['p25']:.2f}-{against['p75']:.2f}",
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
