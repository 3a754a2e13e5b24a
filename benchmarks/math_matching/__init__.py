"""The paper's math-matching game as training data and as a judge: expert, texts, training and evaluation.

python -m chatvla_edge.benchmarks.math_matching.train WORK
chatvla-edge bench math-matching [--quick] [--checkpoint DIR] [--trials N] [--variants fp32,int8,...]
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chatvla_edge.benchmarks.report import Report

SUMMARY = "The math-matching game in closed loop, through bundle and servo plane: OCR, reasoning and success."


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of its own."""
    parser.add_argument("--checkpoint", type=Path, help="checkpoint folder (default: the nano checkpoint)")
    parser.add_argument("--trials", type=int, help="of each split and variant (default 20; --quick 2)")
    parser.add_argument("--variants", help="comma-separated (default fp32,int8,int4-row)")
    parser.add_argument("--work", type=Path, help="folder that keeps bundles and trials (default: a temporary one)")
    parser.add_argument("--highest", type=int, default=9, help="largest number on a card, as it was trained")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="draw a contact sheet of fp32 trials")


def run(options: Namespace) -> "Report":
    """Play, score and compare; goals are those of the issue's paired gates."""
    from functools import partial
    from tempfile import TemporaryDirectory

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from chatvla_edge.benchmarks.math_matching.evaluate import VARIANTS, contact_sheet, report, trials
    from chatvla_edge.export.nano import checkpoint as nano

    names = (options.variants or "fp32,int8,int4-row").split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        raise ValueError(f"found the variants {', '.join(unknown)}, expected some of: {', '.join(VARIANTS)}")
    if "fp32" not in names:
        raise ValueError("every other variant is compared with fp32: name it too")
    count = options.trials or (2 if options.quick else 20)
    checkpoint = options.checkpoint or nano()
    with TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            results = {}
            for name in names:
                task = bar.add_task(name, total=3 * count)
                results[name] = trials(name, checkpoint, work, count, options.highest, partial(bar.advance, task))
        if options.sheet:
            contact_sheet("fp32", checkpoint, work, options.sheet, options.highest)
    return report(results)
