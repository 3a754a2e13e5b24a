"""Train the nano ChatVLA-2 of this repository, from nothing, on a CPU.

    python -m chatvla_edge.benchmarks.math_matching.train WORK [--step vision|language|head|join|write] [--highest 9]

WORK keeps the data, the state of every step and the log; killed at any time, the same command goes on. Without
--step all steps run in turn. `vision` then `language` and, beside them, `head` may run as two processes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from chatvla_edge.benchmarks.math_matching import geometry, trainer
from chatvla_edge.benchmarks.math_matching.data import TEST_SEEDS, moments, statistics
from chatvla_edge.benchmarks.math_matching.steps import Head, Join, Language, Vision, World
from chatvla_edge.export.checkpoint.publish import write_checkpoint
from chatvla_edge.export.model.policy import ChatVLA2
from chatvla_edge.export.model.prompt import Prompt

STEPS = ("vision", "language", "head", "join", "write")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path, help="folder of data, states and log")
    parser.add_argument("--step", choices=STEPS, help="this one alone")
    parser.add_argument("--output", type=Path, help="checkpoint folder (default WORK/checkpoint)")
    parser.add_argument("--highest", type=int, default=9, help="largest number on a card (default 9; the game: 81)")
    parser.add_argument("--shards", type=int, default=44, help="of 500 moments to train on")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw them")
    parser.add_argument("--vision-steps", type=int, default=2000)
    parser.add_argument("--language-steps", type=int, default=3000)
    parser.add_argument("--head-steps", type=int, default=3900)
    parser.add_argument("--join-steps", type=int, default=300)
    parser.add_argument("--judge-every", type=int, default=500)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    options = parser.parse_args(arguments)
    steps = {name: getattr(options, f"{name}_steps") for name in STEPS if name != "write"}
    options.work.mkdir(parents=True, exist_ok=True)
    log = trainer.Log(options.work / "log.jsonl")
    world = _world(options)
    for name in [options.step] if options.step else STEPS:
        if name == "write":
            write(world, options.work, options.output or options.work / "checkpoint")
        else:
            _run(name, world, options, steps[name], log)
    return 0


def _world(options: argparse.Namespace) -> World:
    folder = options.work / "data"
    train = moments(folder, options.shards, "in_domain", options.highest, workers=options.workers)
    test = moments(folder, 1, "held_out", options.highest, first=TEST_SEEDS)
    words = geometry.tokenizer()
    spec = geometry.spec(words)
    torch.manual_seed(0)
    model = ChatVLA2(spec)
    prompt = Prompt(Tokenizer.from_str(words), spec.tokens)
    return World(model, prompt, statistics(train), options.highest, train, test)


def _load(model: ChatVLA2, weights: dict[str, torch.Tensor]) -> None:
    """Take over what a step trained; its probes stay behind."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            if not name.startswith("probe."):
                parameters[name].copy_(value)


def _run(name: str, world: World, options: argparse.Namespace, steps: int, log: trainer.Log) -> None:
    compiled = not options.eager
    work: Path = options.work
    if name == "vision":
        trainer.run(Vision(world, 32, compiled), steps, work, log, options.judge_every)
    elif name == "head":
        trainer.run(Head(world, 64, compiled), steps, work, log, options.judge_every)
    else:
        _load(world.model, trainer.averaged(work, "vision"))
        world.model.backbone.visual.requires_grad_(False)
        language = Language(world, 16, 20, work / "features.pt", compiled)
        if name == "language":
            trainer.run(language, steps, work, log, options.judge_every)
            return
        _load(world.model, trainer.averaged(work, "language"))
        world.model.backbone.requires_grad_(False)
        head = trainer.averaged(work, "head")
        _load(world.model, head)
        join = Join(world, language, head, 64, compiled)
        if not (work / "join.pt").is_file():
            join.fit(800, work, log)
        trainer.run(join, steps, work, log, options.judge_every)


def write(world: World, work: Path, output: Path) -> None:
    """The checkpoint in the public layout, from the averaged weights of all steps."""
    for name in ("vision", "language", "join"):
        _load(world.model, trainer.averaged(work, name))
    tensors = {name: value.detach() for name, value in world.model.named_parameters()}
    write_checkpoint(
        output,
        world.model.spec,
        geometry.LAYOUT,
        tensors.__getitem__,
        dtype=torch.bfloat16,
        statistics=world.statistics,
        tokenizer=geometry.tokenizer(),
    )


if __name__ == "__main__":
    sys.exit(main())
