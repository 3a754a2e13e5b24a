"""Enabling switches: what is not certain is released, and nothing ever raises out of a look."""

import fcntl
import os
import sys
import threading
import tty
from types import SimpleNamespace

import pytest

from chatvla_edge.drivers import registry
from chatvla_edge.drivers.enable import hid
from chatvla_edge.drivers.enable.serial_loop import SerialLoop, SerialLoopOptions
from chatvla_edge.drivers.errors import DeviceNotFoundError, MissingLibraryError
from chatvla_edge.drivers.protocols import EnableInput

OPTIONS = {
    "gpio": {"line": 7},
    "hid": {"device": "/dev/input/event0", "key": 304},
    "serial_loop": {"port": "/dev/ttyUSB0"},
    "sim_switch": {"file": "/tmp/no-such-switch"},
}


@pytest.mark.parametrize("name", registry.OURS["enable"])
def test_a_switch_that_is_not_open_allows_nothing(name):
    switch = registry.create("enable", name, OPTIONS[name])
    assert isinstance(switch, EnableInput)
    assert switch.enabled() is False
    switch.close()
    switch.close()
    assert switch.enabled() is False


@pytest.mark.parametrize("name", ["hid", "serial_loop", "sim_switch"])
def test_a_switch_that_is_not_there_is_not_found(name):
    with pytest.raises(DeviceNotFoundError):
        registry.create("enable", name, OPTIONS[name]).open()


# ---------------------------------------------------------------------------------------------------------------- file


def test_a_file_allows_motion_while_it_says_on(tmp_path):
    file = tmp_path / "switch"
    file.write_text("on\n")
    switch = registry.create("enable", "sim_switch", {"file": str(file)})
    switch.open()
    assert switch.enabled() is True
    file.write_text("off")
    assert switch.enabled() is False
    file.write_text("on")
    assert switch.enabled() is True
    file.unlink()
    assert switch.enabled() is False


# ---------------------------------------------------------------------------------------------------------- serial loop


class Loop:
    """A serial port whose two lines are joined by a switch: a pseudo-terminal, and a thread that sends back."""

    def __init__(self):
        self.master, slave = os.openpty()
        tty.setraw(slave)
        self.port = os.ttyname(slave)
        self.slave = slave
        self.closed = True
        self.constant = None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.echoed = threading.Condition()
        self.count = 0
        self.thread.start()

    def run(self):
        while True:
            try:
                data = os.read(self.master, 64)
            except OSError:
                return
            with self.echoed:
                if self.constant is not None:
                    os.write(self.master, self.constant)
                elif self.closed:
                    os.write(self.master, data)
                self.count += len(data)
                self.echoed.notify_all()

    def passed(self, count):
        """Wait until so many bytes have gone through, or would have."""
        with self.echoed:
            assert self.echoed.wait_for(lambda: self.count >= count, timeout=10)

    def end(self):
        os.close(self.slave)
        os.close(self.master)


class Clock:
    def __init__(self):
        self.ns = 10**12

    def __call__(self):
        return self.ns


@pytest.fixture
def loop():
    loop = Loop()
    yield loop
    loop.end()


def looks(switch, loop, clock, count):
    """``count`` looks, 20 ms apart; what each said."""
    said = []
    for _ in range(count):
        before = loop.count
        said.append(switch.enabled())
        loop.passed(before + 1)
        clock.ns += 20_000_000
    return said


def test_a_closed_loop_allows_motion_and_an_open_one_does_not(loop):
    clock = Clock()
    switch = SerialLoop(SerialLoopOptions(port=loop.port), clock)
    switch.open()
    assert looks(switch, loop, clock, 20) == [False] * 2 + [True] * 18
    loop.closed = False
    # What was sent before is good for 80 ms.
    assert looks(switch, loop, clock, 10)[5:] == [False] * 5
    loop.closed = True
    assert looks(switch, loop, clock, 10)[3:] == [True] * 7
    switch.close()
    assert switch.enabled() is False


@pytest.mark.parametrize("constant", [b"\x00", b"\xff", b"\x00\xff" * 8])
def test_a_short_that_always_says_the_same_is_no_closed_loop(loop, constant):
    clock = Clock()
    switch = SerialLoop(SerialLoopOptions(port=loop.port), clock)
    switch.open()
    loop.constant = constant
    said = looks(switch, loop, clock, 200)
    assert sum(said) <= 8  # two in a row are guessed once in 65536 times, and count for 80 ms
    switch.close()


def test_a_port_that_goes_away_allows_nothing(loop):
    clock = Clock()
    switch = SerialLoop(SerialLoopOptions(port=loop.port), clock)
    switch.open()
    assert looks(switch, loop, clock, 3)[-1] is True
    os.close(switch._port.fd)  # as after pulling the plug: every call fails
    assert switch.enabled() is False
    switch._port.fd = None
    assert switch.enabled() is False


# ------------------------------------------------------------------------------------------------------------------ hid


@pytest.fixture
def keyboard(monkeypatch, tmp_path):
    """An input device of the kernel's interface: keys it has, keys that are down; gone when `gone`."""
    device = SimpleNamespace(path=tmp_path / "event0", has={304, 28}, down=set(), gone=False)
    device.path.touch()

    def ioctl(file, request, argument):
        direction, size, kind, number = request >> 30, request >> 16 & 0x3FFF, chr(request >> 8 & 255), request & 255
        assert (direction, kind, size) == (2, "E", len(argument))
        if device.gone:
            raise OSError(19, "No such device")
        keys = {0x18: device.down, 0x21: device.has}[number]
        return bytes(sum(1 << bit for bit in range(8) if 8 * byte + bit in keys) for byte in range(size))

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    return device


def test_the_call_is_the_kernel_s():
    # linux/input.h: EVIOCGKEY(96), EVIOCGBIT(EV_KEY, 96), written out by hand.
    assert (hid.EVIOCGKEY, hid.EVIOCGBIT_KEY) == (0x80604518, 0x80604521)


@pytest.mark.parametrize(("held", "down", "enabled"), [(True, {304}, True), (True, {28}, False), (True, set(), False),
                                                      (False, {304}, False), (False, {28}, True)])  # fmt: skip
def test_a_key_counts_as_the_options_want_it(keyboard, held, down, enabled):
    switch = registry.create("enable", "hid", {"device": str(keyboard.path), "key": 304, "held": held})
    switch.open()
    keyboard.down = down
    assert switch.enabled() is enabled
    keyboard.gone = True
    assert switch.enabled() is False


def test_a_device_without_the_key_is_refused(keyboard):
    switch = registry.create("enable", "hid", {"device": str(keyboard.path), "key": 305})
    with pytest.raises(DeviceNotFoundError, match="has no key 305"):
        switch.open()
    assert switch.enabled() is False


# ----------------------------------------------------------------------------------------------------------------- gpio


class Chip:
    """The part of libgpiod 2's module that is used, around one line."""

    def __init__(self):
        self.level, self.released, self.broken, self.asked = 0, False, False, None
        names = SimpleNamespace
        self.line = names(
            Bias={"PULL_UP": "up", "PULL_DOWN": "down", "AS_IS": "as is"},
            Direction=names(INPUT="input"),
            Value=names(ACTIVE=1, INACTIVE=0),
        )
        self.LineSettings = lambda **settings: settings

    def request_lines(self, path, *, consumer, config):
        if path != "/dev/gpiochip0":
            raise FileNotFoundError(2, "No such file or directory", path)
        (self.asked,) = config.items()
        return self

    def get_value(self, line):
        if self.broken:
            raise OSError(5, "Input/output error")
        assert line == self.asked[0]
        return int(self.level != self.asked[1]["active_low"])

    def release(self):
        self.released = True


@pytest.fixture
def chip(monkeypatch):
    chip = Chip()
    monkeypatch.setitem(sys.modules, "gpiod", chip)
    monkeypatch.setitem(sys.modules, "gpiod.line", chip.line)
    return chip


@pytest.mark.parametrize(("active", "level", "enabled"), [("high", 1, True), ("high", 0, False), ("low", 0, True),
                                                         ("low", 1, False)])  # fmt: skip
def test_a_line_counts_by_its_active_level(chip, active, level, enabled):
    switch = registry.create("enable", "gpio", {"line": "ENABLE", "active": active, "bias": "pull_up"})
    switch.open()
    assert chip.asked == ("ENABLE", {"direction": "input", "bias": "up", "active_low": active == "low"})
    chip.level = level
    assert switch.enabled() is enabled
    chip.broken = True
    assert switch.enabled() is False
    switch.close()
    assert chip.released


def test_a_chip_that_is_not_there_is_not_found(chip):
    with pytest.raises(DeviceNotFoundError, match="gpiochip9"):
        registry.create("enable", "gpio", {"line": 1, "chip": "/dev/gpiochip9"}).open()


def test_libgpiod_1_is_told_from_2(monkeypatch, chip):
    monkeypatch.delattr(Chip, "request_lines")
    with pytest.raises(MissingLibraryError, match="expected version 2"):
        registry.create("enable", "gpio", {"line": 1}).open()


def test_without_the_library_it_says_what_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gpiod", None)
    with pytest.raises(MissingLibraryError, match=r"chatvla-edge\[switch\]"):
        registry.create("enable", "gpio", {"line": 1}).open()


def test_the_real_library_has_what_is_used():
    gpiod = pytest.importorskip("gpiod", reason="gpiod is not installed")
    from gpiod.line import Bias, Direction, Value

    assert gpiod.LineSettings(direction=Direction.INPUT, bias=Bias["PULL_UP"], active_low=True).active_low
    assert Bias["AS_IS"]
    assert Bias["PULL_DOWN"]
    assert Value.ACTIVE
    with pytest.raises(DeviceNotFoundError):
        registry.create("enable", "gpio", {"line": 1, "chip": "/dev/no-such-chip"}).open()
