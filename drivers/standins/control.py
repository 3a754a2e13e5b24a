"""Starting a stand-in as a process, and telling it what to get wrong while it runs.

    with StandIn("chatvla_edge.drivers.standins.robotiq", ["--port", "/tmp/gripper"], control) as gripper:
        gripper.tell(deactivate=True)   # a fault; the answer is what the stand-in knows of itself

A message is one JSON object, on a Unix socket that only its owner may use.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

MOST_BYTES = 1 << 20
READY = "ready"

Kind = TypeVar("Kind", bound="StandIn")
Answer = Callable[[dict[str, Any]], dict[str, Any]]


def serve(path: Path, answer: Answer) -> None:
    """Answer messages on a thread of its own for as long as the process lives."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(str(path))
    path.chmod(0o600)
    server.listen(4)

    def loop() -> None:
        while True:
            client, _ = server.accept()
            with client:
                while message := client.recv(MOST_BYTES):
                    try:
                        said = answer(json.loads(message))
                    except (ValueError, KeyError, TypeError, LookupError) as error:
                        said = {"error": f"{type(error).__name__}: {error}"}
                    client.send(json.dumps(said).encode())

    threading.Thread(target=loop, name="control", daemon=True).start()


def tell(path: Path, **what: Any) -> dict[str, Any]:
    """Send one message to the stand-in behind ``path`` and return its answer. Raises ValueError where it refuses."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.settimeout(5)
        client.connect(str(path))
        client.send(json.dumps(what).encode())
        said: dict[str, Any] = json.loads(client.recv(MOST_BYTES))
    if "error" in said:
        raise ValueError(said["error"])
    return said


class StandIn:
    """A stand-in's process: started and waited for on entering, ended on leaving."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        control: Path,
        *,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
        patience: float = 20.0,
        log: IO[Any] | None = None,
    ) -> None:
        self.command = [python, "-m", module, *arguments, "--control", str(control), "--with-parent"]
        self.control = control
        self.environment = dict(os.environ) | dict(environment or {})
        self.patience = patience
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self: Kind) -> Kind:
        """Start it and wait until it says that it is ready. Raises TimeoutError, RuntimeError where it ended."""
        self.process = subprocess.Popen(  # noqa: S603  # our own interpreter, our own module
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=self.environment
        )
        said: list[str] = []
        heard = threading.Event()

        def listen() -> None:
            assert self.process is not None
            assert self.process.stdout is not None
            for line in self.process.stdout:
                said.append(line.decode(errors="replace").rstrip())
                if said[-1] == READY:
                    heard.set()
            heard.set()

        threading.Thread(target=listen, daemon=True).start()
        done = heard.wait(self.patience)
        if READY not in said:
            self.close()
            told = "\n".join(said[-5:])
            if done:
                raise RuntimeError(f"the stand-in ended before it was ready: {' '.join(self.command)}\n{told}")
            raise TimeoutError(f"the stand-in was not ready after {self.patience} s: {' '.join(self.command)}\n{told}")
        return self

    def tell(self, **what: Any) -> dict[str, Any]:
        """What the module's `tell` does."""
        return tell(self.control, **what)

    def close(self) -> None:
        """End it. May be called twice."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process = None

    def __enter__(self: Kind) -> Kind:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()


def arguments(description: str) -> ArgumentParser:
    """A parser with what every stand-in takes."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--control", type=Path, required=True, help="socket on which faults are told")
    parser.add_argument("--with-parent", action="store_true", help="end with the process that holds our standard input")
    return parser


def begin(options: Namespace, answer: Answer) -> None:
    """Serve the control socket, end with the parent where asked, ask for real-time priority; then say ready."""
    if options.with_parent:

        def wait() -> None:
            sys.stdin.buffer.read()
            os._exit(0)

        threading.Thread(target=wait, name="parent", daemon=True).start()
    with contextlib.suppress(OSError):  # a bus is not late because a desktop is busy; without the right, it may be
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(85))
    serve(options.control, answer)
    sys.stdout.write(f"{READY}\n")
    sys.stdout.flush()


def until(done: Callable[[], bool], seconds: float) -> bool:
    """Wait for ``done()``, at most ``seconds``; whether it came."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
