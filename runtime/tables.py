"""What the commands print: tables for people, values for JSON. Light at import, as the commands are."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from chatvla_edge.runtime.bundle import Contents, GateResult, Manifest, Meaning
    from chatvla_edge.runtime.gates import Part
    from chatvla_edge.runtime.policy import Answer

console = Console()


def show_bundle(path: Path, manifest: "Manifest", size: int) -> None:
    """What a bundle is; size: bytes of all its files."""
    from chatvla_edge.runtime.bundle import bytes_in_words, policy_in_words

    geometry, target, timing = manifest.geometry, manifest.target, manifest.timing
    steps = len(manifest.sampler.steps), manifest.sampler.train_steps
    rows = policy_in_words(manifest.provenance.variant, geometry.model_dump(), steps)
    rows["chunk"] += f"; at {timing.rate_hz:g} Hz, first step {timing.first_step}"
    rows |= {
        "action": in_order(manifest.semantics.action),
        "state": in_order(manifest.semantics.state),
        "cameras": ", ".join(f"{camera.name} {camera.width}x{camera.height}" for camera in manifest.cameras),
        "reasoning": f"up to {manifest.prompt.max_reasoning_tokens} tokens",
        "target": f"{target.name}, {target.engine.kind} {target.engine.range}",
        "checkpoint": f"{manifest.provenance.checkpoint_name} {manifest.provenance.checkpoint_sha256[:12]}",
        "stored": bytes_in_words(size),
    }
    table = Table(title=str(path), show_header=False, title_style="bold")
    table.add_column(style="cyan")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    console.print(table)
    table = Table("stage", "precision", "stored")
    table.columns[2].justify = "right"
    for name, stage in manifest.stages.named():
        stored = sum(manifest.files[file].size for file in stage.files)
        table.add_row(Text(name), stage.precision, bytes_in_words(stored))
    console.print(table)


def show_gates(results: "list[GateResult]") -> None:
    """Every gate with its value and verdict."""
    if not results:
        console.print("[yellow]no gates were evaluated at export[/yellow]")
        return
    table = Table("gate", "value", "limit", "verdict")
    colour = {"passed": "green", "failed": "red", "reported": "cyan"}
    for result in results:
        value = "not finite" if result.value is None else f"{result.value:.3g}"
        table.add_row(result.name, value, f"{result.limit:.3g}", Text(result.verdict, style=colour[result.verdict]))
    console.print(table)


def show_failures(results: "list[GateResult]") -> None:
    """What each failed gate says."""
    from chatvla_edge.runtime.gates import meaning

    for result in results:
        if result.verdict == "failed":
            console.print(Text.assemble((result.name, "red"), f": {meaning(result)}"))


def show_parts(parts: "list[Part]") -> None:
    """Every part of every stage beside the reference."""
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


def show_divergence(parts: "list[Part]") -> None:
    """The first part that diverges, in a sentence."""
    diverging = [part for part in parts if part.diverges]
    if not diverging:
        if parts:
            console.print("no part of a stage diverges: each computes what the reference does of the same input")
        return
    console.print(Text.assemble(("first to diverge: ", "red"), diverging[0].name))
    if len(diverging) > 1:
        # Each part was fed the reference's numbers, so these do not follow from the first.
        console.print(Text("by themselves, too: " + "; ".join(part.name for part in diverging[1:])))


def verdict(results: "list[GateResult]", parts: "list[Part]", checkpoint: Path | None, bisect: bool) -> dict[str, Any]:
    """What `verify` found, as JSON values."""
    from chatvla_edge.runtime.gates import meaning

    def fields(part: "Part") -> dict[str, Any]:
        # JSON has no NaN: a part without numbers has null.
        found = {
            name: value if math.isfinite(value) else None for name, value in vars(part).items() if type(value) is float
        }
        return {**vars(part), **found, "diverges": part.diverges, "name": part.name}

    diverging = [part for part in parts if part.diverges]
    return {
        "reference": "the probes in the bundle" if checkpoint is None else str(checkpoint),
        "gates": [
            {**result.model_dump(), **({"meaning": meaning(result)} if result.verdict == "failed" else {})}
            for result in results
        ],
        "parts": [fields(part) for part in parts] if bisect else None,
        "first_divergence": diverging[0].name if diverging else None,
    }


def show_answer(answer: "Answer", manifest: "Contents", load_s: float) -> None:
    """An answer for people; load_s: seconds that loading took."""
    from chatvla_edge.runtime.bundle import bytes_in_words, components
    from chatvla_edge.runtime.resident import resident

    count = len(answer.token_ids)
    stop = manifest.prompt.tokens.stop
    ended = "" if answer.token_ids[-1] in stop else ", cut off at the bundle's longest reasoning"
    console.print("[cyan]reasoning[/cyan]", Text(answer.text or f"(nothing that prints: tokens {answer.token_ids})"))
    drafted = f", {answer.accepted} of them drafted" if answer.accepted else ""
    console.print(f"{count} tokens in {answer.passes} passes{drafted}{ended}", highlight=False)
    timing, horizon = manifest.timing, len(answer.chunk)
    first = timing.first_step / timing.rate_hz
    last = (timing.first_step + horizon - 1) / timing.rate_hz
    columns = ("action", f"first, at {first:+.2f} s", f"last, at {last:+.2f} s", "unit")
    table = Table(*columns, title=f"{horizon} actions", title_style="bold")
    for (name, unit), begin, end in zip(
        components(manifest.semantics.action), answer.chunk[0], answer.chunk[-1], strict=True
    ):
        table.add_row(Text(name), f"{begin:+.4f}", f"{end:+.4f}", Text(unit))
    console.print(table)
    if answer.routing.size:
        visits = answer.routing.sum(axis=0)
        shares = ", ".join(f"{index}: {share:.0%}" for index, share in enumerate(visits / visits.sum()))
        console.print(f"[cyan]experts visited[/cyan] {shares}", highlight=False)
    table = Table("stage", "ms")
    table.columns[1].justify = "right"
    for stage, seconds in answer.seconds.items():
        table.add_row(stage, f"{1e3 * seconds:.1f}")
    table.add_section()
    table.add_row("query", f"{1e3 * sum(answer.seconds.values()):.1f}", style="bold")
    console.print(table)
    held = resident()
    console.print(
        f"a first query, after {load_s:.2f} s of loading: later ones are faster, see `chatvla-edge bench stages`\n"
        f"[cyan]memory[/cyan] {bytes_in_words(held['resident'])}, of it {bytes_in_words(held['anonymous'])} anonymous; "
        f"at most {bytes_in_words(held['peak'])}",
        highlight=False,
    )


def facts(answer: "Answer", load_s: float) -> dict[str, Any]:
    """An answer as JSON values."""
    from chatvla_edge.runtime.resident import resident

    return {
        "token_ids": answer.token_ids,
        "text": answer.text,
        "normalized": answer.normalized.tolist(),
        "chunk": answer.chunk.tolist(),
        "routing": answer.routing.tolist(),
        "passes": answer.passes,
        "accepted": answer.accepted,
        "reasoning_age": {"queries": answer.reasoning_age_queries, "seconds": answer.reasoning_age_s},
        "seconds": dict(answer.seconds),
        "load_seconds": load_s,
        "memory": resident(),
    }


def in_order(parts: "Iterable[Meaning]") -> str:
    """`left.joint1 ... left.joint6 [rad], left.gripper [m]`: in the order in which the numbers stand."""
    words = []
    for part in parts:
        names = [name for name, _ in part.components]
        words.append(f"{names[0]} ... {names[-1]} [{part.unit}]" if len(names) > 1 else f"{names[0]} [{part.unit}]")
    return ", ".join(words)
