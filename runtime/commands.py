"""Commands around bundles, for the robot: no torch. Light at import: engines load only where one is needed."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.text import Text

from chatvla_edge.runtime.daemon.commands import app as daemon
from chatvla_edge.runtime.tables import (
    facts,
    in_order,
    show_answer,
    show_bundle,
    show_divergence,
    show_failures,
    show_gates,
    show_parts,
    verdict,
)

if TYPE_CHECKING:
    from chatvla_edge.runtime.bundle import Bundle, Contents, GateResult
    from chatvla_edge.runtime.gates import Part
    from chatvla_edge.runtime.policy import Policy

    Comparison = Callable[..., tuple[list[GateResult], list[Part]]]

app = typer.Typer()
app.add_typer(daemon)


def _bundle(path: Path) -> Path:
    """The path as given, unless it is a checkpoint: the command for that is named."""
    weights = ("*.safetensors", "pytorch_model*.bin", "adapter_model.*")
    if not (path / "manifest.json").is_file() and (
        (path / "config.json").is_file() or any(next(path.glob(pattern), None) for pattern in weights)
    ):
        raise ValueError(
            f"{path} is a checkpoint, not a bundle. See what it is with `chatvla-edge inspect-checkpoint {path}`; "
            f"make a bundle of it with `chatvla-edge export {path} -o BUNDLE --robot ROBOT`"
        )
    return path


BundlePath = Annotated[
    Path, typer.Argument(help="Bundle directory.", metavar="BUNDLE", exists=True, file_okay=False, callback=_bundle)
]
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
        if failed := bundle.manifest.gates.allowed_failed_gates:
            Console(stderr=True).print(
                Text.assemble(
                    ("warning", "yellow"),
                    f" {path} was exported with failed gates, by permission: {', '.join(failed)}. Its engines do "
                    "not compute what its checkpoint computes",
                )
            )
        yield bundle


@app.command("inspect")
def inspect(path: BundlePath, as_json: AsJson = False) -> None:
    """Say what a bundle is: policy, cameras, target, stages, gates. Every digest is checked."""
    with _opened(path) as bundle:
        manifest, size = bundle.manifest, bundle.size
    if as_json:
        typer.echo(manifest.model_dump_json(indent=2))
        return
    show_bundle(path, manifest, size)
    show_gates(list(manifest.gates.results))


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
    parts: list[Part] = []
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
                    say=status.update,
                )
        elif not manifest.probes:
            raise ValueError(
                f"{path} was exported without probes: there is nothing in it to compare with. On a workstation, judge "
                "it by its checkpoint: --checkpoint"
            )
        else:
            results = judge(path, manifest, {name: read_probe(bundle.read(name)) for name in manifest.probes}, threads)
    if bisect and not parts:
        raise ValueError(
            f"{path} is for {manifest.target.name}: stages are taken apart on the CPU. Export the checkpoint for cpu, "
            "and bisect that"
        )
    if as_json:
        typer.echo(json.dumps(verdict(results, parts, checkpoint, bisect), indent=2))
    else:
        show_gates(results)
        show_failures(results)
        if bisect:
            show_parts(parts)
        show_divergence(parts)
    if any(result.verdict == "failed" for result in results):
        raise typer.Exit(1)


def _comparison() -> "Comparison":
    """What compares a bundle with a checkpoint: the export room brings it, the robot has none."""
    for entry in entry_points(group="chatvla_edge.verify"):
        return cast("Comparison", entry.load())
    raise ValueError(
        "this installation cannot compare with a checkpoint: it has no entry point in chatvla_edge.verify. Install it "
        "again: ./dev setup, or pip install 'chatvla-edge[export]'"
    )


@app.command("infer")
def infer(
    path: BundlePath,
    image: Annotated[
        list[str] | None,
        typer.Option(help="CAMERA=FILE, once per camera; .png/.jpg, or .npy: uint8 RGB, height x width x 3."),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(help="State in the robot's units, in the order that `inspect` shows: .npy or JSON list."),
    ] = None,
    instruction: Annotated[str, typer.Option(help="What the robot should do, in words.")] = "",
    noise: Annotated[
        Path | None, typer.Option(help="Initial sample, horizon x actions: .npy or JSON. Default: seed 0.")
    ] = None,
    draft: Annotated[str | None, typer.Option(help="Reasoning text to try first; never changes the answer.")] = None,
    threads: ThreadCount = 1,
    as_json: AsJson = False,
) -> None:
    """Answer one query and print the answer: reasoning, actions, routing, time per stage, memory. Nothing moves.

    --json has all of it: token_ids, text, normalized and chunk (horizon x actions), routing (layers x experts), passes
    and accepted (of the language stage), reasoning_age, seconds per stage, memory of this process in bytes.
    """
    with _opened(path) as bundle:
        # Before gigabytes are loaded.
        _refuse_missing(bundle.manifest, state, instruction)
        frames = _frames([camera.name for camera in bundle.manifest.cameras], image or [])
        values = _numbers(cast("Path", state))
        sample = None if noise is None else _numbers(noise)
        policy, load_s = _loaded(path, bundle.manifest, threads)
    answer = policy.query(
        frames,
        values,
        instruction,
        policy.noise(0) if sample is None else sample,
        draft=[] if draft is None else policy.tokens(draft),
    )
    if as_json:
        typer.echo(json.dumps(facts(answer, load_s)))
    else:
        show_answer(answer, policy.manifest, load_s)


def _loaded(path: Path, manifest: "Contents", threads: int) -> "tuple[Policy, float]":
    import time

    from chatvla_edge.runtime.engines.onnxruntime import Threads
    from chatvla_edge.runtime.policy import Policy

    start = time.perf_counter()
    with Console(stderr=True).status("loading engines"):
        policy = Policy(path, manifest, Threads(threads))
    return policy, time.perf_counter() - start


def _refuse_missing(manifest: "Contents", state: Path | None, instruction: str) -> None:
    """Raise for an option that was left out, saying what this bundle wants there."""
    if state is None:
        count = manifest.geometry.head.state_dim
        raise typer.BadParameter(
            f"expected a file of {count} numbers: {in_order(manifest.semantics.state)}", param_hint="--state"
        )
    if not instruction.strip():
        raise typer.BadParameter("found none, say what the robot should do", param_hint="--instruction")


def _frames(names: list[str], given: list[str]) -> list[Any]:
    files = dict(entry.split("=", 1) for entry in given if "=" in entry)
    if sorted(files) != sorted(names) or len(files) != len(given):
        raise typer.BadParameter(
            f"found {', '.join(given) or 'none'}, expected one for each camera: "
            + " ".join(f"--image {name}=FILE" for name in names),
            param_hint="--image",
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
