"""A small bundle whose stages are arbitrary bytes: whole in every field, and executable by nothing."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILES: dict[str, bytes] = {
    "stages/vision_4x6.onnx": b"vision graph" * 50,
    "stages/vision_4x6.onnx.data": bytes(range(256)) * 40,
    "stages/vision_4x4.onnx": b"smaller vision graph" * 20,
    "stages/language.onnx": b"language graph" * 100,
    "stages/language.onnx.data": bytes(range(255, -1, -1)) * 60,
    "stages/embeddings.bin": bytes(320 * 64 * 2),
    "stages/condition.onnx": b"condition graph" * 30,
    "stages/denoise.onnx": b"denoise graph" * 30,
    "tokenizer.json": b'{"version": "1.0"}',
    "parity.json": b'{"results": []}',
    "probes/observation.npz": b"an observation" * 9,
    "documents/LICENSE": b"as you like it",
}


def tensor(name: str, *shape: int | str, dtype: str = "float32") -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


def stage(
    name: str, inputs: list, outputs: list, *, precision: str = "int8", data: tuple = (), **extents: list
) -> dict:
    dims = {symbol: {"min": low, "typical": usual, "max": high} for symbol, (low, usual, high) in extents.items()}
    return {
        "file": f"stages/{name}.onnx",
        "data": [f"stages/{name}.onnx.data" for _ in data],
        "precision": "int8",
        "inputs": inputs,
        "outputs": outputs,
        "dims": dims,
    }


def vision(rows: int, columns: int, *, data: tuple = ()) -> dict:
    patches = tensor("patches", "frames", rows * columns, 588)
    tokens = tensor("tokens", "frames", rows * columns // 4, 64)
    return {
        **stage(f"vision_{rows}x{columns}", [patches], [tokens], data=data, frames=[1, 2, 2]),
        "grid": [rows, columns],
    }


def language() -> dict:
    layers = [f"{kind}_{layer}" for layer in range(3) for kind in ("key", "value")]
    past, present = [f"past_{name}" for name in layers], [f"present_{name}" for name in layers]
    inputs = [tensor("embeddings", "rows", 64), tensor("positions", 3, "rows", dtype="int64")]
    inputs += [tensor("length", 1, dtype="int32"), tensor("range", 2, dtype="int32")]
    outputs = [tensor("token", "last", dtype="int64"), tensor("top2_logits", "last", 2)]
    outputs += [tensor("hidden", "last", 64), tensor("hidden_sum", 64)]
    cache = [1, 2, 128, 16]
    return {
        **stage(
            "language",
            inputs + [tensor(name, *cache) for name in past],
            outputs + [tensor(name, *cache) for name in present],
            data=("weights",),
            rows=[2, 64, 128],
            last=[2, 2, 64],
        ),
        "kv": {"capacity": 128, "dtype": "float32", "sharing": "in_place", "past": past, "present": present},
        "embeddings": {"file": "stages/embeddings.bin", "dtype": "float16", "shape": [320, 64]},
    }


GEOMETRY: dict[str, Any] = {
    "vision": {
        "depth": 2,
        "embed_dim": 32,
        "heads": 2,
        "mlp_ratio": 4,
        "patch": 14,
        "temporal_patch": 2,
        "merge": 2,
        "channels": 3,
    },
    "language": {
        "vocab": 320,
        "hidden": 64,
        "layers": 3,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "intermediate": 48,
        "rms_eps": 1e-6,
        "rope_theta": 1e6,
        "mrope_section": [2, 3, 3],
        "max_positions": 32768,
        "tied": True,
        "experts": {
            "routed": 8,
            "top_k": 2,
            "routed_width": 0,
            "router_bias": True,
            "scoring": "softmax",
            "renormalize": True,
            "shared": 1,
            "shared_width": 0,
            "shared_gate": False,
            "static": 0,
            "static_active": 0,
        },
    },
    "fusion": {"kind": "sum"},
    "head": {
        "depth": 4,
        "width": 32,
        "heads": 2,
        "mlp_width": 128,
        "action_dim": 10,
        "state_dim": 7,
        "horizon": 16,
        "cond_dim": 64,
        "conditioning": "norm",
        "combine_width": 1024,
        "reasoning": {"start": 2, "stop": 4, "final": True},
    },
}

POSE = {"arm": "right", "frame": "arm_base", "motion": "absolute"}
GRIPPER = {
    "kind": "gripper",
    "arm": "right",
    "unit": "fraction",
    "polarity": "larger_closes",
    "motion": "absolute",
}

SEMANTICS: dict[str, Any] = {
    "arms": [
        {
            "name": "right",
            "flange_to_tcp": {"translation": [0.0, 0.0, 0.1034], "quaternion_wxyz": [1.0, 0.0, 0.0, 0.0]},
        }
    ],
    "action": [
        {"kind": "tcp_position", "unit": "m", **POSE},
        {"kind": "tcp_rotation", "codec": "rot6d_rows_intrinsic_xyz_read_as_extrinsic", "unit": "1", **POSE},
        GRIPPER,
    ],
    "state": [
        {"kind": "tcp_position", "unit": "m", **POSE},
        {"kind": "tcp_rotation", "codec": "euler_xyz_extrinsic", "unit": "rad", **POSE},
        GRIPPER,
    ],
}


def contents() -> dict[str, Any]:
    """What an export would state, as JSON has it."""
    return {
        "format": "chatvla-edge-bundle",
        "schema_version": 1,
        "geometry": GEOMETRY,
        "semantics": SEMANTICS,
        "timing": {"rate_hz": 15.0, "first_step": -1, "pairing": "as_recorded"},
        "normalization": {
            "state_mean": [0.5] * 7,
            "state_std": [0.25] * 7,
            "action_min": [-1.0] * 10,
            "action_max": [1.5] * 10,
        },
        "cameras": [
            {
                "name": "right",
                "height": 480,
                "width": 640,
                "preprocessing": [
                    {"step": "jpeg", "quality": 70, "swapped": True},
                    {"step": "center_crop", "ratio": 0.95},
                    {"step": "resize", "height": 56, "width": 84, "filter": "bicubic"},
                ],
                "grid": [4, 6],
            },
            {
                "name": "wrist",
                "height": 120,
                "width": 120,
                "preprocessing": [
                    {"step": "rotate_180", "about": "pixel"},
                    {"step": "resize", "height": 56, "width": 56, "filter": "bilinear_cv2"},
                ],
                "grid": [4, 4],
            },
        ],
        "pixels": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
        "sampler": {
            "kind": "ddim",
            "train_steps": 100,
            "clip": 1.0,
            "steps": [
                {"timestep": 50, "signal": 0.6, "noise": 0.8, "next_signal": 0.8, "next_noise": 0.6},
                {"timestep": 0, "signal": 0.8, "noise": 0.6, "next_signal": 1.0, "next_noise": 0.0},
            ],
        },
        "prompt": {
            "template": "<|im_start|>user\n{images}{instruction}<|im_end|>\n<|im_start|>assistant\n",
            "tokens": {
                "im_start": 300,
                "im_end": 301,
                "vision_start": 302,
                "vision_end": 303,
                "image_pad": 304,
                "endoftext": 305,
                "stop": [301],
            },
            "max_reasoning_tokens": 64,
        },
        "target": {
            "name": "cpu",
            "engine": {"kind": "onnxruntime", "lowered_with": "1.23.2", "at_least": "1.22", "below": "2"},
            "sm": [],
            "jetpack": None,
        },
        "stages": {
            "vision": [vision(4, 6, data=("weights",)), vision(4, 4)],
            "language": language(),
            "condition": stage("condition", [tensor("means", 2, 64)], [tensor("modulations", 2, 10, 800)]),
            "denoise": stage("denoise", [tensor("x", 16, 10)], [tensor("x_next", 16, 10)]),
        },
        "tokenizer": "tokenizer.json",
        "parity": "parity.json",
        "probes": ["probes/observation.npz"],
        "plugin": [],
        "documents": ["documents/LICENSE"],
        "gates": {
            "results": [
                {
                    "name": "language/rms",
                    "kind": "lowering_parity",
                    "value": 3e-6,
                    "limit": 1e-5,
                    "verdict": "passed",
                },
                {
                    "name": "denoise/rms",
                    "kind": "quantization_error",
                    "value": None,
                    "limit": 0.1,
                    "verdict": "failed",
                },
            ],
            "allowed_failed_gates": ["denoise/rms"],
        },
        "provenance": {
            "checkpoint_sha256": "0" * 64,
            "checkpoint_name": "tiny",
            "variant": "ChatVLA-2 (reasoning-following)",
            "tools": {"onnx": "1.18.0", "torch": "2.6.0"},
            "calibration": {"name": "none to speak of", "sha256": "1" * 64, "samples": 4},
            "created": "2026-01-31",
        },
    }


def account(files: dict[str, bytes] = FILES) -> dict[str, Any]:
    """The manifest's `files`."""
    return {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in files.items()}


def manifest() -> dict[str, Any]:
    """A whole manifest without its seal."""
    return json.loads(json.dumps({**contents(), "files": account()}))


def manifest_of_joints() -> dict[str, Any]:
    """Another robot's: two arms in joint positions, for a Jetson, token ids in, no gate allowed to fail."""
    table = manifest()
    parts = [
        part
        for arm in ("left", "right")
        for part in (
            {
                "kind": "joint_positions",
                "arm": arm,
                "joints": [f"joint_{i}" for i in range(1, 7)],
                "unit": "rad",
                "motion": "absolute",
            },
            {**GRIPPER, "arm": arm, "unit": "m", "polarity": "larger_opens"},
        )
    ]
    arms = [{"name": arm, "flange_to_tcp": None} for arm in ("left", "right")]
    table["semantics"] = {"arms": arms, "action": parts, "state": parts}
    table["geometry"]["head"] |= {"action_dim": 14, "state_dim": 14}
    table["normalization"] = {
        "state_mean": [0.0] * 14,
        "state_std": [1.0] * 14,
        "action_min": [-3.0] * 14,
        "action_max": [3.0] * 14,
    }
    table["target"] = {
        "name": "orin-jp72",
        "engine": {"kind": "tensorrt", "lowered_with": "10.13.3", "at_least": "10.13", "below": None},
        "sm": [87],
        "jetpack": "7.2",
    }
    table["plugin"] = ["plugin/topk_moe.cu"]
    table["files"]["plugin/topk_moe.cu"] = {"sha256": "2" * 64, "size": 3}
    table["stages"]["language"]["embeddings"] = None
    del table["files"]["stages/embeddings.bin"]
    return json.loads(json.dumps(table))


def sealed(table: dict[str, Any]) -> bytes:
    """The text of a `manifest.json`, its seal computed here and not by the code under test."""
    table = {key: value for key, value in table.items() if key != "seal"}

    def text(value: object) -> bytes:
        return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()

    return text({**table, "seal": hashlib.sha256(text(table)).hexdigest()})


def lay(directory: Path, table: dict[str, Any] | None = None, files: dict[str, bytes] = FILES) -> Path:
    """A bundle laid out by hand, with no help from the writer; nothing about it is checked."""
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (directory / "manifest.json").write_bytes(sealed(manifest() if table is None else table))
    return directory


Place = tuple[str | int, ...]


def places(value: Any, path: Place = ()) -> Iterator[Place]:
    """Every place inside a JSON value, containers before what they hold."""
    if path:
        yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def at(value: Any, path: Place) -> Any:
    """What stands at a place."""
    for key in path:
        value = value[key]
    return value


def put(value: Any, path: Place, new: Any) -> Any:
    """A copy with something else at that place."""
    copy = json.loads(json.dumps(value))
    at(copy, path[:-1])[path[-1]] = new
    return copy


def path(dotted: str) -> Place:
    """`cameras.0.name` as a place."""
    return tuple(int(part) if part.isdigit() else part for part in dotted.split("."))
