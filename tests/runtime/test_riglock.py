"""One daemon per rig, whatever happens to the first one."""

import os
import signal
import subprocess
import sys
import time
import uuid

import pytest

from chatvla_edge.runtime.riglock import RigClaim, RigClaimedError

HOLDER = """
import subprocess, sys
from chatvla_edge.runtime.riglock import RigClaim
claim = RigClaim(sys.argv[1])
if sys.argv[2:]:
    arm = subprocess.Popen(["sleep", "60"], pass_fds=[claim.fileno()])
    print(arm.pid, flush=True)
else:
    print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def rig() -> str:
    return f"test-{uuid.uuid4().hex}"


def hold(rig: str, *arguments: str) -> tuple[subprocess.Popen[bytes], bytes]:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, rig, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    return child, child.stdout.readline().strip()


def kill(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdin.close()
    child.stdout.close()


def test_a_second_daemon_is_refused_with_the_holders_pid_and_sigkill_frees_the_rig(rig):
    child, _ = hold(rig)
    try:
        with pytest.raises(
            RigClaimedError, match=rf"rig '{rig}' is driven by process {child.pid} of user {os.getuid()}\."
        ):
            RigClaim(rig)
    finally:
        kill(child)
    RigClaim(rig).close()


def test_a_killed_daemon_whose_arm_process_lives_still_holds_the_rig(rig):
    child, arm = hold(rig, "with an arm process")
    try:
        kill(child)
        with pytest.raises(RigClaimedError, match=rf"a child of process {child.pid}, which has ended"):
            RigClaim(rig)
    finally:
        os.kill(int(arm), signal.SIGKILL)
    # The orphan is nobody's to wait for, so wait for the name.
    deadline = time.monotonic() + 10
    while True:
        try:
            RigClaim(rig).close()
            return
        except RigClaimedError:
            assert time.monotonic() < deadline, "the rig is still held 10 s after its last process was killed"
            time.sleep(0.01)


def test_a_claim_that_was_given_up_is_free_and_rigs_do_not_exclude_each_other(rig):
    with RigClaim(rig), RigClaim(rig + "-b"), pytest.raises(RigClaimedError):
        RigClaim(rig)
    with RigClaim(rig) as claim:
        assert not os.get_inheritable(claim.fileno())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_another_user_is_refused_too(rig):
    with RigClaim(rig):
        asked, answer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setuid(65534)
            try:
                RigClaim(rig)
            except RigClaimedError as error:
                os.write(answer, str(error).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        os.close(answer)
        with os.fdopen(asked) as said:
            assert f"process {os.getpid()} of user 0" in said.read()


@pytest.mark.parametrize("name", ["", "a/b", "ü", "-x", "a" * 65, "two words"])
def test_what_is_no_rig_name_is_refused(name):
    with pytest.raises(ValueError, match="expected 1 to 64 letters"):
        RigClaim(name)
