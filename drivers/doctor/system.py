"""The computer itself: Python, JetPack, engines, kernel, rights, clocks, memory, disk."""

import platform
import re
from collections.abc import Iterator

from chatvla_edge.drivers.doctor.machine import Line, Machine

PRIORITY = 80  # of the servo
CAP_IPC_LOCK, CAP_SYS_NICE = 14, 23  # linux/capability.h
GB = 1e9
MEMORY = (4 * GB, 1 * GB)  # warn, fail below: a policy of 2 billion parameters in int4 and its caches need about 4
DISK = (10 * GB, 1 * GB)  # warn, fail below: a session with one camera logs about 6 GB an hour
# NVIDIA's release notes: Jetson Linux -> JetPack
JETPACK = {"36.3": "6.0", "36.4": "6.1 or 6.2", "38.2": "7.0", "38.4": "7.1", "39.2": "7.2"}
RIGHTS = "put `@robot - rtprio 95` and `@robot - memlock unlimited` into /etc/security/limits.d/, log in again"


def check_system(machine: Machine) -> Iterator[Line]:
    """All of it."""
    yield _python()
    yield from _jetpack(machine)
    yield from _engines(machine)
    yield _preemption(machine)
    yield from _rights(machine)
    yield _throttle(machine)
    yield _cpu_latency(machine)
    yield from _clocks(machine)
    yield _memory(machine)
    yield _disk(machine)


def _python() -> Line:
    found = platform.python_version()
    if (3, 10) <= tuple(map(int, found.split(".")[:2])) <= (3, 12):
        return Line("python", "ok", found)
    return Line("python", "fail", found, "use Python 3.10, 3.11 or 3.12")


def _jetpack(machine: Machine) -> Iterator[Line]:
    release = machine.text("/etc/nv_tegra_release")
    if release is None:
        yield Line("jetpack", "ok", f"none: no Jetson ({platform.machine()})")
        return
    found = re.match(r"#\s*R(\d+).*REVISION:\s*(\d+)(?:\.(\d+))?", release)
    if found is None:
        yield Line("jetpack", "warn", release[:60], "the release is not known here: check what it brings")
        return
    major, minor, patch = found.groups()
    jetpack = JETPACK.get(f"{major}.{minor}")
    l4t = f"L4T {major}.{minor}" + (f".{patch}" if patch else "")
    if jetpack is None:
        yield Line("jetpack", "warn", l4t, "not known here; bundles say which JetPack they were lowered for")
    elif jetpack.startswith("6"):
        yield Line(
            "jetpack", "warn", f"JetPack {jetpack} ({l4t})", "TensorRT bundles need JetPack 7 (TensorRT 10.7 or newer)"
        )
    else:
        yield Line("jetpack", "ok", f"JetPack {jetpack} ({l4t})")
    mode = machine.text("/var/lib/nvpmodel/status")
    if mode is not None:
        number = re.search(r"(\d+)", mode)
        names = dict(
            re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>", machine.text("/etc/nvpmodel.conf") or "")
        )
        at = str(int(number.group(1))) if number else "?"
        name = names.get(at, "unknown")
        if "MAXN" in name.upper():
            yield Line("power mode", "ok", f"{at} ({name})")
        else:
            yield Line("power mode", "warn", f"{at} ({name})", "sudo nvpmodel -m 0 for the full clocks")


def _engines(machine: Machine) -> Iterator[Line]:
    versions = {name: machine.version(name) for name in ("onnxruntime", "onnxruntime-gpu", "tensorrt")}
    found = ", ".join(f"{name} {one}" for name, one in versions.items() if one)
    if versions["onnxruntime"] and versions["onnxruntime-gpu"]:
        yield Line("engines", "fail", found, "keep one: both own the module `onnxruntime`; see docs/install.md")
    elif not found:
        yield Line("engines", "warn", "none", "pip install 'chatvla-edge[cpu]', or TensorRT with JetPack")
    else:
        yield Line("engines", "ok", found)


def _preemption(machine: Machine) -> Line:
    release = machine.text("/proc/sys/kernel/osrelease") or "?"
    if machine.text("/sys/kernel/realtime") == "1":
        return Line("kernel", "ok", f"{release}, PREEMPT_RT")
    model = re.search(r"PREEMPT\w*", machine.text("/proc/version") or "")
    return Line(
        "kernel",
        "warn",
        f"{release}, {model.group() if model else 'no preemption'}",
        "a PREEMPT_RT kernel bounds the worst case; on a Jetson: NVIDIA's real-time kernel packages",
    )


def _rights(machine: Machine) -> Iterator[Line]:
    limits = machine.text("/proc/self/limits") or ""
    status = machine.text("/proc/self/status") or ""
    found = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    capabilities = int(found.group(1), 16) if found else 0
    priority = _soft(limits, "Max realtime priority")
    if capabilities >> CAP_SYS_NICE & 1:
        yield Line("real-time priority", "ok", "any (CAP_SYS_NICE)")
    elif priority is not None and priority >= PRIORITY:
        yield Line("real-time priority", "ok", f"up to {priority:g}")
    else:
        had = "none" if not priority else f"up to {priority:g}"
        yield Line("real-time priority", "warn", f"{had}, expected {PRIORITY}", RIGHTS)
    locked = _soft(limits, "Max locked memory")
    if capabilities >> CAP_IPC_LOCK & 1:
        yield Line("locked memory", "ok", "any (CAP_IPC_LOCK)")
    elif locked == float("inf"):
        yield Line("locked memory", "ok", "unlimited")
    else:
        yield Line("locked memory", "warn", "unknown" if locked is None else f"{locked / 1e6:.1f} MB", RIGHTS)


def _soft(limits: str, name: str) -> float | None:
    found = re.search(rf"^{name}\s+(\S+)", limits, re.MULTILINE)
    if found is None:
        return None
    return float("inf") if found.group(1) == "unlimited" else float(found.group(1))


def _throttle(machine: Machine) -> Line:
    share = machine.text("/proc/sys/kernel/sched_rt_runtime_us")
    if share is None:
        return Line("real-time share", "ok", "not bounded by this kernel")
    if int(share) < 0 or int(share) >= 900_000:
        return Line("real-time share", "ok", "all" if int(share) < 0 else f"{int(share) / 1e4:g} %")
    return Line("real-time share", "warn", f"{int(share) / 1e4:g} %", "sysctl -w kernel.sched_rt_runtime_us=950000")


def _cpu_latency(machine: Machine) -> Line:
    path = machine.path("/dev/cpu_dma_latency")
    if not path.exists():
        return Line(
            "CPU idle states", "warn", "no /dev/cpu_dma_latency", "a kernel with CONFIG_CPU_IDLE wakes up sooner"
        )
    if machine.writable(path):
        return Line("CPU idle states", "ok", "can be kept shallow (/dev/cpu_dma_latency)")
    return Line(
        "CPU idle states",
        "warn",
        "/dev/cpu_dma_latency is not writable",
        'a udev rule: KERNEL=="cpu_dma_latency", GROUP="robot", MODE="0660"; wake-ups are 20 us later without',
    )


def _clocks(machine: Machine) -> Iterator[Line]:
    governors = {
        governor
        for path in machine.glob("/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")
        if (governor := machine.said(path))
    }
    if not governors:
        yield Line("CPU clocks", "ok", "fixed: no frequency scaling here")
    elif governors == {"performance"}:
        yield Line("CPU clocks", "ok", "performance")
    else:
        remedy = "sudo jetson_clocks, or cpupower frequency-set -g performance"
        yield Line("CPU clocks", "warn", ", ".join(sorted(governors)), remedy)
    for gpu in machine.glob("/sys/class/devfreq/*gpu*"):
        low, high = machine.said(gpu / "min_freq"), machine.said(gpu / "max_freq")
        if low is None or high is None:
            continue
        if low == high:
            yield Line("GPU clocks", "ok", f"fixed at {int(high) / 1e6:.0f} MHz")
        else:
            yield Line("GPU clocks", "warn", f"{int(low) / 1e6:.0f}-{int(high) / 1e6:.0f} MHz", "sudo jetson_clocks")


def _memory(machine: Machine) -> Line:
    found = re.search(r"^MemAvailable:\s*(\d+) kB", machine.text("/proc/meminfo") or "", re.MULTILINE)
    if found is None:
        return Line("memory", "warn", "unknown", "no MemAvailable in /proc/meminfo")
    free = int(found.group(1)) * 1024
    return _at_least("memory", free, MEMORY, "free", "end other programs, or use a smaller bundle")


def _disk(machine: Machine) -> Line:
    return _at_least("disk", machine.free(machine.root), DISK, "free", "make room: sessions are logged to disk")


def _at_least(check: str, found: float, bounds: tuple[float, float], what: str, remedy: str) -> Line:
    text = f"{found / GB:.1f} GB {what}"
    warn, fail = bounds
    if found >= warn:
        return Line(check, "ok", text)
    return Line(check, "warn" if found >= fail else "fail", f"{text}, expected {warn / GB:g} GB", remedy)
