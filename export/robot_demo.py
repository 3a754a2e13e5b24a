"""The main job once, whole: a checkpoint is exported, a robot is driven by it, and the session is reported on.

Everything goes through the commands that a user has, each in its own process, as on a real robot.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from chatvla_edge.export import nano
from chatvla_edge.export.checkpoint.statistics import load_statistics
from chatvla_edge.export.checkpoint.synth import PRESETS, synthesize
from chatvla_edge.export.demo import INSTRUCTION

CALM = ([0.2, 0.7, 0.7, 0.2, 0.2, 0.2, 0.05] * 2, ([0.1] * 6 + [0.02]) * 2)  # a pose of both arms, and how far from it


@dataclass(frozen=True)
class Case:
    """What is shown: a checkpoint, the robot it speaks of, the rig that stands for it."""

    checkpoint: Path
    robot: str
    rig: str
    instruction: str
    words: str


def case(folder: Path) -> Case:
    """The trained checkpoint of this repository and its game; where it is not there, random weights that stay calm."""
    try:
        words = "the small policy that this repository ships, trained on the game; its weights are real"
        return Case(nano.checkpoint(), "sim_arx_r5_bimanual", "tabletop", INSTRUCTION, words)
    except ValueError:
        pass  # not in this installation
    checkpoint = folder / "checkpoint"
    spec, layout, _ = PRESETS["tiny"]
    synthesize(checkpoint, spec, layout)
    pose, span = (np.array(values, np.float32) for values in CALM)
    known = load_statistics(checkpoint / "dataset_stats.json")
    calm = replace(known, action_min=pose - span, action_max=pose + span)
    (checkpoint / "dataset_stats.json").write_text(calm.to_json())
    words = "random weights: the reasoning is noise, and the actions are kept within 0.1 rad of a pose"
    return Case(checkpoint, "arx_r5_bimanual", "sim_arx_r5_bimanual", INSTRUCTION, words)


def run(console: Console, folder: Path, seconds: float) -> None:
    """Export, drive, report. Raises ValueError where one of the commands failed."""
    named, number = folder, 1
    while folder.exists() and any(folder.iterdir()):  # an earlier demo stays as it is
        number += 1
        folder = named.with_name(f"{named.name}-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    shown = case(folder)
    bundle, session = folder / "bundle", folder / "session"
    console.rule("1  the checkpoint becomes a bundle for the CPU")
    _command("export", shown.checkpoint, "-o", bundle, "--target", "cpu", "--precision", "int8", "--robot", shown.robot)
    console.rule(f"2  {seconds:g} s on the simulated rig {shown.rig}")
    arguments: list[object] = ["run", shown.rig, "--bundle", bundle, "--folder", session, "--arm"]
    _command(*arguments, "--duration", seconds, "--instruction", shown.instruction)
    console.rule("3  the session as one page")
    _command("report", session)
    summary = json.loads((session / "summary.json").read_text())
    said = summary["policy"]["text"] or "(no text)"
    console.print(f"instruction  {shown.instruction}\nreasoning    {said}", highlight=False)
    console.print(
        f"\n[bold]What was real:[/bold] {shown.words}; the export, its gates, the engines, the daemon with all of its "
        "processes, its clocks and its limits, the log.\n[bold]What was simulated:[/bold] arms, grippers and camera.\n"
        f"Look at {session / 'report.html'}, or open {session}/log-*.mcap in a viewer that reads MCAP.",
        highlight=False,
    )


def _command(*arguments: object) -> None:
    """Run one of our commands in a process of its own, on this terminal."""
    command: Sequence[str] = [sys.executable, "-c", "from chatvla_edge.runtime.cli import main; main()"]
    ran = subprocess.run(  # noqa: S603  # our own interpreter, our own command
        [*command, *map(str, arguments)], env={**os.environ, "PYTHONWARNINGS": "ignore"}, check=False
    )
    if ran.returncode:
        raise ValueError(f"`chatvla-edge {arguments[0]}` failed with exit code {ran.returncode} (above)")
