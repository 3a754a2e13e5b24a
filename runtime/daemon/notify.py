"""systemd's notification socket: `READY=1`, `WATCHDOG=1`, `STOPPING=1`, `STATUS=...`; silent where there is none."""

import os
import socket


def notify(*lines: str) -> bool:
    """Tell systemd. False where nobody asked to be told (`$NOTIFY_SOCKET`), or nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
        connection.setblocking(False)
        try:
            connection.sendto("\n".join(lines).encode(), address)
        except OSError:
            return False
    return True


def watchdog_period() -> float | None:
    """Half of systemd's watchdog time, s: how often to say `WATCHDOG=1`; None where it is not asked for."""
    text, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not text.isdigit() or (pid and pid != str(os.getpid())):
        return None
    return int(text) / 2e6
