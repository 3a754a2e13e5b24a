"""How long one camera frame takes to become patches: ours, the reference's, and transformers' Qwen2-VL processor.

Before anything is timed, ours is compared with the reference, value by value. Against the processor all candidates do
the same work, Qwen2-VL's own resize of one frame, and write both temporal slices as it does (with Pillow 13 its 640x480
frame has other last grey levels: docs/decisions.md 14); "one slice" is what the vision stage takes. The presets
stand over the reference, since the processor does not know their steps. One thread.

The picture is smooth with a sensor's noise: only the JPEG codec's time depends on it.

    python -m chatvla_edge.benchmarks.preprocessing --quick --json out.json
"""

import sys
from argparse import Namespace
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL import __version__ as pillow_version
from transformers import __version__ as transformers_version
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from chatvla_edge.benchmarks import script
from chatvla_edge.benchmarks.method import compare
from chatvla_edge.benchmarks.report import Report
from chatvla_edge.export.model.images import PRESETS, Preprocessing, patches
from chatvla_edge.runtime.bundle import Resize
from chatvla_edge.runtime.preprocessing import FOLDED, UNFOLDED, Pipeline

SUMMARY = "One camera frame to patches, against the Qwen2-VL processor and the reference, and to the last bit."

GOAL = 5.0

# What the processor makes of a 640x480 frame by default, and the path that policies use: 320x240 into 308x252.
SAME_WORK = {
    (480, 640): Preprocessing.of(Resize(height=476, width=644, filter="bicubic")),
    (240, 320): PRESETS["plain"],
}

Work = Callable[[], object]


def camera(height: int, width: int) -> NDArray[np.uint8]:
    """[height, width, 3]: slow drift and a sensor's noise."""
    rng = np.random.default_rng(0)
    corners = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    drift = np.asarray(corners.resize((width, height), Image.Resampling.BICUBIC))
    noisy: NDArray[np.uint8] = np.clip(drift + rng.normal(0, 4, drift.shape), 0, 255).astype(np.uint8)
    return noisy


def processors(frame: NDArray[np.uint8]) -> Work:
    """One call of transformers' processor."""
    processor = Qwen2VLImageProcessorPil()
    return lambda: processor(images=[frame], return_tensors="np")


def references(steps: Preprocessing, frame: NDArray[np.uint8]) -> Work:
    """One call of the reference."""
    return lambda: patches(steps(frame))


def ours(steps: Preprocessing, frame: NDArray[np.uint8], values: int, plain: bool = False) -> Work:
    """One call of a compiled pipeline, into room that is there already."""
    pipeline = Pipeline(steps.root, height=frame.shape[0], width=frame.shape[1], kernels="plain" if plain else "auto")
    out = np.empty((pipeline.n_patches, values), np.float32)
    return lambda: pipeline.run(frame, out)


def differing(steps: Preprocessing, frame: NDArray[np.uint8]) -> int:
    """Grey levels before the cut, and values in the patches, in which the pipeline is not the reference."""
    expected = steps(frame)
    pipeline = Pipeline(steps.root, height=frame.shape[0], width=frame.shape[1])
    out = np.empty((pipeline.n_patches, UNFOLDED), np.float32)
    pipeline.run(frame, out)
    return int((pipeline.picture(frame) != expected).sum() + (out != patches(expected)[0]).sum())


def run(options: Namespace) -> Report:
    """Compare the numbers, then the times."""
    torch.set_num_threads(1)
    seconds = 0.7 if options.quick else 5.0
    report = Report(title="One camera frame to the patches of the vision tower")
    speedup = 0.0
    for (height, width), steps in SAME_WORK.items():
        frame, size = camera(height, width), f"{width}x{height}"
        timed = compare(
            {
                f"{size}, processor": processors(frame),
                f"{size}, reference": references(steps, frame),
                f"{size}, ours": ours(steps, frame, UNFOLDED),
                f"{size}, ours, one slice": ours(steps, frame, FOLDED),
                f"{size}, ours, one slice, plain C": ours(steps, frame, FOLDED, plain=True),
            },
            seconds=seconds,
        )
        report.add(timed)
        faster = timed.speedup(f"{size}, ours")
        report.note(f"{size}: {faster.text} as fast as the processor, both slices written.")
        if (height, width) == (480, 640):
            speedup = faster.value
    frame = camera(480, 640)
    for name, steps in PRESETS.items():
        timed = compare(
            {f"{name}, reference": references(steps, frame), f"{name}, ours": ours(steps, frame, FOLDED)},
            seconds=seconds,
        )
        report.add(timed)
    report.goal("640x480 to patches, times as fast as the Qwen2-VL processor", speedup, ">=", GOAL, unit="x")
    everything = [
        *((steps, camera(*size)) for size, steps in SAME_WORK.items()),
        *((s, frame) for s in PRESETS.values()),
    ]
    report.goal(
        "values that differ from the reference", sum(differing(steps, one) for steps, one in everything), "==", 0
    )
    report.note(
        f"Presets take a 640x480 frame and write one slice. Pillow {pillow_version}, transformers "
        f"{transformers_version}, torch {torch.__version__}, one thread."
    )
    return report


if __name__ == "__main__":
    sys.exit(script.main(__file__))
