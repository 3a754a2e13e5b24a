"""The control socket: a Unix stream socket of mode 0600, one JSON object per line each way.

The server is turned by the supervisor's own loop: nothing here waits, no thread is needed, and a client that stops
reading loses its connection, not the supervisor's time.
"""

import json
import os
import selectors
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MOST_CLIENTS = 16
MOST_BYTES = 64 * 1024  # of one request, and of what waits for a client that does not read
Answer = dict[str, Any]


class ControlError(ValueError):
    """The daemon did not answer, or not as a daemon of this version does."""


class _Client:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.heard = b""
        self.unsent = b""


class Server:
    """Answers requests. `turn` serves whatever has come, and returns at once."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            self._listener.bind(str(path))
        finally:
            os.umask(mask)
        self._listener.listen(MOST_CLIENTS)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._clients: list[_Client] = []

    def turn(self, serve: Callable[[Any], Answer]) -> None:
        """Answer each whole line with ``serve``'s object. A line that is no JSON object is answered with an error."""
        for key, _ in self._selector.select(timeout=0):
            if key.data is None:
                self._accept()
            else:
                self._hear(key.data)
        for client in list(self._clients):
            while b"\n" in client.heard and client in self._clients:
                line, _, client.heard = client.heard.partition(b"\n")
                client.unsent += json.dumps(_answered(line, serve)).encode() + b"\n"
            self._send(client)

    def close(self) -> None:
        """End all connections and take the socket away."""
        for client in list(self._clients):
            self._drop(client)
        self._selector.close()
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        if len(self._clients) >= MOST_CLIENTS:
            connection.close()
            return
        connection.setblocking(False)
        client = _Client(connection)
        self._clients.append(client)
        self._selector.register(connection, selectors.EVENT_READ, client)

    def _hear(self, client: _Client) -> None:
        try:
            data = client.connection.recv(MOST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        client.heard += data
        if not data or len(client.heard) > MOST_BYTES:
            self._drop(client)

    def _send(self, client: _Client) -> None:
        if not client.unsent or client not in self._clients:
            return
        try:
            sent = client.connection.send(client.unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._drop(client)
            return
        client.unsent = client.unsent[sent:]
        if len(client.unsent) > MOST_BYTES:
            self._drop(client)

    def _drop(self, client: _Client) -> None:
        if client in self._clients:
            self._clients.remove(client)
            self._selector.unregister(client.connection)
            client.connection.close()


def _answered(line: bytes, serve: Callable[[Any], Answer]) -> Answer:
    try:
        request = json.loads(line)
    except ValueError as error:
        return {"ok": False, "text": f"expected one JSON object per line, found: {error}"}
    if not isinstance(request, dict):
        return {"ok": False, "text": f"expected a JSON object, found {type(request).__name__}"}
    return serve(request)


class Client:
    """A connection to a daemon. ``timeout``: how long (s) one answer may take."""

    def __init__(self, path: Path, timeout: float = 3.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise ControlError(f"{path}: no daemon answers ({error.strerror or error})") from error
        self._lines = self._read()

    def ask(self, request: dict[str, Any]) -> Answer:
        """Send a request and wait for its answer. Raises ControlError."""
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            answer = json.loads(next(self._lines))
        except (OSError, StopIteration, ValueError) as error:
            raise ControlError(f"the daemon did not answer `{request.get('act', '')}`: {error!r}") from error
        if not isinstance(answer, dict):
            raise ControlError(f"expected a JSON object from the daemon, found {type(answer).__name__}")
        return answer

    def _read(self) -> Iterator[bytes]:
        heard = b""
        while data := self._socket.recv(65536):
            heard += data
            while b"\n" in heard:
                line, _, heard = heard.partition(b"\n")
                yield line

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ask(path: Path, request: dict[str, Any], timeout: float = 3.0) -> Answer:
    """One request over a connection of its own."""
    with Client(path, timeout) as client:
        return client.ask(request)
