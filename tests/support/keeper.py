"""The supervisor's part of the servo plane in a process of its own, so that a test can stop or kill it.

Run as a script: keeper.py LEASE_FD LEASE_MS. Grants the lease again every 10 ms until it is ended.
"""

import sys
import time

from chatvla_edge.runtime import realtime
from chatvla_edge.runtime.pages import Lease


def main():
    realtime.fifo(60)
    lease = Lease.attach(int(sys.argv[1]), write=True)
    while True:
        lease.grant(int(sys.argv[2]) * 1_000_000)
        time.sleep(0.01)


if __name__ == "__main__":
    main()
