"""ONNX Runtime behind the engine protocol: numpy arrays bound by address, nothing copied, nothing allocated per run."""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from chatvla_edge.runtime.engines import Array

# The "MergeShapeInfo" warnings about cache outputs say only that their capacity is symbolic.
LOG_ERRORS = 3


@dataclass(frozen=True)
class Threads:
    """How much of the machine an engine may take.

    count: compute threads. affinity: processors they are pinned to, one group per thread beyond the first, in ONNX
    Runtime's own notation ("1;2,3", numbered from 1), or None.
    """

    count: int = 1
    affinity: str | None = None


class OnnxRuntimeEngine:
    """One stage in ONNX Runtime on the CPU."""

    def __init__(self, path: Path, threads: Threads) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads.count
        options.inter_op_num_threads = 1
        options.log_severity_level = LOG_ERRORS
        # A worker that spins between operators burns the core that the servo may need next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Without VNNI, products of unsigned by signed bytes saturate at 16 bits; this takes exact ones, only there.
        options.add_session_config_entry("session.x64quantprecision", "1")
        if threads.affinity is not None:
            options.add_session_config_entry("session.intra_op_thread_affinities", threads.affinity)
        self.path = path
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        _return_freed_memory()
        self._binding = self._session.io_binding()
        self._inputs = {tensor.name for tensor in self._session.get_inputs()}
        self._outputs = {tensor.name for tensor in self._session.get_outputs()}

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


def _return_freed_memory() -> None:
    """Give back what loading left behind: glibc keeps the holes between packed weights, as much again in int8-row."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, other libraries need not
    if trim is not None:
        trim(0)
