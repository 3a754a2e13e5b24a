"""The game as a judge: every variant of a checkpoint plays the same trials, and the tables of the paper come out.

Trials are paired: the same scenes, the same sensor noise as long as the arms do the same, the same diffusion noise.
A variant's trials are kept in the work folder as they are played, so a killed evaluation goes on.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.benchmarks.math_matching.closed_loop import LATENCY, RATE, Outcome, play
from chatvla_edge.benchmarks.math_matching.data import ROBOT
from chatvla_edge.benchmarks.math_matching.variants import CHANGES, VARIANTS, player
from chatvla_edge.benchmarks.report import Report
from chatvla_edge.drivers.sim.tabletop import SPLITS, Split
from chatvla_edge.export.robots import load

# Seeds of evaluation trials: training draws from 0, its tests from 10 million.
SEEDS = 20_000_000
NEAR = 0.1  # s around the arrival of a chunk


@dataclass(frozen=True)
class Trial:
    """What is kept of a trial. routing: [layers, E] visits of all its queries; later: queries after the first."""

    seed: int
    split: Split
    ocr: int
    math: int
    text: str
    text_right: bool
    picked_right: bool
    success: bool
    seconds: float
    queries: int
    tokens_later: int
    passes_later: int
    accepted_later: int
    step_near: float
    step_elsewhere: float
    routing: list[list[int]]

    @classmethod
    def of(cls, outcome: Outcome) -> "Trial":
        """From a played trial."""
        first, *later = outcome.answers
        near, elsewhere = _steps(outcome)
        return cls(
            outcome.seed,
            outcome.split,
            outcome.score.ocr,
            outcome.score.math,
            first.text,
            outcome.score.text,
            outcome.picked == outcome.truth.place,
            outcome.success,
            round(outcome.seconds, 3),
            len(outcome.answers),
            sum(len(answer.token_ids) for answer in later),
            sum(answer.passes for answer in later),
            sum(answer.accepted for answer in later),
            near,
            elsewhere,
            np.sum([answer.routing for answer in outcome.answers], axis=0).tolist(),
        )


def _steps(outcome: Outcome) -> tuple[float, float]:
    """99th percentile of |velocity step| of the joints sent, rad/s: within NEAR of a chunk's arrival, and elsewhere.

    The first chunk's approach is left out: before it there was no motion.
    """
    joints = [index for index in range(14) if index % 7 != 6]
    steps = np.abs(np.diff(outcome.sent[:, joints].astype(np.float64), 2, axis=0)) * RATE
    reach = round(NEAR * RATE)
    near = np.zeros(len(steps), bool)
    for tick in outcome.posted[1:]:
        near[max(tick - reach, 0) : tick + reach] = True
    late = np.arange(len(steps)) > outcome.posted[0] + 2 * reach if outcome.posted else near
    parts = (steps[near & late], steps[~near & late])
    first, second = (float(np.percentile(part, 99)) if part.size else 0.0 for part in parts)
    return first, second


def trials(
    name: str,
    checkpoint: Path,
    work: Path,
    count: int,
    highest: int,
    progress: Callable[[], None] = lambda: None,
) -> list[Trial]:
    """`count` trials of each split; those in the work folder are not played again."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / f"{name.replace(' ', '-')}.jsonl"
    kept = [Trial(**json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []
    done = {(trial.seed, trial.split) for trial in kept}
    size = (load(ROBOT).cameras[0].height, load(ROBOT).cameras[0].width)
    wanted = [(SEEDS + index, split) for index in range(count) for split in SPLITS]
    missing = [item for item in wanted if item not in done]
    if missing:
        plays = player(name, checkpoint, work)
        with path.open("a") as file:
            for seed, split in missing:
                trial = Trial.of(play(plays, seed, split, highest=highest, size=size))
                kept.append(trial)
                file.write(json.dumps(trial.__dict__) + "\n")
                file.flush()
                progress()
    chosen = set(wanted)
    return sorted((t for t in kept if (t.seed, t.split) in chosen), key=lambda t: (t.seed, SPLITS.index(t.split)))


def interval(hits: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate."""
    z = 1.96
    rate = hits / count
    middle = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_drop(base: Sequence[Trial], other: Sequence[Trial]) -> tuple[float, float, int, int]:
    """Success lost against the base on the same trials: mean, its standard error, trials lost, trials won."""
    if [(t.seed, t.split) for t in base] != [(t.seed, t.split) for t in other]:
        raise ValueError("the two sides did not play the same trials: there are no pairs")
    loss = np.array([float(a.success) - float(b.success) for a, b in zip(base, other, strict=True)])
    error = float(loss.std(ddof=1) / math.sqrt(len(loss))) if len(loss) > 1 else 0.0
    return float(loss.mean()), error, int((loss > 0).sum()), int((loss < 0).sum())


def same_text(base: Sequence[Trial], other: Sequence[Trial]) -> float:
    """Share of first texts that are identical."""
    return float(np.mean([a.text == b.text for a, b in zip(base, other, strict=True)]))


GATES = {"int8": (0.01, 0.98), "int4-row": (0.03, 0.80), "experts int4": (0.03, 0.80)}
"""Success lost at most, texts kept at least, against fp32 on the same trials. `int4` holds the whole model in 4 bits
and is shown without a gate: what is asked of 4 bits is asked of the experts."""
_STRICTEST = (0.03, 0.80)


def report(results: dict[str, list[Trial]]) -> Report:
    """Tables and goals of the variants that were played; fp32 must be among them."""
    base = results["fp32"]
    out = Report(title=f"Math matching: {len(base) // len(SPLITS)} trials of each split and variant, closed loop")
    out.method.append(
        f"bundle and servo plane ({RATE:g} Hz) on a virtual clock, {LATENCY} s from observation to chunk; paired "
        f"trials (seeds from {SEEDS}); success: the right card is the first one picked and lies on the board"
    )
    for name, found in results.items():
        for split in SPLITS:
            part = [trial for trial in found if trial.split == split]
            hits = sum(trial.success for trial in part)
            low, high = interval(hits, len(part))
            out.figure(f"{name}, {split}: OCR of 4", _mean(trial.ocr for trial in part), "")
            out.figure(f"{name}, {split}: math of 2", _mean(trial.math for trial in part), "")
            out.figure(f"{name}, {split}: picked the right card", _mean(t.picked_right for t in part), "")
            out.figure(f"{name}, {split}: success", hits / len(part), "")
            out.note(f"{name}, {split}: {hits} of {len(part)} succeeded, 95 % interval {low:.3f} to {high:.3f}")
    for name, found in results.items():
        if name != "fp32":
            _against(out, name, base, found)
    _traffic(out, base)
    in_domain = [trial for trial in base if trial.split == "in_domain"]
    out.goal("fp32, in domain: OCR of 4", _mean(t.ocr for t in in_domain), ">=", 3.8)
    out.goal("fp32, in domain: math of 2", _mean(t.math for t in in_domain), ">=", 1.85)
    out.goal("fp32, in domain: success", _mean(t.success for t in in_domain), ">=", 0.9)
    return out


def _mean(values: Iterable[float]) -> float:
    return float(np.mean([float(value) for value in values]))


def _against(out: Report, name: str, base: Sequence[Trial], found: Sequence[Trial]) -> None:
    """Paired with fp32; a variant with fewer trials is compared on those it has."""
    played = {(trial.seed, trial.split) for trial in found}
    mine = [trial for trial in base if (trial.seed, trial.split) in played]
    drop, error, lost, won = paired_drop(mine, found)
    same = same_text(mine, found)
    out.figure(f"{name}: success lost against fp32", drop, "")
    out.figure(f"{name}: same first text as fp32", same, "")
    out.note(f"{name}: lost {drop:+.3f} +- {error:.3f} (standard error, {len(mine)} pairs: {lost} lost, {won} won)")
    if name in GATES:
        most, least = GATES[name]
        out.goal(f"{name}: success lost", drop, "<=", most)
        out.goal(f"{name}: same text", same, ">=", least)
    elif name in CHANGES and CHANGES[name].spoilt:
        failed = drop > _STRICTEST[0] or same < _STRICTEST[1]
        out.goal(f"{name} fails the gates of int4 experts", float(failed), "==", 1.0)


def _traffic(out: Report, base: Sequence[Trial]) -> None:
    visits = np.sum([trial.routing for trial in base], axis=0, dtype=np.float64)
    for layer, row in enumerate(visits / visits.sum(axis=1, keepdims=True)):
        out.note(f"fp32, layer {layer}: share of each expert " + " ".join(f"{share:.3f}" for share in row))
    later = sum(trial.queries - 1 for trial in base)
    tokens, passes = sum(t.tokens_later for t in base), sum(t.passes_later for t in base)
    accepted = sum(t.accepted_later for t in base)
    out.figure("fp32: draft tokens accepted", accepted / max(tokens, 1), "")
    out.figure("fp32: language passes per query behind a draft", passes / max(later, 1), "")
    out.figure("fp32: tokens per query behind a draft", tokens / max(later, 1), "")
    near, elsewhere = (float(np.median([getattr(t, key) for t in base])) for key in ("step_near", "step_elsewhere"))
    if elsewhere > 0:
        out.figure("fp32: velocity steps near seams over elsewhere, p99, median of trials", near / elsewhere, "")


def contact_sheet(name: str, checkpoint: Path, work: Path, file: Path, highest: int, columns: int = 6) -> None:
    """A PNG of one trial per split, a frame every half second, with what the policy said first."""
    from PIL import Image, ImageDraw

    camera = load(ROBOT).cameras[0]
    plays = player(name, checkpoint, work)
    width, height, text = 208, 156, 30
    sheet = Image.new("RGB", (columns * width, len(SPLITS) * (height + text)), (250, 250, 248))
    draw = ImageDraw.Draw(sheet)
    for row, split in enumerate(SPLITS):
        outcome = play(
            plays,
            SEEDS,
            split,
            highest=highest,
            size=(camera.height, camera.width),
            keep_frames=lambda _time: True,
        )
        frames = outcome.frames
        chosen = np.linspace(0, len(frames) - 1, columns).round().astype(int)
        top = row * (height + text)
        verdict = "success" if outcome.success else "failed"
        draw.text((4, top + 2), f"{split.replace('_', ' ')} ({verdict}): {outcome.answers[0].text}", fill=(20, 20, 20))
        for column, index in enumerate(chosen):
            seconds, _, frame = frames[index]
            picture = Image.fromarray(_shrunk(frame, height, width))
            sheet.paste(picture, (column * width, top + text))
            draw.text((column * width + 4, top + text + 2), f"{seconds:.1f} s", fill=(255, 255, 255))
    sheet.quantize(128).save(file, optimize=True)


def _shrunk(frame: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS))


__all__ = ["GATES", "SEEDS", "VARIANTS", "Trial", "contact_sheet", "interval", "paired_drop", "report", "trials"]
