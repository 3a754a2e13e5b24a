"""What a figure was taken on: processor, memory, kernel, load, versions, commit.

Nothing here says whose machine it is: no host name, no user, no path. A kernel's local version may name its builder, so
only the parts of it that say something about timing are kept.
"""

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from chatvla_edge.benchmarks.units import readable

PACKAGES = (
    "chatvla-edge",
    "numpy",
    "Cython",
    "torch",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "transformers",
)
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
FLAVOURS = ("rt", "realtime", "lowlatency", "tegra", "generic", "raspi", "amd64", "arm64", "cloud", "WSL2")
GPU = "name,driver_version,compute_cap,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,persistence_mode"


@dataclass
class Watch:
    """Opened before a measurement; `describe` after it says what the machine was and did meanwhile."""

    started: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    load: float = field(default_factory=lambda: round(os.getloadavg()[0], 2))
    ticks: dict[str, int] = field(default_factory=lambda: _ticks())

    def describe(self) -> dict[str, Any]:
        """All that is known, JSON-ready. A key whose value could not be read is left out."""
        facts: dict[str, Any] = {
            "date": self.started,
            "cpu": _cpu(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "huge_pages": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
            "kernel": kernel(platform.release(), platform.version()),
            "gpus": _gpus(),
            "load": {"start": self.load, "end": round(os.getloadavg()[0], 2), **_shares(self.ticks, _ticks())},
            "versions": _versions(),
            "threads": {name: os.environ[name] for name in THREADS if name in os.environ},
            "git": _git(),
        }
        return {name: value for name, value in facts.items() if value not in (None, {}, [])}


def line(facts: dict[str, Any]) -> str:
    """The machine in one line, for a table's foot and a plot."""
    cpu, load, git = facts.get("cpu", {}), facts.get("load", {}), facts.get("git", {})
    parts = [
        f"{cpu.get('model', '?')}, {cpu.get('usable', '?')} cores",
        *(gpu["name"] for gpu in facts.get("gpus", [])),
        readable(facts["memory_bytes"], "B") if "memory_bytes" in facts else "",
        f"Linux {facts['kernel']}" if "kernel" in facts else "",
        f"load {load.get('start', '?')} -> {load.get('end', '?')}",
        f"{load['stolen'] * 100:.0f} % stolen" if load.get("stolen", 0) >= 0.01 else "",
        f"commit {git['commit'][:8]}{' + changes' if git['dirty'] else ''}" if git else "",
        facts.get("date", "")[:10],
    ]
    return ", ".join(part for part in parts if part)


def kernel(release: str, build: str) -> str:
    """Version, the flavours that matter to timing, and the preemption model: `6.1.0 rt PREEMPT_RT`."""
    number = re.match(r"[\d.]+", release)
    words = re.split(r"[-_.+\d]+", release)
    model = re.search(r"\bPREEMPT(_\w+)?\b", build)
    parts = [number.group().rstrip(".") if number else "?", *(word for word in FLAVOURS if word in words)]
    parts.append(model.group() if model else "no preemption")
    if chosen := _chosen("/sys/kernel/debug/sched/preempt"):
        parts.append(f"({chosen})")
    return " ".join(parts)


def _read(path: str | Path) -> str | None:
    try:
        return Path(path).read_text(errors="replace").strip("\0\n ")
    except OSError:
        return None


def _chosen(path: str) -> str | None:
    """The word in brackets, or in parentheses, among the kernel's alternatives."""
    found = re.search(r"[\[(](\w+)[\])]", _read(path) or "")
    return found.group(1) if found else None


def _cpu() -> dict[str, Any]:
    info = _read("/proc/cpuinfo") or ""

    def entry(name: str) -> str | None:
        found = re.search(rf"^{name}\s*:\s*(.+)$", info, re.MULTILINE)
        return found.group(1).strip() if found else None

    def megahertz(name: str) -> int | None:
        value = _read(f"/sys/devices/system/cpu/cpu0/cpufreq/{name}")
        return int(value) // 1000 if value and value.isdigit() else None

    part = entry("CPU part")
    quota = (_read("/sys/fs/cgroup/cpu.max") or "max").split()
    facts = {
        # Arm names no model in cpuinfo; a board says in the device tree what it is.
        "model": entry("model name") or (part and f"Arm part {part}") or platform.machine(),
        "board": _read("/proc/device-tree/model"),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "usable": len(os.sched_getaffinity(0)),
        "quota_cores": round(int(quota[0]) / int(quota[1]), 2) if quota[0] != "max" else None,
        "virtual": "hypervisor" in (entry("flags") or "").split() or None,
        "l3": _read("/sys/devices/system/cpu/cpu0/cache/index3/size"),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "mhz": megahertz("scaling_cur_freq") or round(float(entry("cpu MHz") or 0)) or None,
        "max_mhz": megahertz("cpuinfo_max_freq"),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _gpus() -> list[dict[str, str]]:
    """What nvidia-smi says of each GPU; empty where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={GPU}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if answer.returncode != 0:
        return []
    names = GPU.split(",")
    return [dict(zip(names, row.split(", "), strict=False)) for row in answer.stdout.strip().splitlines()]


def _ticks() -> dict[str, int]:
    """The kernel's count of processor time since boot, by kind."""
    names = "user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal"
    words = (_read("/proc/stat") or "").split("\n")[0].split()[1:9]
    return dict(zip(names, map(int, words), strict=False))


def _shares(before: dict[str, int], after: dict[str, int]) -> dict[str, float]:
    """Shares of all cores' time in between: busy (anybody's work, the measurement's too), stolen (by the host)."""
    spent = {name: after[name] - before[name] for name in before if name in after}
    total = sum(spent.values())
    if total <= 0:
        return {}
    stolen = spent.get("steal", 0) / total
    idle = (spent.get("idle", 0) + spent.get("iowait", 0)) / total
    return {"busy": round(1 - idle - stolen, 3), "stolen": round(stolen, 3)}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git() -> dict[str, Any] | None:
    """Commit of the checkout that this file lies in, and whether tracked files differ from it; None in a wheel."""
    folder, program = Path(__file__).resolve().parent, shutil.which("git")
    if program is None:
        return None

    def ask(*arguments: str) -> str | None:
        answer = subprocess.run([program, "-C", folder, *arguments], capture_output=True, text=True, check=False)  # noqa: S603
        return answer.stdout.strip() if answer.returncode == 0 else None

    # A wheel may lie in an environment inside some other project's checkout: its commit is not ours.
    if ask("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = ask("rev-parse", "HEAD")
    return {"commit": commit, "dirty": bool(ask("status", "--porcelain", "--untracked-files=no"))} if commit else None
