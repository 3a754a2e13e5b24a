"""Commands around bundles, for the robot: no torch. Light at import: engines load only where one is needed."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from chatvla_edge.runtime.daemon.commands import app as daemon

if TYPE_CHECKING:
    from chatvla_edge.runtime.bundle import Bundle, GateResult
    from chatvla_edge.runtime.gates import Part
    from chatvla_edge.runtime.policy import Answer

    Comparison = Callable[..., tuple[list[GateResult], list[Part] | None]]

app = typer.Typer()
app.add_typer(daemon)
console = Console()

BundlePath = Annotated[Path, typer.Argument(help="Bundle directory.", exists=True, file_okay=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
ThreadCount = Annotated[int, typer.Option(help="Compute threads of the engines.", min=1)]


@contextmanager
def _opened(path: Path) -> Iterator["Bundle"]:
    """Open a bundle with every digest checked, a bar showing how far that is."""
    from chatvla_edge.runtime.bundle import open_bundle

    with open_bundle(path, verify=False) as bundle:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("checking digests", total=bundle.size)
            bundle.verify(lambda _name, count, _size: bar.update(task, completed=count))
        yield bundle


@app.command("inspect")
def inspect(path: BundlePath, as_json: AsJson = False) -> None:
    """Say what a bundle is: policy, cameras, target, stages, gates. Every digest is checked."""
    with _opened(path) as bundle:
        manifest = bundle.manifest
    if as_json:
        typer.echo(manifest.model_dump_json(indent=2))
        return
    geometry, head, target = manifest.geometry, manifest.geometry.head, manifest.target
    experts = geometry.language.experts
    rows = {
        "policy": manifest.provenance.variant,
        "experts": f"{experts.routed} routed, top-{experts.top_k}, {experts.shared} shared, {experts.static} static",
        "chunk": f"{head.horizon} actions of {head.action_dim} at {manifest.timing.rate_hz:g} Hz, "
        f"first step {manifest.timing.first_step}, state of {head.state_dim}",
        "action": ", ".join(f"{part.arm} {part.kind} [{part.unit}]" for part in manifest.semantics.action),
        "cameras": ", ".join(f"{camera.name} {camera.width}x{camera.height}" for camera in manifest.cameras),
        "target": f"{target.name}, {target.engine.kind} {target.engine.range}",
        "checkpoint": f"{manifest.provenance.checkpoint_name} {manifest.provenance.checkpoint_sha256[:12]}",
    }
    table = Table(title=str(path), show_header=False, title_style="bold")
    table.add_column(style="cyan")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    console.print(table)
    table = Table("stage", "precision", "bytes")
    table.columns[2].justify = "right"
    for name, stage in manifest.stages.named():
        table.add_row(Text(name), stage.precision, f"{sum(manifest.files[file].size for file in stage.files):,}")
    console.print(table)
    _show_gates(list(manifest.gates.results))


@app.command("verify")
def verify(
    path: BundlePath,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="The checkpoint it was exported from: judge by that instead of the bundle's own probes."),
    ] = None,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Name the first stage and layer that diverge; needs --checkpoint.")
    ] = False,
    base: Annotated[Path | None, typer.Option(help="The Qwen2-VL directory a LoRA checkpoint was trained on.")] = None,
    task: Annotated[str | None, typer.Option(help="Task, where the checkpoint's statistics hold several.")] = None,
    probes: Annotated[int, typer.Option(help="Observations to ask the checkpoint about.", min=1)] = 2,
    threads: ThreadCount = 1,
    as_json: AsJson = False,
) -> None:
    """Say whether a bundle computes what its checkpoint computes; exit code 1 when a gate fails or a layer diverges.

    By itself, a bundle is judged on this machine by the probes that travel with it. With --checkpoint, on a
    workstation, the reference is built anew and asked about observations that no bundle has seen.
    """
    from chatvla_edge.runtime.gates import judge, read_probe

    if checkpoint is None and (bisect or base is not None or task is not None):
        raise typer.BadParameter("layers are compared with a checkpoint: name it", param_hint="--checkpoint")
    parts: list[Part] | None = None
    with _opened(path) as bundle:
        manifest = bundle.manifest
        if checkpoint is not None:
            compare = _comparison()
            with Console(stderr=True).status("opening the checkpoint") as status:
                results, parts = compare(
                    bundle,
                    checkpoint,
                    base=base,
                    task=task,
                    probes=probes,
                    threads=threads,
                    bisected=bisect,
                    say=status.update,
                )
        elif not manifest.probes:
            raise ValueError(
                f"{path} was exported without probes: there is nothing in it to compare with. On a workstation, judge "
                "it by its checkpoint: --checkpoint"
            )
        else:
            results = judge(path, manifest, {name: read_probe(bundle.read(name)) for name in manifest.probes}, threads)
    diverging = [part for part in parts or [] if part.diverges]
    if as_json:
        typer.echo(json.dumps(_verdict(results, parts, checkpoint), indent=2))
    else:
        _show_gates(results)
        _show_failures(results)
        if parts is not None:
            _show_parts(parts)
    if diverging or any(result.verdict == "failed" for result in results):
        raise typer.Exit(1)


def _comparison() -> "Comparison":
    """What compares a bundle with a checkpoint: the export room brings it, the robot has none."""
    for entry in entry_points(group="chatvla_edge.verify"):
        return cast("Comparison", entry.load())
    raise ValueError(
        "this installation cannot compare with a checkpoint: it has no entry point in chatvla_edge.verify. Install it "
        "again: ./dev setup, or pip install 'chatvla-edge[export]'"
    )


def _verdict(results: "list[GateResult]", parts: "list[Part] | None", checkpoint: Path | None) -> dict[str, Any]:
    from chatvla_edge.runtime.gates import meaning

    def fields(part: "Part") -> dict[str, Any]:
        # JSON has no NaN: a part without numbers has null.
        found = {
            name: value if math.isfinite(value) else None for name, value in vars(part).items() if type(value) is float
        }
        return {**vars(part), **found, "diverges": part.diverges, "name": part.name}

    diverging = [part for part in parts or [] if part.diverges]
    return {
        "reference": "the probes in the bundle" if checkpoint is None else str(checkpoint),
        "gates": [
            {**result.model_dump(), **({"meaning": meaning(result)} if result.verdict == "failed" else {})}
            for result in results
        ],
        "parts": None if parts is None else [fields(part) for part in parts],
        "first_divergence": diverging[0].name if diverging else None,
    }


def _show_failures(results: "list[GateResult]") -> None:
    from chatvla_edge.runtime.gates import meaning

    for result in results:
        if result.verdict == "failed":
            console.print(Text.assemble((result.name, "red"), f": {meaning(result)}"))


def _show_parts(parts: "list[Part]") -> None:
    table = Table("stage", "part", "relative RMS", "limit", "cosine", "routing", "")
    for part in parts:
        table.add_row(
            Text(part.stage),
            " ".join(filter(None, (part.place, part.what))),
            f"{part.rms:.2e}",
            f"{part.limit:.0e}",
            f"{part.cosine:.6f}",
            "" if part.routing is None else f"{100 * part.routing:.1f} %",
            Text("diverges", style="red") if part.diverges else "",
        )
    console.print(table)
    diverging = [part for part in parts if part.diverges]
    if not diverging:
        console.print("no part diverges: each computes what the reference does of the same input")
        return
    console.print(Text.assemble(("first to diverge: ", "red"), diverging[0].name))
    if len(diverging) > 1:
        # Each part was fed the reference's numbers, so these do not follow from the first.
        console.print(Text("by themselves, too: " + "; ".join(part.name for part in diverging[1:])))


def _show_gates(results: "list[GateResult]") -> None:
    if not results:
        console.print("[yellow]no gates were evaluated at export[/yellow]")
        return
    table = Table("gate", "value", "limit", "verdict")
    colour = {"passed": "green", "failed": "red", "reported": "cyan"}
    for result in results:
        value = "not finite" if result.value is None else f"{result.value:.3g}"
        table.add_row(result.name, value, f"{result.limit:.3g}", Text(result.verdict, style=colour[result.verdict]))
    console.print(table)


@app.command("infer")
def infer(
    path: BundlePath,
    image: Annotated[
        list[str], typer.Option(help="CAMERA=FILE, once per camera; .png/.jpg, or .npy as [h, w, 3] RGB.")
    ],
    state: Annotated[Path, typer.Option(help="State in the robot's units: .npy or JSON list.", exists=True)],
    instruction: Annotated[str, typer.Option(help="What the robot should do.")],
    noise: Annotated[Path | None, typer.Option(help="Initial sample [H, A]: .npy or JSON. Default: seed 0.")] = None,
    draft: Annotated[str | None, typer.Option(help="Reasoning text to try first; never changes the answer.")] = None,
    threads: ThreadCount = 1,
    as_json: AsJson = False,
) -> None:
    """Answer one query: reasoning, chunk, routing, time per stage."""
    from chatvla_edge.runtime.engines.onnxruntime import Threads
    from chatvla_edge.runtime.policy import Policy

    with _opened(path) as bundle:
        policy = Policy(path, bundle.manifest, Threads(threads))
    frames = _frames([camera.name for camera in policy.manifest.cameras], image)
    sample = policy.noise(0) if noise is None else _numbers(noise)
    answer = policy.query(
        frames, _numbers(state), instruction, sample, draft=[] if draft is None else policy.tokens(draft)
    )
    if as_json:
        typer.echo(json.dumps(_facts(answer)))
        return
    console.print("[cyan]reasoning[/cyan]", Text(answer.text or "(no text)"))
    console.print(
        f"{len(answer.token_ids)} tokens in {answer.passes} passes, chunk {answer.chunk.shape[0]} x "
        f"{answer.chunk.shape[1]} from {np.array2string(answer.chunk[0], precision=3)}",
        highlight=False,
    )
    table = Table("stage", "ms")
    for stage, seconds in answer.seconds.items():
        table.add_row(stage, f"{1e3 * seconds:.2f}")
    console.print(table)


def _facts(answer: "Answer") -> dict[str, Any]:
    return {
        "token_ids": answer.token_ids,
        "text": answer.text,
        "normalized": answer.normalized.tolist(),
        "chunk": answer.chunk.tolist(),
        "routing": answer.routing.tolist(),
        "passes": answer.passes,
        "accepted": answer.accepted,
        "seconds": dict(answer.seconds),
    }


def _frames(names: list[str], given: list[str]) -> list[Any]:
    files = dict(entry.split("=", 1) for entry in given if "=" in entry)
    if sorted(files) != sorted(names) or len(files) != len(given):
        raise typer.BadParameter(
            f"found {', '.join(given)}, expected one CAMERA=FILE for each of {', '.join(names)}", param_hint="--image"
        )
    return [_picture(Path(files[name])) for name in names]


def _picture(path: Path) -> Any:
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    from PIL import Image

    try:
        return np.asarray(Image.open(path).convert("RGB"))
    except OSError as error:
        raise ValueError(f"{path}: expected a picture or a .npy array [height, width, 3], found: {error}") from None


def _numbers(path: Path) -> Any:
    expected = "expected a .npy array or a JSON list of numbers"
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False).astype(np.float32)
        value = json.loads(path.read_text(encoding="utf-8"))
        array = np.asarray(value)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {expected}, found: {error}") from None
    if not isinstance(value, list) or array.dtype.kind not in "fi":
        raise ValueError(f"{path}: {expected}, found {str(value)[:80]}")
    return array.astype(np.float32)
