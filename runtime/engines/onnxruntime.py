"""ONNX Runtime behind the engine protocol: numpy arrays bound by address, nothing copied, nothing allocated per run."""

import ctypes
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from chatvla_edge.runtime.engines import Array

# The "MergeShapeInfo" warnings about cache outputs say only that their capacity is symbolic.
LOG_ERRORS = 3


# A worker that spins between operators burns the core that the servo may need next.
QUIET = {"session.intra_op.allow_spinning": "0", "session.inter_op.allow_spinning": "0"}
# How long the threads of a new session may take to pin themselves, on a machine that is busy.
PINNED_WITHIN_S = 2.0
AFFINITIES = "session.intra_op_thread_affinities"


@dataclass(frozen=True)
class Threads:
    """How much of the machine an engine may take.

    count: compute threads, the calling one included. processors: one for each of them, numbered as the system does, or
    none to let the scheduler choose. The calling thread is the first and pins itself, see `pin`: an engine pins only
    the threads that it starts.
    """

    count: int = 1
    processors: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"an engine needs at least one thread, found {self.count}")
        there = range(os.cpu_count() or 1)
        if self.processors and (len(set(self.processors)) != self.count or not set(self.processors) <= set(there)):
            raise ValueError(
                f"found the processors {list(self.processors)} for {self.count} threads, expected as many different "
                f"ones of {there.start}..{there.stop - 1}: name one per thread, or none"
            )

    @classmethod
    def on(cls, processors: Sequence[int]) -> "Threads":
        """One thread on each of these processors, e.g. those that a rig file gives its policy process."""
        return cls(len(processors), tuple(processors))

    def pin(self) -> None:
        """Put the calling thread on the first processor; nothing where none was named. Raises OSError if refused."""
        if self.processors:
            os.sched_setaffinity(0, self.processors[:1])

    @property
    def affinity(self) -> str | None:
        """Processors of the threads that the engine starts, in ONNX Runtime's notation: numbered from 1, `2;3`."""
        return ";".join(str(processor + 1) for processor in self.processors[1:]) or None


class OnnxRuntimeEngine:
    """One stage in ONNX Runtime on the CPU."""

    def __init__(self, path: Path, threads: Threads) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads.count
        options.inter_op_num_threads = 1
        options.log_severity_level = LOG_ERRORS
        for name, value in QUIET.items():
            options.add_session_config_entry(name, value)
        # Without VNNI, products of unsigned by signed bytes saturate at 16 bits; this takes exact ones, only there.
        options.add_session_config_entry("session.x64quantprecision", "1")
        if threads.affinity is not None:
            options.add_session_config_entry(AFFINITIES, threads.affinity)
        self.path = path
        before = _threads()
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        _return_freed_memory()
        self._refuse_strays(threads, _threads() - before)
        self._binding = self._session.io_binding()
        self._inputs = {tensor.name for tensor in self._session.get_inputs()}
        self._outputs = {tensor.name for tensor in self._session.get_outputs()}

    def setting(self, name: str) -> str:
        """A setting of the running session, as ONNX Runtime holds it."""
        return str(self._session.get_session_options().get_session_config_entry(name))

    def _refuse_strays(self, threads: Threads, started: set[int]) -> None:
        """Raise OSError where a thread does not run where it was told to: ONNX Runtime only logs that it could not."""
        wanted = [{processor} for processor in threads.processors[1:]]
        deadline = time.monotonic() + PINNED_WITHIN_S
        while True:
            found = [os.sched_getaffinity(thread) for thread in started & _threads()]
            if all(each in found for each in wanted):
                return
            if time.monotonic() > deadline:
                break
            time.sleep(1e-3)  # a thread pins itself once it runs
        raise OSError(
            f"{self.path.name}: threads were to run on the processors {list(threads.processors[1:])}, they run on "
            f"{sorted(map(sorted, found))}: give the policy processors that this process may use, see "
            "/proc/self/status, Cpus_allowed_list"
        )

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Execute the stage on the given arrays."""
        if inputs.keys() != self._inputs or outputs.keys() != self._outputs:
            missing = sorted((self._inputs - inputs.keys()) | (self._outputs - outputs.keys()))
            extra = sorted((inputs.keys() - self._inputs) | (outputs.keys() - self._outputs))
            raise ValueError(f"{self.path.name}: missing tensors {missing}, unknown tensors {extra}")
        for name, array in inputs.items():
            self._check(name, array)
            self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            self._check(name, array)
            self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(self._binding)

    def _check(self, name: str, array: Array) -> None:
        # The engine is handed an address: a strided array would be read as something else without a word.
        if not array.flags.c_contiguous:
            raise ValueError(f"{self.path.name}: {name} must be C-contiguous, found strides {array.strides}")
        if array.dtype == np.float64:
            raise ValueError(f"{self.path.name}: {name} is float64, no stage takes that")


def _threads() -> set[int]:
    return {int(entry.name) for entry in Path("/proc/self/task").iterdir()}


def _return_freed_memory() -> None:
    """Give back what loading left behind: glibc keeps the holes between packed weights, as much again in int8-row."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, other libraries need not
    if trim is not None:
        trim(0)
