"""Switching bundles: the link leads to the old one or to the new one, never nowhere, and never to a bad one."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from support import bundles
from support.daemon_rig import DaemonRig, on_a_machine_that_runs

from chatvla_edge.export.checkpoint.reader import open_checkpoint
from chatvla_edge.export.checkpoint.synth import PRESETS, synthesize
from chatvla_edge.export.exporter import Settings, export
from chatvla_edge.export.robots import load
from chatvla_edge.runtime.bundle import BundleError
from chatvla_edge.runtime.daemon import deploy, places
from chatvla_edge.runtime.daemon.deploy import DeployError, previous, rollback, target, use

COMMAND = (sys.executable, "-c", "from chatvla_edge.runtime.cli import main; main()", "bundle")


def sound(_bundle):
    return {"passed": 1}


def unsound(bundle):
    raise DeployError(f"{bundle}: gates failed")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Three whole bundles, a, b and c, beside each other, and no daemon."""
    monkeypatch.setenv("CHATVLA_EDGE_RUN", str(tmp_path / "run"))
    for name in "abc":
        bundles.lay(tmp_path / name)
    return tmp_path


def leads(here):
    """Names of the bundles that link and previous link lead to."""
    found = (target(here / "link"), target(previous(here / "link")))
    return tuple(None if path is None else path.name for path in found)


def test_use_and_rollback(here):
    link = here / "link"
    assert use(here / "a", link, check=sound).previous is None
    assert leads(here) == ("a", None)
    assert use(here / "b", link, check=sound).previous == here / "a"
    assert leads(here) == ("b", "a")
    use(here / "b", link, check=sound)
    assert leads(here) == ("b", "a"), "the same again must not lose the way back"
    rollback(link, check=sound)
    assert leads(here) == ("a", "b")
    rollback(link, check=sound)
    assert leads(here) == ("b", "a")
    assert (link / "manifest.json").is_file()
    assert sorted(path.name for path in here.iterdir()) == ["a", "b", "c", "link", "link.previous", "run"]


def test_nothing_is_switched_that_is_not_sound(here):
    link = here / "link"
    use(here / "a", link, check=sound)
    with pytest.raises(DeployError, match="gates failed"):
        use(here / "b", link, check=unsound)
    (here / "c" / "manifest.json").unlink()
    with pytest.raises(BundleError, match="manifest"):
        use(here / "c", link, check=sound)
    assert leads(here) == ("a", None)
    use(here / "b", link, check=sound)
    with pytest.raises(DeployError, match="gates failed"):
        rollback(link, check=unsound)
    shutil.rmtree(here / "a")
    with pytest.raises(BundleError, match="No such file"):
        rollback(link, check=sound)
    assert leads(here) == ("b", "a")


def test_a_bundle_that_changes_under_the_check_is_refused(here):
    table = bundles.manifest()
    key = next(key for key, value in table["provenance"].items() if isinstance(value, str) and "sha" not in key)

    def changed(bundle):
        table["provenance"][key] += "x"
        (bundle / "manifest.json").write_bytes(bundles.sealed(table))
        return {}

    with pytest.raises(DeployError, match="changed while it was checked"):
        use(here / "a", here / "link", check=changed)
    assert leads(here) == (None, None)


def test_no_way_back(here):
    with pytest.raises(DeployError, match="no such link"):
        rollback(here / "link", check=sound)
    use(here / "a", here / "link", check=sound)
    with pytest.raises(DeployError, match="bundle use"):
        rollback(here / "link", check=sound)


@pytest.mark.parametrize("name", ["link", "link.previous"])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_no_link_is_left_alone(here, name, kind):
    (here / name).mkdir() if kind == "directory" else (here / name).write_text("precious")
    with pytest.raises(DeployError, match=f"found a {kind}"):
        use(here / "a", here / "link", check=sound)
    assert (here / name).exists()
    assert not (here / name).is_symlink()


def test_relative_links_and_links_that_lead_nowhere(here, monkeypatch):
    (here / "link").symlink_to("gone")
    monkeypatch.chdir(here)
    switched = use(Path("a"), Path("link"), check=sound)
    assert (switched.link, switched.bundle, switched.previous) == (here / "link", here / "a", here / "gone")


# ------------------------------------------------------------------------------------------------------------- killed

STEPS = ("symlink", "replace", "rename", "unlink", "fsync")


def killed_after(count, action):
    """Run ``action`` in a child that is killed after its ``count``-th step on the file system; False: it had fewer."""
    child = os.fork()
    if child == 0:
        done = 0

        def counted(real):
            def step(*arguments, **options):
                nonlocal done
                if done == count:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1
                return real(*arguments, **options)

            return step

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            action()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def at_every_step(here, action, before, after):
    """What the links lead to after each kill; both links always lead to a bundle, and a second call goes through."""
    seen = []
    for count in range(100):
        for path in here.glob("link*"):
            path.unlink()
        (here / "link").symlink_to(here / before[0])
        previous(here / "link").symlink_to(here / before[1])
        killed = killed_after(count, action)
        seen.append(leads(here))
        assert (here / "link" / "manifest.json").is_file()
        assert (previous(here / "link") / "manifest.json").is_file()
        if not killed:
            assert leads(here) == after
            return seen
        # What the kill left behind is in nobody's way.
        use(here / "c", here / "link", check=sound)
        assert leads(here)[0] == "c"
        assert not (here / "link.new").exists()
    raise AssertionError("it never ended by itself")


def test_use_killed_at_every_step(here):
    seen = at_every_step(here, lambda: use(here / "b", here / "link", check=sound), ("a", "c"), ("b", "a"))
    assert len(seen) >= 7
    assert {link for link, _ in seen} == {"a", "b"}
    assert set(seen) <= {("a", "c"), ("a", "a"), ("b", "a")}


def test_rollback_killed_at_every_step(here):
    seen = at_every_step(here, lambda: rollback(here / "link", check=sound), ("b", "a"), ("a", "b"))
    assert set(seen) == {("b", "a"), ("a", "a"), ("a", "b")}


def test_a_reader_beside_it_never_finds_nothing(here):
    link = here / "link"
    use(here / "a", link, check=sound)
    over, missing = threading.Event(), []

    def read():
        while not over.is_set():
            if not (link / "manifest.json").is_file():
                missing.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        use(here / "b", link, check=sound)
        rollback(link, check=sound)
    over.set()
    reader.join()
    assert not missing


# ------------------------------------------------------------------------------------------------------------ running


def test_a_link_that_a_daemon_runs_from_is_left_alone(here):
    link = here / "link"
    use(here / "a", link, check=sound)
    run = places.Run("rig", os.getpid(), 7, str(link))
    run.write()
    assert places.runs() == [run]
    with pytest.raises(DeployError, match=f"rig .process {os.getpid()}.*quit"):
        use(here / "b", link, check=unsound)
    assert leads(here) == ("a", None)
    use(here / "b", link, check=sound, while_running=True)
    with pytest.raises(DeployError, match="--while-running"):
        rollback(link, check=sound)
    use(here / "c", here / "other", check=sound)
    run.remove()
    rollback(link, check=sound)
    assert leads(here) == ("a", "b")


# -------------------------------------------------------------------------------------------------- the command, whole


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny policy whose bundle holds a probe."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("exported")
    spec, layout, _ = PRESETS["tiny"]
    synthesize(folder / "checkpoint", spec, layout, dtype=torch.float32)
    settings = Settings(target="cpu", precision="fp32", robot=load("arx_r5_bimanual"), max_reasoning=12, probes=1)
    export(open_checkpoint(folder / "checkpoint"), folder / "bundle", settings, lambda _name, _count: None)
    return folder / "bundle"


@pytest.mark.slow
def test_the_command_checks_a_real_bundle(here, exported):
    """Digests and probes on this computer; damage is found, and an engine that takes too long is not waited for."""

    def command(*arguments):
        return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)

    link = here / "link"
    good = command("use", exported, "--link", link, "--json")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["gates"]["passed"] > 5
    assert target(link) == exported.resolve()

    bad = shutil.copytree(exported, here / "bad")
    stage = max(bad.rglob("*.data"), key=lambda path: path.stat().st_size)
    data = bytearray(stage.read_bytes())
    data[len(data) // 2] ^= 1
    stage.write_bytes(data)
    refused = command("use", bad, "--link", link)
    assert refused.returncode == 1
    assert "SHA-256" in refused.stderr
    assert target(link) == exported.resolve()

    with pytest.raises(DeployError, match=r"not done after 0\.05 s"):
        use(exported, link, check=deploy.verify(0.05))


@pytest.mark.slow
@on_a_machine_that_runs
def test_a_daemon_keeps_the_bundle_that_it_was_started_with(tmp_path, bundle):
    """Its link may be switched: a policy that restarts opens what the supervisor opened."""
    link, other = tmp_path / "link", bundles.lay(tmp_path / "other")
    link.symlink_to(bundle)
    with DaemonRig(tmp_path, link) as rig:
        rig.until_mode("READY", at_most=60)
        with pytest.raises(DeployError, match=rig.name):
            use(other, link, check=unsound)
        # Of this one no engine can be made: a policy that opened it would die again and again.
        use(other, link, check=sound, while_running=True)
        os.kill(rig.child("policy"), signal.SIGKILL)
        rig.until_mode("DISARMED")
        rig.until_mode("READY", at_most=60)
        assert target(link) == other


@pytest.mark.slow
@on_a_machine_that_runs
def test_systemd_is_told_of_start_servo_and_end(tmp_path, bundle):
    """The watchdog is fed for the servo's sake: a servo that stands still is silence, though the supervisor lives."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    name = f"chatvla-edge-{os.getpid()}-{time.monotonic_ns()}"
    listener.bind(f"\0{name}")

    def hears(word, seconds):
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                if word in listener.recv(4096).decode().split("\n"):
                    return True
            except TimeoutError:
                break
        return False

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("NOTIFY_SOCKET", f"@{name}")
        environment.setenv("WATCHDOG_USEC", "400000")
        rig = DaemonRig(tmp_path, bundle)
    with listener, rig:
        assert hears("READY=1", 20)
        assert hears("WATCHDOG=1", 20)
        assert hears("WATCHDOG=1", 20)
        servo = rig.child("servo")
        os.kill(servo, signal.SIGSTOP)
        rig.until_mode("DISARMED", "FAULT")
        hears("nothing", 0.5)  # what was under way
        assert not hears("WATCHDOG=1", 2)
        os.kill(servo, signal.SIGCONT)
        assert hears("WATCHDOG=1", 20)
        rig.process.terminate()
        assert hears("STOPPING=1", 20)
