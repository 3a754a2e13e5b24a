"""What a rig's devices need of the computer: libraries that fit together, USB speed, CAN, serial ports, network.

A device is known by its driver's name and options. Nothing is opened: a doctor may be called while the rig runs.
"""

import ipaddress
import json
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from chatvla_edge.drivers.doctor.machine import Line, Machine
from chatvla_edge.drivers.rig import Camera, Device, Rig

# driver -> what must be installed (any one of them), and how
LIBRARIES: dict[str, tuple[tuple[str, ...], str]] = {
    "realsense": (("pyrealsense2", "dreamscale-pyrealsense2"), "pip install 'chatvla-edge[realsense]'"),
    "arx5": (("arx5-interface",), "pip install 'chatvla-edge[arx]'"),
    "arx_r5_sdk": (("arx-r5-sdk",), "pip install arx-r5-sdk; apt-get install libkdl-parser-dev liborocos-kdl-dev"),
    "franka_rs": (("franka-rs",), "pip install 'chatvla-edge[franka]'"),
    "franky": (("franky-control",), "pip install franky-control (x86-64 only)"),
    "pylibfranka": (("pylibfranka",), "pip install pylibfranka (x86-64 only)"),
    "robotiq_2f85": (("pymodbus",), "pip install 'chatvla-edge[robotiq]'"),
    "mujoco": (("mujoco",), "pip install 'chatvla-edge[sim]'"),
}
# Any Python understands this, without us.
ASK_VERSIONS = """
import sys
from importlib.metadata import PackageNotFoundError, version
for name in sys.argv[1:]:
    try:
        print(name, version(name))
    except PackageNotFoundError:
        pass
"""
USB_CAMERAS = {"realsense": "8086", "zed": "2b03", "zed_uvc": "2b03"}  # driver -> USB vendor
L515 = "0b64"
L515_LAST = (2, 54)  # librealsense 2.55 dropped it
USB3 = 5000  # Mbit/s
CAN_BITRATE = 1_000_000  # of ARX arms
QUEUE = 64  # frames; the default of 10 holds one cycle of 7 motors, and the next write fails with ENOBUFS
ARPHRD_CAN = "280"
SLOW_NICS = {"r8169": "Realtek", "r8168": "Realtek", "bnx2": "Broadcom", "tg3": "Broadcom"}
ADDRESSES = ("address", "host", "ip", "robot")  # what drivers call where their robot is


def check_devices(rig: Rig | None, machine: Machine) -> Iterator[Line]:
    """What the devices of a rig need; without a rig, what is plugged in."""
    usb = list(_usb(machine))
    if rig is None:
        for plugged in usb:
            if any(plugged["idVendor"] == vendor and _looks_like(one, plugged) for one, vendor in USB_CAMERAS.items()):
                yield _usb_speed(f"usb {plugged['product']}", plugged)
        for path in machine.glob("/sys/class/net/*/type"):
            if machine.said(path) == ARPHRD_CAN:
                yield from _can(path.parent.name, path.parent.name, machine)
        return
    yield from _cores(rig, machine)
    cameras = {f"cameras.{name}": camera for name, camera in rig.cameras.items()}
    arms = {f"arms.{name}": arm for name, arm in rig.arms.items()}
    for where, device in (*cameras.items(), *arms.items()):
        yield from _library(where, device, machine)
        if isinstance(device, Camera):
            yield from _camera(where, device, usb, machine)
        if isinstance(interface := device.options.get("interface"), str):
            yield from _can(where, interface, machine)
        if isinstance(port := device.options.get("port"), str) and port.startswith("/"):
            yield from _serial(where, port, machine)
        for option in ADDRESSES:
            if isinstance(address := device.options.get(option), str):
                yield from _network(where, address, machine)


def _cores(rig: Rig, machine: Machine) -> Iterator[Line]:
    isolated = _list(machine.text("/sys/devices/system/cpu/isolated") or "")
    online = _list(machine.text("/sys/devices/system/cpu/online") or "")
    asked = set(rig.cores.servo) | set(rig.cores.devices) | set(rig.cores.policy) | set(rig.cores.cameras)
    if online and asked - online:
        missing = ", ".join(map(str, sorted(asked - online)))
        yield Line("cores", "fail", f"no CPU {missing}", "name CPUs that are there in the rig's `cores`")
        return
    servo = set(rig.cores.servo)
    if not servo:
        yield Line(
            "cores", "warn", "the servo has none of its own", "isolate one (isolcpus=3), name it in `cores.servo`"
        )
    elif servo <= isolated:
        yield Line("cores", "ok", f"servo on {_names(servo)}, isolated")
    else:
        yield Line("cores", "warn", f"servo on {_names(servo)}, not isolated", f"boot with isolcpus={_names(servo)}")


def _library(where: str, device: Device, machine: Machine) -> Iterator[Line]:
    known = LIBRARIES.get(device.driver)
    if device.python is not None:
        if not device.python.is_file():
            yield Line(f"{where} python", "fail", f"no {device.python}", "make that environment, or correct `python`")
            return
        if known is None:
            return
        said = machine.answer([str(device.python), "-c", ASK_VERSIONS, *known[0]]) or ""
        found = dict(line.split(" ", 1) for line in said.splitlines())
    elif device.driver == "zed":
        yield _pyzed(where, machine)
        return
    elif known is None:
        return
    else:
        found = {name: one for name in known[0] if (one := machine.version(name))}
    if found:
        yield Line(f"{where} library", "ok", ", ".join(f"{name} {one}" for name, one in found.items()))
    else:
        yield Line(f"{where} library", "fail", f"no {' or '.join(known[0])}", known[1])


def _pyzed(where: str, machine: Machine) -> Line:
    found = machine.version("pyzed")
    remedy = "install the ZED SDK and run its get_python_api.py"
    if found is None:
        return Line(f"{where} library", "fail", "no pyzed", remedy)
    if int(found.split(".")[0]) < 3:
        said = f"pyzed {found}, another project's package of that name"
        return Line(f"{where} library", "fail", said, f"pip uninstall pyzed; {remedy}")
    if machine.path("/usr/local/zed").exists():
        return Line(f"{where} library", "ok", f"pyzed {found}, ZED SDK in /usr/local/zed")
    return Line(f"{where} library", "warn", f"pyzed {found}, no SDK in /usr/local/zed", remedy)


# ----------------------------------------------------------------------------------------------------------------- USB


def _usb(machine: Machine) -> Iterator[dict[str, str]]:
    for vendor in machine.glob("/sys/bus/usb/devices/*/idVendor"):
        facts = {name: machine.said(vendor.parent / name) or "" for name in ("idProduct", "product", "serial", "speed")}
        yield {"idVendor": machine.said(vendor) or "", **facts}


def _camera(where: str, camera: Camera, usb: list[dict[str, str]], machine: Machine) -> Iterator[Line]:
    vendor = USB_CAMERAS.get(camera.driver)
    if vendor is None or camera.options.get("file") is not None:
        return
    serial = camera.options.get("serial")
    found = [one for one in usb if one["idVendor"] == vendor and _looks_like(camera.driver, one)]
    # A ZED's own number is not its USB serial, so it cannot tell two ZEDs apart here.
    chosen = [one for one in found if serial is None or camera.driver != "realsense" or serial in one["serial"]]
    if not chosen:
        others = ", ".join(one["serial"] or one["product"] for one in found)
        said = f"none with serial {serial}, but {others}" if found else "none on USB"
        yield Line(f"{where} usb", "fail", said, "plug it in, or correct `serial`; see `lsusb`")
        return
    for device in chosen:
        yield _usb_speed(f"{where} usb", device)
    version = machine.version("pyrealsense2")
    if version is not None and any(one["idProduct"] == L515 for one in chosen) and camera.python is None:
        if tuple(map(int, version.split(".")[:2])) > L515_LAST:
            remedy = "pip install pyrealsense2==2.54.2.5684, in an interpreter of the camera's own (`python:`)"
            yield Line(f"{where} sdk", "fail", f"pyrealsense2 {version}, which no longer knows the L515", remedy)
        else:
            yield Line(f"{where} sdk", "ok", f"pyrealsense2 {version} knows the L515")


def _looks_like(driver: str, device: Mapping[str, str]) -> bool:
    # Intel makes more than cameras.
    return driver != "realsense" or device["idProduct"] == L515 or "realsense" in device["product"].lower()


def _usb_speed(check: str, device: Mapping[str, str]) -> Line:
    speed = float(device["speed"] or 0)
    name = f"{device['product'] or device['idVendor']} at {speed:g} Mbit/s"
    if speed >= USB3:
        return Line(check, "ok", name)
    return Line(check, "fail", f"{name}, expected USB 3", "use a blue port and a short USB 3 cable; turn the plug over")


# ----------------------------------------------------------------------------------------------------- CAN, serial, net


def _can(where: str, interface: str, machine: Machine) -> Iterator[Line]:
    folder = machine.path(f"/sys/class/net/{interface}")
    up = f"sudo ip link set {interface} up type can bitrate {CAN_BITRATE}"
    check = f"{where} can"
    if not folder.exists():
        yield Line(
            check, "fail", f"no interface {interface}", f"plug the adapter in (slcand for a serial one), then {up}"
        )
        return
    if machine.said(folder / "type") != ARPHRD_CAN:
        yield Line(check, "fail", f"{interface} is no CAN interface", "correct `interface`; see `ip link`")
        return
    flags = int(machine.said(folder / "flags") or "0", 16)
    if not flags & 1:
        yield Line(check, "fail", f"{interface} is down", up)
        return
    rate, state = _can_facts(interface, machine)
    if state in ("BUS-OFF", "ERROR-PASSIVE"):
        again = f"check cable and terminators, then sudo ip link set {interface} down && {up}"
        yield Line(check, "fail", f"{interface} is {state}", again)
    elif rate is not None and rate != CAN_BITRATE:
        yield Line(check, "fail", f"{interface} at {rate} bit/s, expected {CAN_BITRATE}", up)
    else:
        yield Line(check, "ok", f"{interface} up, {'bit rate not known' if rate is None else f'{rate} bit/s'}")
    queue = int(machine.said(folder / "tx_queue_len") or 0)
    if queue < QUEUE:
        remedy = f"sudo ip link set {interface} txqueuelen 128"
        yield Line(f"{check} queue", "warn", f"{queue} frames, expected {QUEUE} or more", remedy)
    else:
        yield Line(f"{check} queue", "ok", f"{queue} frames")


def _can_facts(interface: str, machine: Machine) -> tuple[int | None, str]:
    said = machine.answer(["ip", "-details", "-json", "link", "show", interface])
    try:
        data = json.loads(said or "[{}]")[0].get("linkinfo", {}).get("info_data", {})
        rate = data.get("bittiming", {}).get("bitrate")
        return (None if rate is None else int(rate)), str(data.get("state", ""))
    except (ValueError, LookupError, TypeError, AttributeError):
        return None, ""


def _serial(where: str, port: str, machine: Machine) -> Iterator[Line]:
    path = machine.path(port)
    check = f"{where} serial"
    if not path.exists():
        yield Line(check, "fail", f"no {port}", "plug the adapter in; /dev/serial/by-id names it for good")
        return
    if not machine.writable(path):
        yield Line(check, "fail", f"{port} is not writable", "sudo usermod -aG dialout $USER, log in again")
        return
    name = path.resolve().name
    timer = machine.text(f"/sys/bus/usb-serial/devices/{name}/latency_timer")
    if timer is None or int(timer) <= 1:
        yield Line(check, "ok", f"{port}" + ("" if timer is None else f", latency timer {timer} ms"))
        return
    remedy = (
        f"echo 1 | sudo tee /sys/bus/usb-serial/devices/{name}/latency_timer; for good a udev rule: "
        'ACTION=="add", SUBSYSTEM=="usb-serial", DRIVER=="ftdi_sio", ATTR{latency_timer}="1"'
    )
    yield Line(check, "warn", f"{port}, latency timer {timer} ms: each exchange waits that long", remedy)


def _network(where: str, address: str, machine: Machine) -> Iterator[Line]:
    check = f"{where} network"
    try:
        target = ipaddress.IPv4Address(address)
    except ValueError:
        return  # a name: looking it up may take seconds
    if target.is_loopback:
        yield Line(check, "ok", f"{address}: this computer")
        return
    interface = _route(target, machine.text("/proc/net/route") or "")
    if interface is None:
        yield Line(check, "fail", f"no route to {address}", "give the network card an address in the robot's network")
        return
    folder = machine.path(f"/sys/class/net/{interface}")
    if machine.said(folder / "operstate") == "down":
        yield Line(check, "fail", f"{interface} to {address} is down", "check the cable and the robot's power")
        return
    speed = machine.said(folder / "speed") or "?"
    driver = _driver(folder)
    found = f"{address} by {interface} ({driver or 'unknown driver'}, {speed} Mbit/s)"
    if (folder / "wireless").exists():
        yield Line(check, "fail", f"{found}, wireless", "connect the robot by cable, directly")
    elif speed.lstrip("-").isdigit() and 0 < int(speed) < 1000:
        yield Line(check, "fail", f"{found}, expected 1000", "use a Gigabit card and cable, without a switch")
    elif driver in SLOW_NICS:
        remedy = "use an Intel card: on-board ones of this make were seen to hold packets for 3 ms (libfranka#205)"
        yield Line(check, "warn", f"{found}, {SLOW_NICS[driver]}", remedy)
    else:
        yield Line(check, "ok", found)


def _route(target: ipaddress.IPv4Address, table: str) -> str | None:
    """The interface that the kernel's table gives for an address: the longest mask that fits."""
    best: tuple[int, str] | None = None
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 8:
            continue
        network, mask = (socket.ntohl(int(fields[i], 16)) for i in (1, 7))
        if int(target) & mask == network and (best is None or mask > best[0]):
            best = (mask, fields[0])
    return None if best is None else best[1]


def _driver(folder: Path) -> str:
    link = folder / "device" / "driver"
    return link.resolve().name if link.exists() else ""


def _list(text: str) -> set[int]:
    """CPU numbers of a kernel list, `0-2,5`."""
    numbers: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def _names(numbers: set[int]) -> str:
    return ",".join(map(str, sorted(numbers)))
