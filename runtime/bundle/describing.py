"""What a bundle is, for people: the table that `inspect` prints, and the same as JSON."""

from typing import Any

from .manifest import Manifest
from .semantics import Gripper, Part, TcpPosition, TcpRotation


def describe(manifest: Manifest, seal: str) -> dict[str, Any]:
    """Return what matters about a bundle as JSON values; `lines` makes text of it."""
    geometry, target = manifest.geometry, manifest.target
    experts, head = geometry.language.experts, geometry.head
    return {
        "bundle": seal,
        "policy": {
            "variant": manifest.provenance.variant,
            "checkpoint": manifest.provenance.checkpoint_name,
            "checkpoint_sha256": manifest.provenance.checkpoint_sha256,
            "language": f"{geometry.language.layers} layers of {geometry.language.hidden}",
            "experts": {"routed": experts.routed, "top_k": experts.top_k, "shared": experts.shared},
            "head": f"{head.depth} blocks of {head.width}",
        },
        "target": {
            "name": target.name,
            "engine": f"{target.engine.kind} {target.engine.range}",
            "lowered_with": target.engine.lowered_with,
            "sm": list(target.sm),
            "jetpack": target.jetpack,
        },
        "cameras": {
            camera.name: {
                "size": [camera.height, camera.width],
                "steps": [step.model_dump(mode="json") for step in camera.preprocessing],
                "image_tokens": camera.grid[0] * camera.grid[1] // geometry.vision.merge**2,
            }
            for camera in manifest.cameras
        },
        "chunk": {
            "horizon": head.horizon,
            "rate_hz": manifest.timing.rate_hz,
            "first_step": manifest.timing.first_step,
            "pairing": manifest.timing.pairing,
            "sampler_steps": len(manifest.sampler.steps),
        },
        "action": [_meaning(part) for part in manifest.semantics.action],
        "state": [_meaning(part) for part in manifest.semantics.state],
        "stages": {
            name: {"precision": stage.precision, "bytes": sum(manifest.files[file].size for file in stage.files)}
            for name, stage in manifest.stages.named()
        },
        "reasoning": {
            "max_tokens": manifest.prompt.max_reasoning_tokens,
            "kv_capacity": manifest.stages.language.kv.capacity,
        },
        "gates": {
            "passed": sum(result.verdict == "passed" for result in manifest.gates.results),
            "reported": sum(result.verdict == "reported" for result in manifest.gates.results),
            "allowed_failed_gates": list(manifest.gates.allowed_failed_gates),
        },
        "tools": dict(manifest.provenance.tools),
        "files": len(manifest.files),
        "bytes": sum(file.size for file in manifest.files.values()),
    }


def lines(description: dict[str, Any], indent: str = "") -> list[str]:
    """Return a description as indented lines of text."""
    text = []
    for key, value in description.items():
        if isinstance(value, dict):
            text += [f"{indent}{key}", *lines(value, indent + "  ")]
        elif isinstance(value, list):
            text.append(f"{indent}{key}: {'; '.join(map(_flat, value)) or 'none'}")
        else:
            text.append(f"{indent}{key}: {_flat(value)}")
    return text


def _meaning(part: Part) -> str:
    """Return a phrase: `right tcp_rotation, rot6d_rows, in arm_base [1] x 6`."""
    words = [f"{part.arm} {part.kind}"]
    if isinstance(part, TcpRotation):
        words.append(part.codec)
    if isinstance(part, TcpPosition | TcpRotation):
        words.append(f"in {part.frame}")
    if isinstance(part, Gripper):
        words.append(part.polarity)
    return f"{', '.join(words)} [{part.unit}] x {len(part.components)}"


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(str(part) for part in value.values())
    return "none" if value is None else str(value)
