"""One daemon per rig: an exclusive claim on the rig's name.

The claim is a listening abstract Unix socket. Why not a lock file in XDG_RUNTIME_DIR: that directory belongs to one
user, so two users would hold two different locks on one robot, and a logout sweeps it away while the daemon runs, after
which a new file is free to lock. An abstract name is one for all users of the host, has no file that could be left,
swept or owned by the wrong user, and is freed by the kernel with the last process that holds the socket.

That last point is used: the claim is handed down (``pass_fds``) to each child that can move an arm, so a daemon that
was killed does not free the name while one of its arm processes still lives.

What it does not do: the name is scoped to the network namespace, so a daemon in a container with its own does not see
one outside; and any local user can hold a name, to keep a rig from starting (not to make it move).
"""

import errno
import os
import re
import socket
import struct
from types import TracebackType

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class RigClaimedError(RuntimeError):
    """Another process holds the rig."""


class RigClaim:
    """Holds the rig ``rig`` from construction until `close` or the end of this process and of all that inherited it.

    Raises RigClaimedError that names the holder, ValueError for a name that is no rig name.
    """

    def __init__(self, rig: str) -> None:
        if not NAME.fullmatch(rig):
            raise ValueError(f"rig name {rig!r}; expected 1 to 64 letters, digits, '_', '-' or '.'")
        address = f"\0chatvla-edge/rig/{rig}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.bind(address)
        except OSError as error:
            self._socket.close()
            if error.errno != errno.EADDRINUSE:
                raise
            raise RigClaimedError(f"rig {rig!r} is driven by {_holder(address)}") from None
        # Listening is what lets a refused daemon ask the kernel who we are. Nobody accepts: the backlog is the number
        # of refusals that get a name for an answer, and costs nothing until then.
        self._socket.listen(socket.SOMAXCONN)

    def fileno(self) -> int:
        """The descriptor to hand down, with ``pass_fds``, to each child that can move an arm."""
        return self._socket.fileno()

    def close(self) -> None:
        """Give the claim up, in this process."""
        self._socket.close()

    def __enter__(self) -> "RigClaim":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _holder(address: str) -> str:
    """Who listens at ``address``, for the sentence to the operator."""
    asking = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    asking.setblocking(False)
    try:
        asking.connect(address)
        credentials = asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except OSError:
        return "another process (which one the kernel does not say). Stop it first."
    finally:
        asking.close()
    pid, uid, _ = struct.unpack("3i", credentials)
    if pid == 0:
        return "a process of another container. Stop it first."
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return f"a child of process {pid}, which has ended; it may still move an arm. End it first."
    except PermissionError:
        pass  # it lives, under another user
    return f"process {pid} of user {uid}. Stop it first (`chatvla-edge stop`, or `kill {pid}`)."
