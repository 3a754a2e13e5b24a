"""Host time, the absolute sleep, and rights that are obtained or refused, never a crash."""

import json
import os
import subprocess
import sys
import time

import pytest

from chatvla_edge.runtime import realtime

ASK = """
import json, os, resource, sys
from chatvla_edge.runtime import realtime
if sys.argv[1] == "nobody" and os.geteuid() == 0:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
grants = realtime.enter(40, {min(os.sched_getaffinity(0))})
print(json.dumps({grant.what: [grant.obtained, grant.detail] for grant in grants}))
print(json.dumps([os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK, os.sched_getparam(0).sched_priority]))
print(json.dumps(sorted(os.sched_getaffinity(0))))
"""


def ask(who: str) -> tuple[dict[str, tuple[bool, str]], list[int], list[int]]:
    """What `realtime.enter` reports in a process of its own; then its policy and priority, and its CPUs."""
    done = subprocess.run([sys.executable, "-c", ASK, who], capture_output=True, text=True, check=True)
    grants, scheduler, cpus = (json.loads(line) for line in done.stdout.splitlines())
    return {what: (obtained, detail) for what, (obtained, detail) in grants.items()}, scheduler, cpus


def test_host_time_is_the_monotonic_clock():
    before = time.monotonic_ns()
    assert before <= realtime.now_ns() <= time.monotonic_ns()


def test_the_sleep_ends_at_its_deadline_and_says_how_late():
    deadline = realtime.now_ns() + 5_000_000
    late = realtime.sleep_until_ns(deadline)
    assert late >= 0
    assert realtime.now_ns() >= deadline + late


def test_a_deadline_in_the_past_returns_at_once_with_its_lateness():
    assert realtime.sleep_until_ns(realtime.now_ns() - 7_000_000) >= 7_000_000


def test_a_deadline_before_time_began_is_refused():
    with pytest.raises(OSError, match="refused the deadline -1 ns"):
        realtime.sleep_until_ns(-1)


def test_a_process_without_rights_is_told_which_it_lacks_and_what_to_do():
    if os.geteuid() != 0:
        pytest.skip("what an ordinary user may do depends on the machine; as root the test becomes nobody")
    grants, scheduler, cpus = ask("nobody")
    assert grants["SCHED_FIFO"] == (
        False,
        "Operation not permitted; LimitRTPRIO=99 in the systemd unit, or `rtprio` in limits.conf",
    )
    obtained, detail = grants["mlockall"]
    assert not obtained
    assert detail == (
        "RLIMIT_MEMLOCK is 65536 bytes and allocations beyond it would fail; LimitMEMLOCK=infinity in the systemd unit"
    )
    assert not grants["/dev/cpu_dma_latency"][0]
    assert "udev rule" in grants["/dev/cpu_dma_latency"][1]
    assert scheduler == [os.SCHED_OTHER, 0]
    # These need no rights.
    assert grants["timer slack"] == (True, "1 ns")
    assert grants["CPU affinity"][0]
    assert len(cpus) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_root_obtains_what_the_machine_has():
    grants, scheduler, cpus = ask("root")
    refused = {what for what, (obtained, _) in grants.items() if not obtained}
    # A container may withhold the first two from root, and only a few machines run an RT kernel.
    assert refused <= {"/dev/cpu_dma_latency", "SCHED_FIFO", "PREEMPT_RT kernel"}
    assert scheduler == ([os.SCHED_FIFO, 40] if "SCHED_FIFO" not in refused else [os.SCHED_OTHER, 0])
    assert len(cpus) == 1


def test_any_user_gets_a_report_of_every_right():
    grants, _, _ = ask("me")
    assert set(grants) == {
        "timer slack", "/dev/cpu_dma_latency", "mlockall", "SCHED_FIFO", "PREEMPT_RT kernel", "CPU affinity",
    }  # fmt: skip
    assert all(detail for _, detail in grants.values())


def test_a_cpu_that_is_not_there_is_reported():
    grant = realtime.pin({4095})
    assert not grant.obtained
    assert "asked for [4095]" in grant.detail


@pytest.mark.parametrize("priority", [0, 100])
def test_a_priority_that_does_not_exist_is_a_mistake_of_the_caller(priority):
    with pytest.raises(ValueError, match="expected 1 to 99"):
        realtime.fifo(priority)
