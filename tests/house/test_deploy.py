"""What is installed beside the daemon, held against the code: the unit, udev rules, CAN; and commands in documents."""

import configparser
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer.main

from chatvla_edge.drivers import rig as rigs
from chatvla_edge.drivers.doctor import devices, system
from chatvla_edge.runtime.cli import application
from chatvla_edge.runtime.conditions import LONGEST_STOP_NS
from chatvla_edge.runtime.daemon import places, supervisor
from chatvla_edge.runtime.modes import LEASE_NS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "chatvla-edge@.service"
if not UNIT.exists():
    pytest.skip("the tests run outside a checkout", allow_module_level=True)
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def sections(path):
    parser = configparser.RawConfigParser(strict=True, interpolation=None, delimiters=("=",), comment_prefixes="#")
    parser.optionxform = str
    parser.read_string(path.read_text())
    return {name: dict(parser[name]) for name in parser.sections()}


SERVICE = sections(UNIT)["Service"]


# ---------------------------------------------------------------------------------------------------------- the unit


def test_whoever_the_watchdog_kills_leaves_arms_that_stand():
    """Fed at half its time: a supervisor that hangs just before it would have spoken is killed after the other half."""
    left = 1e9 * float(SERVICE["WatchdogSec"]) / 2
    assert left > LEASE_NS + LONGEST_STOP_NS + supervisor.TURN_NS


def test_an_end_in_good_order_is_not_cut_short():
    groups = 5  # policy, servo, devices, cameras, recorder: one after the other
    assert float(SERVICE["TimeoutStopSec"]) > supervisor.STOP_S + groups * supervisor.LEAVE_S + 5


def test_a_start_is_given_the_time_that_the_supervisor_gives_it():
    most = 0.0
    for name in rigs.names():
        rig = rigs.load(name)
        wait = supervisor.START_S
        children = wait["recorder"] + wait["servo"] + wait["policy"]
        most = max(most, children + len(rig.cameras) * wait["camera"] + len(rig.arms) * wait["device"])
    assert float(SERVICE["TimeoutStartSec"]) > most + 60  # and time for the bundle's digests


def test_systemd_speaks_with_the_supervisor_alone():
    assert SERVICE["Type"] == "notify"
    assert SERVICE["NotifyAccess"] == "main"
    # SIGTERM to all at once would end devices beside the servo that brings them to rest.
    assert SERVICE["KillMode"] == "mixed"
    assert SERVICE["KillSignal"] == "SIGTERM"


def test_no_arm_is_opened_again_by_itself():
    assert SERVICE["Restart"] == "no"
    again = sections(DEPLOY / "restart.conf")["Service"]
    assert again["Restart"] == "on-failure"
    assert again["RestartPreventExitStatus"] == "2"


def test_real_time_is_permitted():
    assert int(SERVICE["LimitRTPRIO"]) >= system.PRIORITY
    assert max(supervisor.SERVO_PRIORITY, supervisor.DEVICE_PRIORITY) == system.PRIORITY
    assert SERVICE["LimitMEMLOCK"] == "infinity"
    assert SERVICE["RestrictRealtime"] == "no"
    assert "AllowedCPUs" not in SERVICE


def test_the_operator_reaches_the_emergency_stop_past_a_hanging_supervisor():
    """Through /proc/PID/fd, which the kernel closes where the process has rights that the operator has not."""
    assert "AmbientCapabilities" not in SERVICE
    assert SERVICE["CapabilityBoundingSet"] == ""
    assert SERVICE["PrivateUsers"] == "no"


def test_devices_are_permitted():
    # Each of these would close devices: ProtectClock= brings a DeviceAllow= of its own.
    assert not {"DeviceAllow", "DevicePolicy", "ProtectClock"} & set(SERVICE)
    assert SERVICE["PrivateDevices"] == SERVICE["PrivateNetwork"] == "no"
    assert set(SERVICE["RestrictAddressFamilies"].split()) >= {"AF_UNIX", "AF_CAN", "AF_NETLINK", "AF_INET"}


def test_the_folder_of_sockets_is_the_one_that_the_daemon_looks_for(tmp_path, monkeypatch):
    assert SERVICE["RuntimeDirectoryPreserve"] == "yes", "the daemon of another rig may still have its socket there"
    folder = tmp_path / SERVICE["RuntimeDirectory"]
    folder.mkdir(mode=int(SERVICE["RuntimeDirectoryMode"], 8))
    monkeypatch.delenv("CHATVLA_EDGE_RUN", raising=False)
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(folder))
    assert places.folder() == folder


def test_the_unit_asks_for_what_the_example_says():
    asked = set(re.findall(r"\$\{?([A-Z]+)", SERVICE["ExecStart"]))
    lines = (DEPLOY / "example.env").read_text().splitlines()
    said = {line.partition("=")[0] for line in lines if line and not line.startswith("#")}
    assert asked == said
    assert problems(SERVICE["ExecStart"].rpartition("/")[2]) == []


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
@pytest.mark.parametrize("restarting", [False, True])
def test_systemd_has_nothing_against_it(tmp_path, restarting):
    # The command is not installed here, and what systemd says about that is none of ours.
    unit = tmp_path / "chatvla-edge@rig.service"
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/sh", UNIT.read_text(), flags=re.MULTILINE))
    if restarting:
        (tmp_path / f"{unit.name}.d").mkdir()
        shutil.copy(DEPLOY / "restart.conf", tmp_path / f"{unit.name}.d")
    ran = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    mine = [line for line in ran.stderr.splitlines() if "chatvla" in line or "restart.conf" in line]
    assert mine == []


# ------------------------------------------------------------------------------------------------------------ devices

ASSIGNMENT = re.compile(r'([A-Z]+)(\{[^}]+\})?(==|!=|=|\+=|:=)"([^"]*)"')


def rules():
    text = (DEPLOY / "99-chatvla-edge.rules").read_text().replace("\\\n", "")
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            parts = [part.strip() for part in line.split(",")]
            found = [ASSIGNMENT.fullmatch(part) for part in parts]
            assert all(found), line
            yield {f"{match[1]}{match[2] or ''}": (match[3], match[4]) for match in found}


def test_every_rule_matches_something_and_sets_something():
    for rule in rules():
        assert any(operator == "==" for operator, _ in rule.values())
        settings = {key: value for key, (operator, value) in rule.items() if operator != "=="}
        assert settings in ({"GROUP": SERVICE["Group"], "MODE": "0660"}, {"ATTR{latency_timer}": "1"})


def test_what_the_doctor_asks_for_is_there():
    found = list(rules())
    vendors = {rule[key][1] for rule in found for key in ("ATTR{idVendor}",) if key in rule}
    assert vendors == set(devices.USB_CAMERAS.values())
    assert devices.L515 in {rule["ATTR{idProduct}"][1] for rule in found if "ATTR{idProduct}" in rule}
    assert any(rule.get("KERNEL") == ("==", "cpu_dma_latency") for rule in found)
    assert any(rule.get("DRIVER") == ("==", "ftdi_sio") for rule in found)


def test_can_is_as_the_doctor_wants_it(tmp_path):
    network = sections(DEPLOY / "can" / "80-chatvla-edge-can.network")["CAN"]
    assert network["BitRate"] == f"{devices.CAN_BITRATE // 1_000_000}M"
    queue = int(sections(DEPLOY / "can" / "70-chatvla-edge-can.link")["Link"]["TransmitQueueLength"])
    assert queue >= devices.QUEUE

    said = tmp_path / "said"
    ip = tmp_path / "ip"
    ip.write_text(f'#!/bin/sh\necho "$@" >> {said}\n')
    ip.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([str(DEPLOY / "can" / "can-up"), "can0", "can1"], env=environment, check=True)
    assert said.read_text().splitlines() == [
        line
        for can in ("can0", "can1")
        for line in (
            f"link set {can} down",
            f"link set {can} type can bitrate {devices.CAN_BITRATE} restart-ms 100",
            f"link set {can} txqueuelen {queue}",
            f"link set {can} up",
        )
    ]
    assert subprocess.run([str(DEPLOY / "can" / "can-up")], capture_output=True, check=False).returncode == 2


# --------------------------------------------------------------------------------------------- commands in documents


def commands(text):
    """What is written as a command of ours: lines of fenced blocks, and words between backquotes."""
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for block in fenced:
        for line in block.replace("\\\n", " ").splitlines():
            if "chatvla-edge " in line.partition("#")[0] and not re.search(r"pip install|systemctl|journalctl", line):
                yield line[line.index("chatvla-edge ") :]
    prose = re.sub(r"^```[^\n]*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`]+)`", prose):
        if re.match(r"chatvla-edge\s+[a-z]", span):
            yield " ".join(span.split())


def problems(line):
    """What is wrong with a command: a word that is no command, an option that it has not."""
    words = shlex.split(line, comments=True)[1:]
    at, path = typer.main.get_command(application()), "chatvla-edge"
    while words and hasattr(at, "commands"):
        if words[0] in ("|", "--help", "--version", "--traceback"):
            return []
        alternatives = re.split(r"[|,]", words[0].strip("."))
        unknown = [word for word in alternatives if word not in at.commands]
        if unknown:
            return [f"{path} has no {', '.join(unknown)}"]
        at, path = at.commands[alternatives[0]], f"{path} {alternatives[0]}"
        words = words[1:]
    known = {name for parameter in at.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    options = [word.strip("[]").partition("=")[0] for word in words]
    return [f"{path} has no {word}" for word in options if re.match(r"--?[a-z]", word) and word not in known]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_in_a_document_exists(document):
    assert [f"{line}: {wrong}" for line in commands(document.read_text()) for wrong in problems(line)] == []


def test_a_command_that_does_not_exist_is_found():
    assert list(commands("`chatvla-edge  run RIG`\n```\nsudo chatvla-edge arm # go\nls\n```\n")) == [
        "chatvla-edge arm # go",
        "chatvla-edge run RIG",
    ]
    assert problems("chatvla-edge fly") == ["chatvla-edge has no fly"]
    assert problems("chatvla-edge bundle use B --force") == ["chatvla-edge bundle use has no --force"]
    assert problems("chatvla-edge arm --rig left  # now") == []
