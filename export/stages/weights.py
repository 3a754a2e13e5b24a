"""Recipes for initializers: our parameters, read one at a time from a checkpoint when a file is written."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from chatvla_edge.export.stages.graph import Array, Graph, Weight

Read = Callable[[str], Tensor]
"""Our parameter name -> tensor in its stored dtype, e.g. `Checkpoint.tensor`."""

FP32 = np.dtype(np.float32)
_NARROW = {torch.bfloat16: TensorProto.BFLOAT16, torch.float16: TensorProto.FLOAT16}


class Parameters:
    """Makes weights of one stage out of a checkpoint's parameters, all as fp32.

    Lowerings change dtype and form afterwards; the values here are the checkpoint's own.
    """

    def __init__(self, read: Read, dtype: Callable[[str], torch.dtype] | None = None) -> None:
        """dtype: in which a parameter is stored, without reading it."""
        self.read, self.dtype = read, dtype

    def array(self, name: str) -> Array:
        """One parameter as fp32."""
        return self.read(name).float().numpy()

    def plain(self, graph: Graph, name: str, shape: tuple[int, ...]) -> str:
        """A parameter as it is."""
        return graph.weight(Weight(name, shape, FP32, lambda: self._one(name)))

    def table(self, graph: Graph, name: str, shape: tuple[int, ...]) -> str:
        """A parameter whose rows may be gathered as they are stored."""
        kind = None if self.dtype is None else _NARROW.get(self.dtype(name))
        stored = None
        if kind is not None:
            # As bits: numpy has no bfloat16.
            stored = Weight(f"{name}.stored", shape, np.dtype(np.uint16), lambda: self._bits(name), kind=kind)
        return graph.weight(Weight(name, shape, FP32, lambda: self._one(name), stored=stored))

    def _bits(self, name: str) -> Iterator[Array]:
        yield self.read(name).contiguous().view(torch.uint16).numpy()

    def derived(self, graph: Graph, name: str, shape: tuple[int, ...], make: Callable[[], Array]) -> str:
        """A tensor computed from parameters when it is written."""
        return graph.weight(Weight(name, shape, FP32, lambda: iter([make()])))

    def stacked(self, graph: Graph, name: str, shape: tuple[int, ...], parts: list[str]) -> str:
        """Several parameters, one after the other: row blocks, as many for each index of the first axis."""
        each = len(parts) // shape[0]

        def entry(index: int) -> Iterator[Array]:
            for part in parts[index * each : (index + 1) * each]:
                yield self.array(part)

        def blocks() -> Iterator[Array]:
            for index in range(shape[0]):
                yield from entry(index)

        return graph.weight(Weight(name, shape, FP32, blocks, entry))

    def _one(self, name: str) -> Iterator[Array]:
        yield self.array(name)


def linear(graph: Graph, parameters: Parameters, x: str, name: str, rows: int, columns: int, bias: bool = True) -> str:
    """y = x W^T + b for x [T, columns]: one Gemm over the weight in its own layout."""
    weight = parameters.plain(graph, f"{name}.weight", (rows, columns))
    biases = [parameters.plain(graph, f"{name}.bias", (rows,))] if bias else []
    return graph.op("Gemm", x, weight, *biases, transB=1)


def numpy_of(tensor: Tensor) -> Array:
    """A tensor as fp32 numpy."""
    return tensor.detach().to(torch.float32).numpy()
