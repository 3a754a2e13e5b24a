"""The doctor, on folders that look like computers: each finding, its verdict and its remedy."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from chatvla_edge.drivers import rig
from chatvla_edge.drivers.cli import app
from chatvla_edge.drivers.doctor import Machine, examine
from chatvla_edge.drivers.rig import Rig

UNLIMITED = (
    "Limit Soft Hard Units\nMax locked memory     unlimited  unlimited  bytes\nMax realtime priority     95  95  \n"
)
BOUNDED = "Limit Soft Hard Units\nMax locked memory     8388608  8388608  bytes\nMax realtime priority     0  0  \n"

# A Jetson set up as it should be.
GOOD = {
    "etc/nv_tegra_release": "# R38 (release), REVISION: 4.0, GCID: 1, BOARD: generic, EABI: aarch64",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=MODE_30W >",
    "var/lib/nvpmodel/status": "pmode:0000",
    "sys/kernel/realtime": "1",
    "proc/sys/kernel/osrelease": "6.8.12-rt-tegra",
    "proc/self/limits": UNLIMITED,
    "proc/self/status": "CapEff:\t0000000000000000",
    "proc/sys/kernel/sched_rt_runtime_us": "950000",
    "dev/cpu_dma_latency": "",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "performance",
    "sys/class/devfreq/17000000.gpu/min_freq": "1300500000",
    "sys/class/devfreq/17000000.gpu/max_freq": "1300500000",
    "sys/devices/system/cpu/online": "0-11",
    "sys/devices/system/cpu/isolated": "10-11",
    "proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 48000000 kB",
    "sys/bus/usb/devices/2-1/idVendor": "8086",
    "sys/bus/usb/devices/2-1/idProduct": "0b64",
    "sys/bus/usb/devices/2-1/product": "Intel(R) RealSense(TM) L515",
    "sys/bus/usb/devices/2-1/serial": "00000000F0090001",
    "sys/bus/usb/devices/2-1/speed": "5000",
    "sys/bus/usb/devices/1-4/idVendor": "8086",
    "sys/bus/usb/devices/1-4/idProduct": "0025",
    "sys/bus/usb/devices/1-4/product": "Bluetooth",
    "sys/bus/usb/devices/1-4/speed": "12",
    "sys/class/net/can0/type": "280",
    "sys/class/net/can0/flags": "0x40081",
    "sys/class/net/can0/tx_queue_len": "128",
    "sys/class/net/eth0/type": "1",
    "sys/class/net/eth0/operstate": "up",
    "sys/class/net/eth0/speed": "1000",
    "sys/class/net/wlan0/operstate": "up",
    "sys/class/net/wlan0/wireless/x": "",
    "proc/net/route": (
        "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"
        "wlan0 00000000 0101A8C0 0003 0 0 600 00000000 0 0 0\n"
        "eth0 000010AC 00000000 0001 0 0 100 0000FFFF 0 0 0\n"
    ),
    "dev/ttyUSB0": "",
    "sys/bus/usb-serial/devices/ttyUSB0/latency_timer": "1",
    "usr/local/zed/x": "",
}
PACKAGES = {
    "tensorrt": "10.13.3", "pyrealsense2": "2.54.2.5684", "arx5-interface": "0.1.4", "franka-rs": "0.4.0",
    "pymodbus": "3.16.1", "pyzed": "5.0",
}  # fmt: skip
CAN = json.dumps([{"linkinfo": {"info_data": {"state": "ERROR-ACTIVE", "bittiming": {"bitrate": 1000000}}}}])


def device(driver, **options):
    return {"driver": driver, "options": options}


ARM = {"rate": 500, "limits": {"acceleration": [1], "jerk": [1]}}
CAMERA = {"height": 480, "width": 640, "rate": 30}


def a_rig(**changes):
    """A rig as its model has it, whatever drivers this tree holds: the doctor goes by names."""
    values = {
        "schema": 1,
        "name": "fake",
        "description": "for the doctor",
        "cameras": {"top": {**CAMERA, **device("realsense")}, "right": {**CAMERA, **device("zed")}},
        "arms": {
            "left": {**ARM, **device("arx5", interface="can0")},
            "franka": {**ARM, **device("franka_rs", address="172.16.0.2")},
            "gripper": {**ARM, **device("robotiq_2f85", port="/dev/ttyUSB0")},
        },
        "servo": {"rate": 500},
        "policy": {"rate": 50},
        "cores": {"servo": [11]},
    }
    return Rig.model_validate({**values, **changes})


class Computer:
    """GOOD with changes; None takes a file away."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.packages = dict(PACKAGES)
        self.answers = {"ip": CAN}
        self.free = 500e9
        self.read_only = set()
        self.change(GOOD)
        zed = {"idVendor": "2b03", "idProduct": "f780", "product": "ZED 2", "serial": "", "speed": "5000"}
        self.change({f"sys/bus/usb/devices/2-2/{name}": text for name, text in zed.items()})
        self.card("eth0", "igb")

    def change(self, files):
        for name, text in files.items():
            path = self.folder / name
            if text is None:
                path.unlink()
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def card(self, interface, driver):
        home = self.folder / "sys/bus/pci/drivers" / driver
        home.mkdir(parents=True, exist_ok=True)
        link = self.folder / "sys/class/net" / interface / "device/driver"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(home)

    def examine(self, of=None):
        machine = Machine(
            self.folder,
            version=self.packages.get,
            answer=lambda command: self.answers.get(Path(command[0]).name),
            free=lambda path: self.free,
            writable=lambda path: path.name not in self.read_only,
        )
        lines = {line.check: line for line in examine(of, machine)}
        assert all(bool(line.remedy) == (line.verdict != "ok") for line in lines.values())
        return lines


@pytest.fixture
def computer(tmp_path):
    return Computer(tmp_path)


def test_a_computer_set_up_as_it_should_be_is_well(computer):
    lines = computer.examine(a_rig())
    assert {line.verdict for line in lines.values()} == {"ok"}, lines
    assert lines["jetpack"].found == "JetPack 7.1 (L4T 38.4.0)"
    assert lines["cameras.top sdk"].found == "pyrealsense2 2.54.2.5684 knows the L515"
    assert lines["arms.left can"].found == "can0 up, 1000000 bit/s"
    assert lines["arms.franka network"].found == "172.16.0.2 by eth0 (igb, 1000 Mbit/s)"
    assert lines["cores"].found == "servo on 11, isolated"


SYSTEM = {
    "a workstation": ({"etc/nv_tegra_release": None}, "jetpack", "ok", "no Jetson"),
    "an old JetPack": (
        {"etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID"}, "jetpack", "warn", "6.1 or 6.2 (L4T 36.4.3)"
    ),
    "a new JetPack": ({"etc/nv_tegra_release": "# R39 (release), REVISION: 2.0"}, "jetpack", "ok", "7.2 (L4T 39.2.0)"),
    "a JetPack to come": ({"etc/nv_tegra_release": "# R41 (release), REVISION: 0.0"}, "jetpack", "warn", "L4T 41.0"),
    "a strange release file": ({"etc/nv_tegra_release": "hello"}, "jetpack", "warn", "hello"),
    "a low power mode": ({"var/lib/nvpmodel/status": "pmode:0001"}, "power mode", "warn", "1 (MODE_30W)"),
    "no real-time kernel": (
        {"sys/kernel/realtime": None, "proc/version": "Linux 6.1 #1 SMP PREEMPT_DYNAMIC x"}, "kernel", "warn",
        "PREEMPT_DYNAMIC",
    ),
    "no rights": ({"proc/self/limits": BOUNDED}, "real-time priority", "warn", "none, expected 80"),
    "no memory to lock": ({"proc/self/limits": BOUNDED}, "locked memory", "warn", "8.4 MB"),
    "root": (
        {"proc/self/limits": BOUNDED, "proc/self/status": "CapEff:\t000001ffffffffff"}, "real-time priority", "ok",
        "CAP_SYS_NICE",
    ),
    "unreadable limits": ({"proc/self/limits": None}, "locked memory", "warn", "unknown"),
    "a throttled share": ({"proc/sys/kernel/sched_rt_runtime_us": "500000"}, "real-time share", "warn", "50 %"),
    "an unbounded share": ({"proc/sys/kernel/sched_rt_runtime_us": "-1"}, "real-time share", "ok", "all"),
    "no latency file": ({"dev/cpu_dma_latency": None}, "CPU idle states", "warn", "no /dev/cpu_dma_latency"),
    "a saving governor": (
        {"sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "schedutil"}, "CPU clocks", "warn", "schedutil"
    ),
    "a breathing GPU": ({"sys/class/devfreq/17000000.gpu/min_freq": "306000000"}, "GPU clocks", "warn", "306-1300 MHz"),
    "little memory": ({"proc/meminfo": "MemAvailable: 2000000 kB"}, "memory", "warn", "2.0 GB free, expected 4 GB"),
    "no memory": ({"proc/meminfo": "MemAvailable: 200000 kB"}, "memory", "fail", "0.2 GB free"),
    "memory of an unknown kind": ({"proc/meminfo": ""}, "memory", "warn", "unknown"),
}  # fmt: skip


@pytest.mark.parametrize("what", SYSTEM)
def test_what_is_wrong_with_the_computer_is_found(computer, what):
    files, check, verdict, found = SYSTEM[what]
    computer.change(files)
    line = computer.examine()[check]
    assert line.verdict == verdict
    assert found in line.found


DEVICES = {
    "no such core": ({"sys/devices/system/cpu/online": "0-5"}, "cores", "fail", "no CPU 11"),
    "a core that is not isolated": ({"sys/devices/system/cpu/isolated": ""}, "cores", "warn", "servo on 11, not"),
    "a camera on USB 2": (
        {"sys/bus/usb/devices/2-1/speed": "480"}, "cameras.top usb", "fail", "L515 at 480 Mbit/s, expected USB 3"
    ),
    "no camera": ({"sys/bus/usb/devices/2-1/idVendor": "1234"}, "cameras.top usb", "fail", "none on USB"),
    "a bus that is down": ({"sys/class/net/can0/flags": "0x40080"}, "arms.left can", "fail", "can0 is down"),
    "a network card for a bus": ({"sys/class/net/can0/type": "1"}, "arms.left can", "fail", "no CAN interface"),
    "a short queue": ({"sys/class/net/can0/tx_queue_len": "10"}, "arms.left can queue", "warn", "10 frames"),
    "a slow serial timer": (
        {"sys/bus/usb-serial/devices/ttyUSB0/latency_timer": "16"}, "arms.gripper serial", "warn", "timer 16 ms"
    ),
    "no serial port": ({"dev/ttyUSB0": None}, "arms.gripper serial", "fail", "no /dev/ttyUSB0"),
    "a slow network": ({"sys/class/net/eth0/speed": "100"}, "arms.franka network", "fail", "expected 1000"),
    "a network that is down": ({"sys/class/net/eth0/operstate": "down"}, "arms.franka network", "fail", "is down"),
    "a robot by wireless": (
        {"proc/net/route": GOOD["proc/net/route"].replace("eth0 000010AC", "eth0 000011AC")},
        "arms.franka network", "fail", "wireless",
    ),
    "no route": ({"proc/net/route": "Iface\n"}, "arms.franka network", "fail", "no route to 172.16.0.2"),
}  # fmt: skip


@pytest.mark.parametrize("what", DEVICES)
def test_what_is_wrong_with_a_device_s_way_is_found(computer, what):
    files, check, verdict, found = DEVICES[what]
    computer.change(files)
    line = computer.examine(a_rig())[check]
    assert line.verdict == verdict
    assert found in line.found


def test_a_serial_port_by_its_lasting_name_is_followed(computer):
    name = computer.folder / "dev/serial/by-id/usb-FTDI"
    name.parent.mkdir(parents=True)
    name.symlink_to(computer.folder / "dev/ttyUSB0")
    computer.change({"sys/bus/usb-serial/devices/ttyUSB0/latency_timer": "16"})
    arms = {"gripper": {**ARM, **device("robotiq_2f85", port="/dev/serial/by-id/usb-FTDI")}}
    assert computer.examine(a_rig(arms=arms))["arms.gripper serial"].verdict == "warn"


def test_what_may_not_be_written_is_found(computer):
    computer.read_only = {"ttyUSB0", "cpu_dma_latency"}
    lines = computer.examine(a_rig())
    assert lines["arms.gripper serial"].verdict == "fail"
    assert lines["CPU idle states"].verdict == "warn"


def test_a_missing_bus_names_the_command_that_makes_it(computer):
    arms = {"left": {**ARM, **device("arx5", interface="can7")}}
    line = computer.examine(a_rig(arms=arms))["arms.left can"]
    assert line.verdict == "fail"
    assert "ip link set can7 up type can bitrate 1000000" in line.remedy


@pytest.mark.parametrize(
    ("facts", "verdict", "found"),
    [
        ({"state": "ERROR-ACTIVE", "bittiming": {"bitrate": 500000}}, "fail", "500000 bit/s, expected 1000000"),
        ({"state": "BUS-OFF"}, "fail", "BUS-OFF"),
        ({}, "ok", "bit rate not known"),
    ],
)
def test_rate_and_state_of_a_bus_are_asked_for(computer, facts, verdict, found):
    computer.answers["ip"] = json.dumps([{"linkinfo": {"info_data": facts}}])
    line = computer.examine(a_rig())["arms.left can"]
    assert line.verdict == verdict
    assert found in line.found


@pytest.mark.parametrize("said", [None, "", "[]", "{}", "nonsense", '[{"linkinfo": null}]'])
def test_an_answer_that_is_none_is_borne(computer, said):
    computer.answers["ip"] = said
    assert computer.examine(a_rig())["arms.left can"].found == "can0 up, bit rate not known"


def test_a_realsense_library_that_does_not_know_the_l515_is_found(computer):
    computer.packages["pyrealsense2"] = "2.59.1.11053"
    line = computer.examine(a_rig())["cameras.top sdk"]
    assert line.verdict == "fail"
    assert "pyrealsense2==2.54.2.5684" in line.remedy
    computer.change({"sys/bus/usb/devices/2-1/idProduct": "0b07"})  # a D435 is content with it
    assert "cameras.top sdk" not in computer.examine(a_rig())


def test_a_camera_is_told_from_its_like_by_its_number(computer):
    cameras = {"top": {**CAMERA, **device("realsense", serial="123")}}
    line = computer.examine(a_rig(cameras=cameras))["cameras.top usb"]
    assert line.found == "none with serial 123, but 00000000F0090001"


def test_a_camera_from_a_file_needs_no_usb(computer):
    cameras = {"top": {**CAMERA, **device("realsense", file="a.bag")}}
    assert "cameras.top usb" not in computer.examine(a_rig(cameras=cameras))


@pytest.mark.parametrize(
    ("version", "sdk", "verdict"), [("1.3.0", True, "fail"), (None, True, "fail"), ("5.0", False, "warn")]
)
def test_the_zed_s_library_is_told_from_its_namesake(computer, version, sdk, verdict):
    computer.packages["pyzed"] = version
    if not sdk:
        (computer.folder / "usr/local/zed/x").unlink()
        (computer.folder / "usr/local/zed").rmdir()
    assert computer.examine(a_rig())["cameras.right library"].verdict == verdict


def test_missing_libraries_name_what_brings_them(computer):
    computer.packages = {}
    lines = computer.examine(a_rig())
    assert lines["engines"].verdict == "warn"
    for check in ("cameras.top library", "arms.left library", "arms.franka library", "arms.gripper library"):
        assert lines[check].verdict == "fail"
        assert "chatvla-edge[" in lines[check].remedy


def test_two_onnxruntimes_are_one_too_many(computer):
    computer.packages |= {"onnxruntime": "1.22", "onnxruntime-gpu": "1.22"}
    assert computer.examine()["engines"].verdict == "fail"


def test_a_camera_s_own_interpreter_is_asked_what_it_has(computer, tmp_path):
    python = tmp_path / "python3.9"
    cameras = {"top": {**CAMERA, **device("realsense"), "python": python}}
    line = computer.examine(a_rig(cameras=cameras))["cameras.top python"]
    assert line.verdict == "fail"
    python.touch()
    computer.answers["python3.9"] = "pyrealsense2 2.54.2.5684\n"
    lines = computer.examine(a_rig(cameras=cameras))
    assert lines["cameras.top library"].found == "pyrealsense2 2.54.2.5684"
    computer.answers["python3.9"] = ""
    assert computer.examine(a_rig(cameras=cameras))["cameras.top library"].verdict == "fail"


def test_asking_another_interpreter_works_on_a_real_one():
    from chatvla_edge.drivers.doctor.devices import ASK_VERSIONS
    from chatvla_edge.drivers.doctor.machine import answered

    command = [sys.executable, "-c", ASK_VERSIONS, "numpy", "no-such-package"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith("numpy ")
    assert "no-such" not in said
    assert answered(["/no/such/command"]) is None
    assert answered(["sleep", "5"]) is None


def test_a_slow_network_card_is_warned_of(computer):
    computer.card("eth0", "r8169")
    line = computer.examine(a_rig())["arms.franka network"]
    assert line.verdict == "warn"
    assert "Realtek" in line.found


@pytest.mark.parametrize(("address", "lines"), [("127.0.0.1", ["ok"]), ("robot.local", [])])
def test_an_address_that_needs_no_card_asks_for_none(computer, address, lines):
    arms = {"franka": {**ARM, **device("franka_rs", address=address)}}
    found = computer.examine(a_rig(arms=arms))
    assert [line.verdict for check, line in found.items() if check.endswith("network")] == lines


def test_little_room_on_the_disk_is_found(computer):
    computer.free = 5e9
    assert computer.examine()["disk"].verdict == "warn"
    computer.free = 5e8
    assert computer.examine()["disk"].verdict == "fail"


def test_without_a_rig_it_looks_at_what_is_plugged_in(computer):
    lines = computer.examine()
    assert lines["usb Intel(R) RealSense(TM) L515"].verdict == "ok"
    assert lines["can0 can"].verdict == "ok"
    assert not any("Bluetooth" in check or "eth0" in check for check in lines)


def test_an_empty_folder_is_examined_to_the_end(tmp_path):
    lines = examine(a_rig(), Machine(tmp_path, version=lambda name: None, answer=lambda command: None))
    assert {line.check for line in lines} >= {"python", "kernel", "memory", "disk", "arms.left can"}


def test_the_command_fails_on_a_failure_and_takes_no_time():
    begin = time.process_time()
    answer = CliRunner().invoke(app, ["--json"])
    assert time.process_time() - begin < 1.5
    lines = json.loads(answer.stdout)
    assert {"check", "verdict", "found", "remedy"} == set(lines[0])
    assert answer.exit_code == int(any(line["verdict"] == "fail" for line in lines))
    table = CliRunner().invoke(app, ["sim_arx_r5_bimanual"])
    assert "python" in table.stdout
    file = rig.find("sim_arx_r5_bimanual")
    assert CliRunner().invoke(app, [str(file)]).exit_code == table.exit_code


def test_a_failing_check_is_exit_code_1(monkeypatch, computer):
    from chatvla_edge.drivers import doctor

    computer.free = 0.0
    lines = list(computer.examine().values())
    monkeypatch.setattr(doctor, "examine", lambda rig: lines)
    answer = CliRunner().invoke(app, [])
    assert answer.exit_code == 1
    assert "make" in answer.stdout
