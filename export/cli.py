"""Commands around checkpoints. Light at import: torch is loaded only by the command that needs it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from chatvla_edge.export.checkpoint.reader import Checkpoint

app = typer.Typer()
console = Console()


def _checkpoint(context: typer.Context, path: Path) -> Path:
    """The path as given, unless it is a bundle: a command for that is named."""
    if (path / "manifest.json").is_file() and not (path / "config.json").is_file():
        name = context.info_name
        others = {
            "inspect-checkpoint": f"use `chatvla-edge inspect {path}`",
            "export": "a bundle is what `export` makes; pass the checkpoint it came from",
        }
        raise ValueError(
            f"{path} is a bundle, `{name}` takes a checkpoint: "
            + others.get(str(name), "pass the checkpoint it was exported from")
        )
    return path


CheckpointPath = Annotated[
    Path,
    typer.Argument(
        help="Checkpoint directory.", metavar="CHECKPOINT", exists=True, show_default=False, callback=_checkpoint
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Directory to write; must not hold weights yet.")]
Precision = Literal["fp32", "bf16"]


def _progress() -> Progress:
    """A bar over bytes, on stderr so that stdout stays clean for --json."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


@app.command("inspect-checkpoint")
def inspect_checkpoint(
    path: CheckpointPath,
    view: Annotated[str, typer.Option(help="robot, or vqa: ChatVLA v1 as it answers questions.")] = "robot",
    base: Annotated[Path | None, typer.Option(help="The Qwen2-VL directory a LoRA checkpoint was trained on.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Read every tensor: truncation, NaN and infinity.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what a checkpoint is: geometry, variant, parameters, bytes, routing, and what its actions seem to mean.

    Every tensor is accounted for; one that is missing, extra or misshapen is an error that names it (exit code 1).
    """
    from chatvla_edge.export.checkpoint.reader import open_checkpoint

    if view not in ("robot", "vqa"):
        raise typer.BadParameter(f"found {view!r}, expected robot or vqa", param_hint="--view")
    checkpoint = open_checkpoint(path, view="vqa" if view == "vqa" else "robot", base=base)
    if check:
        with _progress() as bar:
            task = bar.add_task("checking tensors", total=checkpoint.nbytes)
            for _ in checkpoint.read(progress=lambda count: bar.advance(task, count)):
                pass
    facts = _facts(checkpoint)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    _show(path, facts)


def _facts(checkpoint: "Checkpoint") -> dict[str, Any]:
    from chatvla_edge.export.accounting import BITS, parameters
    from chatvla_edge.export.checkpoint.meaning import likely_meaning

    spec = checkpoint.spec
    counted = parameters(spec)
    dtypes = sorted({str(entry.dtype).removeprefix("torch.") for entry in checkpoint.entries.values()})
    return {
        "variant": spec.variant,
        "experts": spec.language.experts.summary,
        "fusion": spec.fusion.kind if spec.head else None,
        "head": spec.head.size if spec.head else None,
        "spec": spec.model_dump(),
        "layout": checkpoint.layout.model_dump(),
        "stored_dtypes": dtypes,
        "stored_bytes": checkpoint.nbytes,
        "parameters": {"total": counted.total, "active_per_token": counted.active, "parts": counted.parts},
        "bytes": {precision: counted.bytes(precision) for precision in BITS},
        "meaning": likely_meaning(spec.head) if spec.head else None,
        "notes": list(checkpoint.notes),
        "ignored": [{"name": ignored.name, "reason": ignored.reason} for ignored in checkpoint.ignored],
    }


def _show(path: Path, facts: dict[str, Any]) -> None:
    from chatvla_edge.runtime.bundle import bytes_in_words, policy_in_words

    spec, counted = facts["spec"], facts["parameters"]
    sampler = spec["sampler"]
    rows = policy_in_words(facts["variant"], spec, (sampler["steps"], sampler["train_steps"]))
    if spec["head"]:
        rows["meaning"] = facts["meaning"]
    rows["stored"] = f"{', '.join(facts['stored_dtypes'])}, {bytes_in_words(facts['stored_bytes'])}"
    table = Table(title=str(path), show_header=False, title_style="bold")
    table.add_column(style="cyan")
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(name, Text(text))  # Text: units in brackets are not markup
    console.print(table)

    table = Table(title="parameters", title_style="bold")
    table.add_column("part")
    table.add_column("count", justify="right")
    for name, count in counted["parts"].items():
        table.add_row(name, f"{count:,}")
    table.add_section()
    table.add_row("total", f"{counted['total']:,}", style="bold")
    table.add_row("active per token", f"{counted['active_per_token']:,}")
    console.print(table)

    sizes = ", ".join(f"{precision} {bytes_in_words(size)}" for precision, size in facts["bytes"].items())
    console.print(f"[cyan]all weights in[/cyan] {sizes}")
    for note in facts["notes"]:
        console.print("[yellow]note[/yellow]", Text(note))
    reasons: dict[str, list[str]] = {}
    for ignored in facts["ignored"]:
        reasons.setdefault(ignored["reason"], []).append(ignored["name"])
    for reason, names in reasons.items():
        shown = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        console.print("[cyan]left out[/cyan]", Text(f"{shown}: {reason}"))


@app.command("synth")
def synth(
    geometry: Annotated[str, typer.Argument(help="A preset; `list` shows them.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory to write.")] = None,
    layers: Annotated[int | None, typer.Option(help="Keep only the first N decoder layers.")] = None,
    seed: Annotated[int, typer.Option(help="Weights depend on this and on each tensor's name.")] = 0,
    precision: Annotated[str, typer.Option(help="Stored dtype: bf16 or fp32.")] = "bf16",
) -> None:
    """Write a synthetic checkpoint with random weights: real names, shapes and files, for time, memory and parity."""
    from chatvla_edge.export.accounting import parameters
    from chatvla_edge.export.checkpoint.synth import PRESETS, synthesize, truncated
    from chatvla_edge.runtime.bundle import bytes_in_words

    if geometry == "list":
        table = Table("geometry", "parameters", "bf16", "what")
        for name, (spec, _, what) in PRESETS.items():
            counted = parameters(spec)
            table.add_row(name, f"{counted.total:,}", bytes_in_words(counted.bytes("bf16")), what)
        console.print(table)
        return
    if geometry not in PRESETS:
        raise typer.BadParameter(f"found {geometry!r}, expected one of {', '.join(PRESETS)}", param_hint="GEOMETRY")
    if output is None:
        raise typer.BadParameter("say where to write the checkpoint", param_hint="--output")
    spec, layout, _ = PRESETS[geometry]
    if layers is not None:
        try:
            spec = truncated(spec, layers)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--layers") from None
    dtype = _dtype(precision)
    with _progress() as bar:
        task = bar.add_task(f"writing {geometry}", total=parameters(spec).total * dtype.itemsize)
        synthesize(output, spec, layout, seed=seed, dtype=dtype, progress=lambda count: bar.advance(task, count))
    console.print(f"{output}: {spec.variant}, {spec.language.experts.summary}, random weights", highlight=False)


@app.command("upcycle")
def upcycle(
    path: CheckpointPath,
    output: Output,
    experts: Annotated[int, typer.Option(help="Routed experts.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts a token visits.")] = 2,
    shared: Annotated[int, typer.Option(help="Shared experts beside the routed ones.")] = 0,
    static: Annotated[int, typer.Option(help="Static experts (2: vision-language and robot).")] = 0,
    perturb: Annotated[float, typer.Option(help="Noise on each expert, relative to its weights' RMS.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the routers and the noise.")] = 0,
) -> None:
    """Turn a dense checkpoint's MLPs into experts, each a copy of the MLP, as the paper initialises them."""
    from chatvla_edge.export.accounting import parameters
    from chatvla_edge.export.checkpoint.reader import open_checkpoint
    from chatvla_edge.export.checkpoint.upcycle import equals_parent, upcycle, upcycled_spec
    from chatvla_edge.export.spec import ExpertsSpec

    wanted = ExpertsSpec(
        routed=experts, top_k=top_k, shared=shared, static=static, static_active=1 if static > 1 else 0
    )
    parent = open_checkpoint(path)
    item = parent.dtype.itemsize
    with _progress() as bar:
        task = bar.add_task("upcycling", total=parameters(upcycled_spec(parent.spec, wanted)).total * item)
        upcycle(parent, output, wanted, perturb=perturb, seed=seed, progress=lambda count: bar.advance(task, count))
    console.print(f"{output}: {wanted.summary}", highlight=False)
    if not equals_parent(wanted):
        console.print(
            "[yellow]note[/yellow] shared experts are added to the routed ones: before any training, this checkpoint "
            "does not compute what its parent does."
        )


def _dtype(precision: str) -> Any:
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if precision not in dtypes:
        raise typer.BadParameter(f"found {precision!r}, expected bf16 or fp32", param_hint="--precision")
    return dtypes[precision]


@app.command("demo")
def demo(
    folder: Annotated[Path, typer.Option(help="Where bundle, log and report go; kept afterwards.")] = Path("demo"),
    seconds: Annotated[float, typer.Option(help="How long the rig runs.", min=2)] = 20.0,
    reference: Annotated[
        bool, typer.Option("--reference", help="The tour of the PyTorch reference instead: no robot, seconds.")
    ] = False,
) -> None:
    """Export a checkpoint, drive a simulated rig with it, and write the session's report."""
    if reference:
        from chatvla_edge.export.demo import run as tour

        tour(console)
        return
    from chatvla_edge.export.robot_demo import run

    run(console, folder, seconds)


@app.command("export")
def export(
    path: CheckpointPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="Bundle directory to write; must not exist.")],
    robot: Annotated[
        str, typer.Option(help="What actions and cameras mean: a name, or a YAML file. `list` shows names.")
    ],
    target: Annotated[str, typer.Option(help="cpu; cuda (not run on any GPU yet, without gates).")] = "cpu",
    precision: Annotated[
        str,
        typer.Option(
            help="fp32; int8 or int4 (blocks of 128); int8-row or int4-row (one scale per row: integer products, "
            "several times faster for many rows, less robust against outliers)."
        ),
    ] = "int8",
    base: Annotated[Path | None, typer.Option(help="The Qwen2-VL directory a LoRA checkpoint was trained on.")] = None,
    task: Annotated[str | None, typer.Option(help="Task, where the statistics hold several.")] = None,
    max_reasoning: Annotated[int, typer.Option(help="Longest reasoning, in tokens.", min=1)] = 256,
    probes: Annotated[int, typer.Option(help="Observations that travel with the bundle to judge it by.", min=1)] = 2,
    gates: Annotated[bool, typer.Option(help="Judge the engines by the reference before writing.")] = True,
    allow_failed_gates: Annotated[bool, typer.Option(help="Write it all the same.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything that needs no weights, write nothing.")
    ] = False,
) -> None:
    """Turn a checkpoint into a bundle that a robot loads.

    An export that was interrupted or killed leaves nothing that loads; called again, it goes on where it stopped.
    """
    from chatvla_edge.export import robots
    from chatvla_edge.export.checkpoint.reader import open_checkpoint
    from chatvla_edge.export.exporter import READING, REFERENCE, Settings, export, plan
    from chatvla_edge.export.room import memory
    from chatvla_edge.runtime.bundle import bytes_in_words

    if robot == "list":
        console.print("\n".join(robots.names()))
        return
    checkpoint = open_checkpoint(path, base=base)
    settings = Settings(
        target=target,
        precision=precision,
        robot=robots.load(robot),
        task=task,
        max_reasoning=max_reasoning,
        probes=probes,
        gates=gates,
        allow_failed_gates=allow_failed_gates,
    )
    if output.exists():
        raise ValueError(f"{output} exists: a bundle is never overwritten. Choose another name, or remove it")
    planned = plan(checkpoint, settings)
    if dry_run:
        table = Table("stage", "nodes", "weights")
        for graph in planned.graphs:
            table.add_row(graph.name, str(len(graph.nodes)), bytes_in_words(graph.weight_bytes))
        console.print(table)
        needed, what = memory(planned.graphs, checkpoint, gates)
        console.print(f"peak memory, predicted: {bytes_in_words(needed)} ({what})", highlight=False)
        return
    with _progress() as bar:
        tasks = {READING: bar.add_task("reading the checkpoint", total=checkpoint.nbytes)}
        tasks |= {graph.name: bar.add_task(graph.name, total=graph.weight_bytes) for graph in planned.graphs}
        if gates:  # how often it reads the weights depends on what the engines say
            tasks[REFERENCE] = bar.add_task("weights through the reference", total=None)
        try:
            bundle = export(
                checkpoint,
                output,
                settings,
                lambda name, count: bar.advance(tasks[name], count),
                lambda line: bar.console.print(line, highlight=False, soft_wrap=True),
            )
        except KeyboardInterrupt:
            raise typer.Exit(130) from None  # what is kept was said
    failed = [result.name for result in bundle.manifest.gates.results if result.verdict == "failed"]
    console.print(f"{output}: {target} {precision}, {bytes_in_words(bundle.size)}", highlight=False)
    if failed:
        console.print(f"[red]failed gates, allowed:[/red] {', '.join(failed)}")
    if not gates:
        console.print(
            "[yellow]note[/yellow] no gate was evaluated: nothing shows that this bundle computes its checkpoint"
        )
