"""A session's observations once more, answered by another bundle, beside what was answered then.

The way to accept a new quantization: same pictures, same state, same words, same noise. The pictures are the log's
JPEG ones and, where the log is thinner than the camera, the nearest in time, so even the session's own bundle does not
repeat its answers to the bit; how far it comes is the floor under every other comparison.
"""

import io
import json
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.drivers.rig import Rig
from chatvla_edge.runtime.bundle import Contents, components, open_bundle
from chatvla_edge.runtime.daemon import log_file, ros
from chatvla_edge.runtime.daemon.replay import Chunk
from chatvla_edge.runtime.engines.onnxruntime import Threads
from chatvla_edge.runtime.policy import Policy, ReasoningSettings

MS = 1e-6

NOTE = (
    "pictures went through JPEG on their way into the log, so they differ slightly from what was seen live: "
    "replay the session's own bundle to see how much that alone changes"
)


@dataclass(frozen=True)
class Query:
    """One query of the log: its report, and the host time of the logged picture nearest to each frame it saw."""

    report: dict[str, Any]
    pictures: dict[str, int]  # camera -> ns
    apart_ns: int  # the largest distance between a frame that was seen and the picture that stands for it


def queries(session: Path, cameras: tuple[str, ...], most: int | None = None) -> list[Query]:
    """The answered queries in order. Raises ValueError where there are none, or no pictures of a camera."""
    times: dict[str, list[int]] = {name: [] for name in cameras}
    reports = []
    topics = {f"/camera/{name}": name for name in cameras}
    for message in log_file.messages(session, {"/policy", *topics}):
        if message.topic in topics:
            times[topics[message.topic]].append(message.host_ns)
        elif "query" in (report := message.json()):
            reports.append(report)
    if not reports:
        raise ValueError(f"{session}: found no answered query, expected the log of a run whose policy answered")
    if blind := [name for name, found in times.items() if not found]:
        raise ValueError(
            f"{session}: found no pictures of {', '.join(blind)}, expected those of every camera of the bundle "
            "(`run --frame-rate`, with chatvla-edge[jpeg] installed)"
        )
    found = []
    for report in reports[:most]:
        pictures, apart = {}, 0
        for name in cameras:
            if name not in report["frames"]:
                raise ValueError(
                    f"{session}: query {report['query']} saw {', '.join(report['frames'])}; the bundle asks for {name}"
                )
            wanted = int(report["frames"][name]["captured_ns"])
            pictures[name] = _nearest(times[name], wanted)
            apart = max(apart, abs(pictures[name] - wanted))
        found.append(Query(report, pictures, apart))
    return found


def _nearest(times: list[int], wanted: int) -> int:
    after = bisect_left(times, wanted)
    return min(times[max(0, after - 1) : after + 1], key=lambda at: abs(at - wanted))


def _seen(session: Path, asked: list[Query]) -> Iterator[tuple[Query, list[NDArray[np.uint8]]]]:
    """Each query with its decoded pictures; only those of one query at a time are kept."""
    from PIL import Image

    waiting = list(reversed(asked))
    topics = {f"/camera/{name}": name for name in asked[0].pictures}
    wanted = {(name, at) for query in asked for name, at in query.pictures.items()}
    held: dict[tuple[str, int], bytes] = {}
    for message in log_file.messages(session, topics):
        key = (topics[message.topic], message.host_ns)
        if key in wanted:
            held[key] = ros.image_data(message.data)
        while waiting and all(pair in held for pair in waiting[-1].pictures.items()):
            query = waiting.pop()
            images = [np.asarray(Image.open(io.BytesIO(held[pair]))) for pair in query.pictures.items()]
            yield query, images
            oldest = (waiting[-1] if waiting else query).pictures
            held = {pair: data for pair, data in held.items() if pair[1] >= oldest[pair[0]]}


def replay(session: Path, bundle: Path, threads: int = 1, most: int | None = None) -> dict[str, Any]:
    """The queries of ``session`` answered by ``bundle``; ``most``: only the first so many.

    Returns ``queries`` (one line each), ``components`` (name, unit, rms and max of the chunks' difference, in that
    unit), ``texts_equal``, times in ms, ``notes``. Raises ValueError for a bundle that does not fit the session.
    """
    rig = Rig.model_validate(json.loads(log_file.metadata(session)["rig"]))
    asked = rig.policy
    every = asked.every_n_queries if asked.every_n_queries > 1 else None
    with open_bundle(bundle) as opened:
        manifest = opened.manifest
        policy = Policy(bundle, manifest, Threads(threads), ReasoningSettings(every, asked.reasoning_max_age))
    found = queries(session, tuple(camera.name for camera in manifest.cameras), most)
    policy.query(
        [np.full((camera.height, camera.width, 3), 128, np.uint8) for camera in manifest.cameras],
        np.asarray(manifest.normalization.state_mean, np.float32),
        "wait",
        policy.noise(0),
    )  # the first run of an engine is a slow one
    lines: list[dict[str, Any]] = []
    differences = []
    draft: list[int] = []
    last = -1
    for query, images in _seen(session, found):
        report = query.report
        if report["query"] <= last or not lines:  # the policy's process was started anew, and remembers nothing
            policy.forget()
            draft = []
        last = report["query"]
        begun = time.perf_counter()
        answer = policy.query(
            images, np.asarray(report["state"], np.float32), report["instruction"], policy.noise(last),
            draft=draft, observed_ns=int(report["state_ns"]),
        )  # fmt: skip
        seconds = time.perf_counter() - begun
        draft = answer.token_ids
        difference = answer.chunk.astype(np.float64) - _recorded(session, report, manifest)
        differences.append(difference)
        lines.append(
            {
                "query": last,
                "text_equal": _same_text(report, answer.text),
                "recorded_text": report["text"],
                "text": answer.text,
                "rms": float(np.sqrt(np.mean(difference**2))),
                "max": float(np.abs(difference).max()),
                "recorded_ms": MS * (report["done_ns"] - report["begun_ns"]),
                "ms": 1e3 * seconds,
                "picture_apart_ms": MS * query.apart_ns,
            }
        )
    away = np.stack(differences)
    notes = [NOTE]
    if rig.servo.fusion == "rtc":
        notes.append("the committed prefix of real-time chunking is not in the log: chunks were made without one")
    return {
        "bundle": str(bundle),
        "queries": lines,
        "texts_equal": sum(line["text_equal"] for line in lines),
        "same_picture": sum(line["picture_apart_ms"] == 0 for line in lines),
        "recorded_ms_p50": float(np.median([line["recorded_ms"] for line in lines])),
        "ms_p50": float(np.median([line["ms"] for line in lines])),
        "components": [
            {
                "name": name,
                "unit": unit,
                "rms": float(np.sqrt(np.mean(away[..., number] ** 2))),
                "max": float(np.abs(away[..., number]).max()),
            }
            for number, (name, unit) in enumerate(components(manifest.semantics.action))
        ],
        "notes": notes,
    }


def _same_text(report: dict[str, Any], text: str) -> bool:
    """A text that was too long for the log stands there cut."""
    return bool(report["text"] == (text[: len(report["text"])] if report.get("cut") else text))


def _recorded(session: Path, report: dict[str, Any], manifest: Contents) -> NDArray[np.float64]:
    head = manifest.geometry.head
    chunk = Chunk.of(report, 1).actions
    if chunk.size != head.horizon * head.action_dim:
        raise ValueError(
            f"{session}: chunks of {chunk.size} numbers; the bundle answers {head.horizon} x {head.action_dim}"
        )
    return chunk.reshape(head.horizon, head.action_dim)
