"""What this machine can do at best: how fast it reads memory and multiplies matrices. Others take their share of it.

- read bandwidth: every 64-bit word of a buffer far larger than the caches is or-ed into one, by numpy (a loop over
  vectors that the processor prefetches), one contiguous part for each thread. Pages of 4 KiB and, where the kernel
  grants them, of 2 MiB: a share of bandwidth only means something at the same page size and number of threads.
- matrix product: float32 `[n, n] @ [n, n]` by numpy's BLAS. Its threads are fixed when it is loaded, so each number of
  threads gets a process of its own.
"""

import json
import mmap
import os
import re
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.benchmarks import machine, script
from chatvla_edge.benchmarks.method import Work, compare, measure
from chatvla_edge.benchmarks.report import Report

SUMMARY = "What this machine can do at best: memory read bandwidth, float32 matrix product."

LARGEST = 1 << 30  # a virtual machine is told the host's whole cache, of which it has a part
BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


def beyond_caches() -> int:
    """Bytes of a buffer that no cache holds: four times the last level, within 256 MiB and 1 GiB."""
    words = re.match(r"(\d+)K", machine.Watch().describe()["cpu"].get("l3", ""))
    return min(max(4 * 1024 * int(words.group(1) if words else 0), LARGEST // 4), LARGEST)


def buffer(nbytes: int, *, huge: bool) -> NDArray[np.uint64]:
    """`[nbytes / 8] uint64` of touched memory in 2 MiB pages (as far as the kernel grants them) or in 4 KiB pages."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    words = np.frombuffer(memory, np.uint64)
    words[:] = 1
    return words


def streaming_read(words: NDArray[np.uint64], threads: int) -> Work:
    """Work that reads all of `words` once, to be compared with other work in the same rounds. The words stand still."""
    parts = np.array_split(words, threads)
    if threads == 1:
        return lambda: np.bitwise_or.reduce(words)
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(np.bitwise_or.reduce, parts))


def gemm_peak(threads: int, *, size: int = 1024, seconds: float = 2.0) -> float:
    """FLOP/s of numpy's float32 matrix product `[size, size]`, in a process whose BLAS has `threads` threads."""
    program = f"from chatvla_edge.benchmarks.peaks import gemm; gemm({size}, {seconds})"
    environment = os.environ | dict.fromkeys(BLAS_THREADS, str(threads))
    answer = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)  # noqa: S603
    return 2.0 * size**3 / float(json.loads(answer))


def gemm(size: int, seconds: float) -> None:
    """Print the seconds of one product: the body of `gemm_peak`'s process."""
    x = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    out = np.empty_like(x)
    found = measure("gemm", lambda: np.matmul(x, x, out=out), seconds=seconds)
    sys.stdout.write(json.dumps(found.samples["gemm"].quantile(0.5)))


def add_arguments(parser: ArgumentParser) -> None:
    """The number of threads beside one."""
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all usable cores")


def run(options: Namespace) -> Report:
    """Read bandwidth at 1 and `options.threads` threads and both page sizes, interleaved; then the matrix product."""
    seconds, nbytes = (1.5, LARGEST // 4) if options.quick else (10.0, beyond_caches())
    counts = sorted({1, options.threads})
    pages = {"4 KiB pages": buffer(nbytes, huge=False), "2 MiB pages": buffer(nbytes, huge=True)}
    works = {
        f"read, {count} thread{'s'[: count > 1]}, {name}": streaming_read(words, count)
        for name, words in pages.items()
        for count in counts
    }
    report = Report(title="What this machine can do at best")
    timed = compare(works, seconds=seconds)
    report.add(timed)
    for name, samples in timed.samples.items():
        report.figure(f"{name}: bandwidth", nbytes / float(np.median(samples.values)) / 1e9, "GB/s")
    for count in counts:
        report.figure(
            f"float32 product, {count} thread{'s'[: count > 1]}", gemm_peak(count, seconds=seconds) / 1e9, "GFLOP/s"
        )
    report.note(f"The buffer has {nbytes >> 20} MiB. Whether the kernel granted 2 MiB pages shows in their row only.")
    return report


if __name__ == "__main__":
    sys.exit(script.main(__file__))
