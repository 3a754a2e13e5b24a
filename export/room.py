"""Whether this machine has the memory and the disk for an export: asked before the first byte, not found out by being
killed after an hour.

Writing takes a few tensors and so does the reference, which streams. What grows with the policy are the engines that
the gates load: ONNX Runtime packs every matrix it multiplies with into memory of its own.
"""

import ctypes
import gc
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from chatvla_edge.export.checkpoint.reader import Checkpoint
from chatvla_edge.export.stages.graph import Graph
from chatvla_edge.export.streaming import HELD, SLAB

# The interpreter with torch, transformers and ONNX Runtime: 340 MB anonymous were seen with a policy of 2 MB.
BASE = 400 << 20
# Rows of a pass, cache and buffers of the engines, fragments of the allocators.
ROWS = 400 << 20
# Besides the weights: graphs, tokenizer, probes (frames and hidden states, compressed).
EXTRA_DISK = 64 << 20


def engine_bytes(graph: Graph) -> int:
    """Memory that the engine of a stage packs its weights into; a table that rows are gathered from stays mapped."""
    multiplied = {
        name for node in graph.nodes for place, name in enumerate(node.input) if node.op_type != "Gather" or place != 0
    }
    return sum(weight.nbytes for name, weight in graph.weights.items() if name in multiplied)


def memory(graphs: Sequence[Graph], checkpoint: Checkpoint, gates: bool) -> tuple[int, str]:
    """Predicted peak of an export in bytes, without mapped files, and what it is that takes it."""
    largest = max(4 * entry.nbytes // entry.dtype.itemsize for entry in checkpoint.entries.values())
    writing = BASE + 2 * largest, "writing the largest tensor"
    if not gates:
        return writing
    parameters = sum(entry.nbytes // entry.dtype.itemsize for entry in checkpoint.entries.values())
    # As trained and as the engines hold it.
    reference = BASE + ROWS + 2 * min(HELD, 4 * parameters) + 4 * SLAB, "the reference"
    engines = BASE + ROWS + sum(map(engine_bytes, graphs)), "judging: the engines of all stages"
    return max(writing, reference, engines)


def give_back() -> None:
    """Return freed memory to the system: engines leave a heap of freed blocks that malloc keeps for itself (3 GB of a
    2B policy were seen), while what comes next asks for blocks of other sizes.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library: nothing is lost but the pages
        ctypes.CDLL(None).malloc_trim(0)


def available_memory() -> int | None:
    """Bytes that this process may still take: the system's, or what is left of a control group's. None: not said."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
        folder = Path("/sys/fs/cgroup") / group
        # Pages of files count as used and go when others are needed.
        used = int((folder / "memory.current").read_text())
        for line in (folder / "memory.stat").read_text().splitlines():
            if line.startswith(("inactive_file ", "active_file ")):
                used -= int(line.split()[1])
        found.append(int((folder / "memory.max").read_text()) - used)
    except (OSError, ValueError, IndexError):
        pass  # no control group of version 2, or one without a limit ("max")
    return min(found, default=None)


def _resident() -> int:
    """Bytes of memory that this process has already."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def require(graphs: Sequence[Graph], checkpoint: Checkpoint, gates: bool, destination: Path, kept: int) -> None:
    """Raise ValueError where memory or disk will not do. kept: bytes of the bundle that lie there already."""
    needed, what = memory(graphs, checkpoint, gates)
    free = available_memory()
    if free is not None and free + _resident() < needed:
        do = "Free memory, or export on another machine"
        if gates and memory(graphs, checkpoint, False)[0] <= free + _resident():
            do = (
                "Free memory, choose a lower precision, or export with --no-gates and run `chatvla-edge verify` where "
                "there is more: without gates nothing shows that the bundle computes its checkpoint"
            )
        raise ValueError(
            f"found {(free + _resident()) / 1e9:.1f} GB of memory for this export, expected {needed / 1e9:.1f} GB, "
            f"about its peak ({what}). {do}"
        )
    size = sum(graph.weight_bytes for graph in graphs) + EXTRA_DISK - kept
    left = shutil.disk_usage(os.path.realpath(destination.parent)).free
    if left < size:
        raise ValueError(
            f"{destination.parent}: found {left / 1e9:.1f} GB free, expected {size / 1e9:.1f} GB for the bundle. "
            "Make room, or choose another place"
        )
