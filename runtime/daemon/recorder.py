"""The recorder's process: everything that the rings and slots of a run tell, into the session's log.

It only reads. Wedged or killed, it costs the run nothing but the log, and what it missed stands in the log as a
numbered gap with its reason. Frames give way first: while the disk or the codec is behind, they are dropped and
counted, ticks are not.
"""

import io
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from chatvla_edge.drivers.rig import Rig
from chatvla_edge.runtime.camera_frames import FrameReader
from chatvla_edge.runtime.daemon import ros
from chatvla_edge.runtime.daemon.log_file import STAMPS, Channel, LogWriter, image_channel, joint_channel
from chatvla_edge.runtime.daemon.records import EVENT_BYTES, EVENTS, RECORDER, REPORT_BYTES, REPORTS, unpacked
from chatvla_edge.runtime.realtime import now_ns
from chatvla_edge.runtime.servo_records import STATE, telemetry
from chatvla_edge.runtime.slots import Ring, Slot, SlotBusyError

log = logging.getLogger(__name__)

S = 1_000_000_000
TURN_S = 0.05  # how often the rings are emptied
FLUSH_NS = S // 2  # what a killed recorder loses at most, with one turn
SYNC_NS = 5 * S  # what a power cut loses at most
VIEW_NS = S // 25  # between two joint states for viewers
FREE_BYTES = 256 * 2**20  # below this the disk counts as full: others need it, too
RETRY_NS = 2 * S
QUALITY = 85
SILENT_S = 1.0  # without a tick: the servo has ended


@dataclass(frozen=True)
class RecorderWires:
    """Descriptors that the recorder's process inherits."""

    telemetry: int
    telemetry_rows: int
    states: dict[str, int]
    state_rows: int
    frames: dict[str, tuple[int, int]]
    reports: int
    events: int
    own: int

    @property
    def fds(self) -> tuple[int, ...]:
        """For ``pass_fds``."""
        frames = (fd for pair in self.frames.values() for fd in pair)
        return (self.telemetry, *self.states.values(), *frames, self.reports, self.events, self.own)


def jpeg_encoder() -> "Callable[[np.ndarray[Any, Any]], bytes] | None":
    """[H, W, 3] uint8 RGB -> JPEG; None without Pillow (`chatvla-edge[jpeg]`), and the log then holds no pictures."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        return None

    def encode(image: "np.ndarray[Any, Any]") -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=QUALITY)
        return buffer.getvalue()

    return encode


@dataclass
class Source:
    """A ring of rows and where they go."""

    topic: str
    ring: Ring
    dtype: "np.dtype[Any]"
    capacity: int
    reader: Any = None
    rows: Any = None
    stamps: Any = None
    dropped: int = 0

    def __post_init__(self) -> None:
        """Begin behind the newest record."""
        self.reader = self.ring.reader()
        self.rows = np.zeros(self.capacity, self.dtype)
        self.stamps = np.zeros((self.capacity, 3), np.int64)

    def take(self) -> int:
        """How many rows came, at the start of `rows` and `stamps`."""
        return int(self.reader.read(self.rows, self.stamps))


@dataclass
class Recorder:
    """``settings``: see `main`. `turn` does what is due; `close` ends the log."""

    settings: dict[str, Any]
    quitting: bool = False
    said: Any = field(default_factory=lambda: np.zeros((), RECORDER))

    def __post_init__(self) -> None:
        """Attach to everything."""
        settings = self.settings
        wires = RecorderWires(**settings["wires"])
        rig = Rig.model_validate(settings["rig"])
        row = telemetry(settings["components"], settings["axes"])
        ring = Ring.attach(wires.telemetry, row.itemsize, wires.telemetry_rows)
        self.ticks = Source("/ticks", ring, row, 1024)
        stamped = np.dtype([*STAMPS, *STATE.descr])
        self.stamped = stamped
        self.states = [
            Source(f"/state/{name}", Ring.attach(fd, STATE.itemsize, wires.state_rows), STATE, 512)
            for name, fd in wires.states.items()
        ]
        self.reports = Source("/policy", Ring.attach(wires.reports, REPORT_BYTES, REPORTS), _raw(REPORT_BYTES), 8)
        self.events = Source("/events", Ring.attach(wires.events, EVENT_BYTES, EVENTS), _raw(EVENT_BYTES), 64)
        self.cameras = {
            name: FrameReader.attach(*fds, rig.cameras[name].height, rig.cameras[name].width)
            for name, fds in wires.frames.items()
        }
        self.numbers = dict.fromkeys(self.cameras, 0)
        self.frame_period_ns = round(S / settings["frame_rate"]) if settings["frame_rate"] else 0
        self.frame_due_ns = dict.fromkeys(self.cameras, 0)
        self.encode = jpeg_encoder() if settings["frame_rate"] else None
        self.names = settings["axis_names"]
        self.own = Slot.attach(wires.own, RECORDER.itemsize, write=True)
        about = {"rig": json.dumps(settings["rig"]), **settings["about"]}
        self.log = LogWriter(Path(settings["folder"]), about, settings["rotate_bytes"])
        self.log.declare(Channel.rows("/ticks", row))
        for source in self.states:
            self.log.declare(Channel.rows(source.topic, stamped))
        for name in self.cameras:
            self.log.declare(image_channel(f"/camera/{name}"))
            self.log.declare(Channel.json(f"/camera/{name}/frame"))
        for topic in ("/joints/sent", "/joints/measured"):
            self.log.declare(joint_channel(topic))
        for topic in ("/policy", "/events", "/gaps"):
            self.log.declare(Channel.json(topic))
        self.last_tick = 0
        self.lost_because = "the recorder began after them"
        self.open = False
        self.retry_ns = 0
        self.flushed_ns = self.synced_ns = self.viewed_ns = 0

    # ------------------------------------------------------------------------------------------------------- one turn

    def turn(self, now: int) -> None:
        """Empty every ring into the log; survive a disk that takes nothing."""
        try:
            if not self.open:
                if now < self.retry_ns or not self._room():
                    raise OSError(28, f"{self.log.folder}: less than {FREE_BYTES >> 20} MiB free")
                self.log.reopen()
                self.open = True
            self._ticks()
            for source in self.states:
                self._rows(source)
            for source in (self.reports, self.events):
                self._json(source)
            self._frames(now)
            if now - self.flushed_ns >= FLUSH_NS:
                to_disk = now - self.synced_ns >= SYNC_NS
                self.log.flush(to_disk)
                self.flushed_ns = now
                self.synced_ns = now if to_disk else self.synced_ns
                if to_disk and not self._room():
                    raise OSError(28, f"{self.log.folder}: less than {FREE_BYTES >> 20} MiB free")
                if self.log.full:
                    self.log.reopen()
            self.said["disk_full"] = 0
        except OSError as error:
            self._no_disk(error, now)
        self.said["bytes"] = self.log.size
        self.own.publish(self.said)

    def _room(self) -> bool:
        return shutil.disk_usage(self.log.folder).free > FREE_BYTES

    def _no_disk(self, error: OSError, now: int) -> None:
        if self.open or not self.said["disk_full"]:
            log.error("the log takes nothing more: %s", error)
        if self.open:
            self.log.close()
            self.open = False
        if now >= self.retry_ns:
            self.retry_ns = now + RETRY_NS
        self.said["disk_full"] = 1
        # The rings go on; what they lose now is the disk's fault.
        self.lost_because = f"disk: {error.strerror or error}"
        for source in (self.ticks, *self.states, self.reports, self.events):
            while source.take():
                pass

    def _ticks(self) -> None:
        source = self.ticks
        while count := source.take():
            rows = source.rows[:count]
            first, last = int(rows["tick"][0]), int(rows["tick"][-1])
            at = int(rows["tick_ns"][0])
            if first < self.last_tick + 1:
                self._gap(self.last_tick, first, "the servo was started anew and counts from its first tick", at)
            elif first > self.last_tick + 1:
                self._gap(self.last_tick + 1, first - 1, self.lost_because, at)
            self.lost_because = "the recorder was late and the ring went round"
            self.log.write("/ticks", rows.tobytes(), at, first)
            self.said["ticks"] += count
            self.last_tick = last
            if at - self.viewed_ns >= VIEW_NS:
                self.viewed_ns = at
                for topic in ("sent", "measured"):
                    stamp = int(rows["tick_ns"][-1]) + self.log.offset_ns
                    values = rows[topic][-1].tolist()
                    self.log.write(f"/joints/{topic}", ros.joint_state(stamp, "", self.names, values), at)

    def _gap(self, first: int, last: int, why: str, at: int) -> None:
        self.said["gaps"] += 1
        if last >= first:
            self.said["ticks_lost"] += last - first + 1
        gap = {"number": int(self.said["gaps"]), "from": first, "to": last, "why": why}
        self.log.write_json("/gaps", gap, at)

    def _rows(self, source: Source) -> None:
        while count := source.take():
            rows = np.zeros(count, self.stamped)
            for i, (name, _) in enumerate(STAMPS):
                rows[name] = source.stamps[:count, i]
            for name in STATE.names or ():
                rows[name] = source.rows[name][:count]
            self.log.write(source.topic, rows.tobytes(), int(rows["published_ns"][0]), int(rows["sequence"][0]))

    def _json(self, source: Source) -> None:
        while count := source.take():
            for record, stamps in zip(source.rows[:count], source.stamps[:count], strict=True):
                values = unpacked(record.tobytes())
                if values is not None:
                    self.log.write_json(source.topic, values, int(stamps[1]), int(stamps[0]))

    def _frames(self, now: int) -> None:
        for name, camera in self.cameras.items():
            if not self.frame_period_ns or now < self.frame_due_ns[name]:
                continue
            try:
                frame = camera.newer()
            except SlotBusyError:
                continue
            if frame is None:
                continue
            # What was published in between was not looked at: by intent where the log is thinner than the camera.
            self.said["frames_passed"] += max(0, frame.number - self.numbers[name] - 1)
            self.numbers[name] = frame.number
            self.frame_due_ns[name] = max(self.frame_due_ns[name] + self.frame_period_ns, now - self.frame_period_ns)
            stamps = {
                "sequence": frame.sequence,
                "number": frame.number,
                "captured_ns": frame.captured_ns,
                "received_ns": frame.received_ns,
                "published_ns": frame.published_ns,
                "clock": frame.clock,
            }
            if self.encode is not None:
                picture = self.encode(frame.image)
                stamp = frame.captured_ns + self.log.offset_ns
                message = ros.compressed_image(stamp, name, picture)
                self.log.write(f"/camera/{name}", message, frame.captured_ns, frame.number)
            self.log.write_json(f"/camera/{name}/frame", stamps, frame.captured_ns, frame.number)
            self.said["frames"] += 1

    def run(self) -> None:
        """Until told to end; then once more, so that the last events are in.

        Without its parent it goes on until the servo, too, has ended, so that the log holds how the arms came to rest.
        """
        if self.settings["frame_rate"] and self.encode is None:
            log.warning("no pictures in the log: install chatvla-edge[jpeg]")
        orphaned, moved, tick = 0.0, 0.0, 0
        while not self.quitting:
            begun = time.monotonic()
            self.turn(now_ns())
            if self.last_tick != tick:
                tick, moved = self.last_tick, begun
            if not orphaned and os.getppid() != self.settings["parent"]:
                orphaned = begun
            if orphaned and begun - max(orphaned, moved) > SILENT_S:
                break
            time.sleep(max(0.0, TURN_S - (time.monotonic() - begun)))
        self.turn(now_ns())
        if self.open:
            self.log.close()


def _raw(size: int) -> "np.dtype[Any]":
    return np.dtype([("record", "u1", (size,))])


def main() -> None:
    """``python -m chatvla_edge.runtime.daemon.recorder`` with one JSON spec on standard input.

    The spec: ``rig``, ``wires``, ``folder``, ``components``, ``axes``, ``axis_names``, ``about`` (for the log's
    metadata), ``frame_rate`` (pictures per second and camera; 0 for none), ``rotate_bytes``,
    ``parent``: with which it ends.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s recorder %(message)s")
    recorder = Recorder(json.load(sys.stdin))
    os.nice(5)

    def leave(*_: object) -> None:
        recorder.quitting = True

    signal.signal(signal.SIGTERM, leave)
    recorder.run()


if __name__ == "__main__":
    main()
