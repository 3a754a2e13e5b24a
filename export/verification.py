"""A bundle beside the checkpoint it came from, on a workstation: `verify BUNDLE --checkpoint C`.

The probes that travel with a bundle say what its exporter thought right. Here the reference is built anew from the
checkpoint, looks at observations that no bundle has seen, and the same gates judge. The command line finds this by an
entry point: the runtime, whose command it is, knows no checkpoint.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from chatvla_edge.export.bisect import bisect
from chatvla_edge.export.checkpoint.reader import Checkpoint, open_checkpoint
from chatvla_edge.export.identity import checkpoint_digest
from chatvla_edge.export.lower import onnxruntime as cpu
from chatvla_edge.export.model.images import Preprocessing
from chatvla_edge.export.probes import dequantized, observation, probe_file, reference, scenes
from chatvla_edge.runtime.bundle import Bundle, GateResult, Manifest
from chatvla_edge.runtime.gates import Part, gates_of, judge, read_probe

# Scenes of an export are numbered from 0.
UNSEEN = 1000


def against_checkpoint(
    bundle: Bundle,
    path: Path,
    *,
    base: Path | None,
    task: str | None,
    probes: int,
    threads: int,
    say: Callable[[str], None],
) -> tuple[list[GateResult], list[Part]]:
    """Judge the bundle by the checkpoint: every gate, and every part of every stage by itself.

    say: told what happens now. Raises ValueError for a checkpoint that the bundle was not exported from.
    """
    manifest = bundle.manifest
    checkpoint = open_checkpoint(path, base=base)
    say("comparing checkpoints")
    _refuse_other(bundle, checkpoint)
    normalization = checkpoint.normalization(task)
    prompt = checkpoint.prompt()
    cameras = {camera.name: Preprocessing(camera.preprocessing) for camera in manifest.cameras}
    sizes = [(camera.height, camera.width) for camera in manifest.cameras]
    say("reading the checkpoint")
    model = checkpoint.model()
    language = manifest.stages.language
    held = dequantized(model, cpu.Target(language.precision, language.kv.capacity).form)
    longest = manifest.prompt.max_reasoning_tokens
    seen = scenes(probes, sizes, normalization, manifest.geometry.head.horizon, first=UNSEEN)
    observed = [observation(checkpoint.spec, cameras, prompt, normalization, scene) for scene in seen]
    asked: dict[str, Mapping[str, Any]] = {}
    for index, (scene, looked) in enumerate(zip(seen, observed, strict=True)):
        say(f"asking the reference, {index + 1} of {probes}")
        common = (prompt, list(cameras.values()), normalization, scene, longest)
        references = {"lowering_parity": reference(held, *common), "quantization_error": reference(model, *common)}
        asked[f"scene {UNSEEN + index}"] = read_probe(probe_file(looked, references))
    say("running the gates")
    results = judge(bundle.path, manifest, asked, threads)
    if manifest.target.name != "cpu":
        return results, []
    parts = bisect(bundle.path, manifest, held, observed[0], threads, lambda stage: say(f"taking {stage} apart"))
    return results + gates_of(parts), parts


def _refuse_other(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Raise where the bundle came from another checkpoint: other weights, or other sizes."""
    manifest, found = bundle.manifest, checkpoint_digest(checkpoint)
    stated = manifest.provenance
    if found != stated.checkpoint_sha256:
        raise ValueError(
            f"{bundle.path} was exported from the checkpoint {stated.checkpoint_name!r} "
            f"({stated.checkpoint_sha256[:12]}), found {checkpoint.path} ({found[:12]}): they hold different weights. "
            "Name the checkpoint that it came from, or export this one"
        )
    if differing := list(_differing(manifest, checkpoint)):
        raise ValueError(
            f"{bundle.path} was exported from these weights as another policy: {'; '.join(differing[:5])}. Something "
            f"in {checkpoint.path} (config.json, most likely) has changed since: put it back, or export anew"
        )


def _differing(manifest: Manifest, checkpoint: Checkpoint) -> Iterator[str]:
    stated, found = manifest.geometry.model_dump(), checkpoint.spec.model_dump()
    yield from _leaves("", stated, found)


def _leaves(where: str, stated: object, found: object) -> Iterator[str]:
    if isinstance(stated, dict) and isinstance(found, dict):
        for name, value in stated.items():
            yield from _leaves(f"{where}.{name}" if where else name, value, found.get(name))
    elif stated != found:
        yield f"{where} is {stated} in the bundle, {found} in the checkpoint"
