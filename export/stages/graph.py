"""A graph under construction, and the weights it will hold, which stay where they are until the file is written.

The graph never owns weight data: an initializer is a name, a shape and a recipe that yields its rows when the file is
written. A stage of a 22 GB policy is laid out, lowered and checked in megabytes.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 20
DOMAIN = "chatvla"
DOMAIN_VERSION = 1
# Below this an initializer stands in the file itself: shape inference looks into small constants, and only there.
INLINE_BYTES = 1024
ALIGNMENT = 4096  # so that an external initializer can be memory-mapped on its own

Array = NDArray[np.generic]
Blocks = Callable[[], Iterable[Array]]


class Output(Protocol):
    """A file that is written once, from its start to its end."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Append."""


Create = Callable[[str], AbstractContextManager[Output]]


@dataclass(frozen=True)
class Weight:
    """An initializer to be. `blocks` yields consecutive pieces of the row-major data, each small enough to hold.

    `entry(i)` yields those of index i of the first axis without reading the others, where the recipe can. `stored` is
    the same values in the narrower type they were trained in. `kind` is the ONNX type of bits that numpy cannot name.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    blocks: Blocks
    entry: Callable[[int], Iterable[Array]] | None = None
    stored: "Weight | None" = None
    kind: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def array(self) -> Array:
        """All data at once; a recipe of one piece is not copied."""
        pieces = [np.ascontiguousarray(block, dtype=self.dtype).reshape(-1) for block in self.blocks()]
        flat = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        self.check(flat.nbytes)
        return flat.reshape(self.shape)

    def check(self, found: int) -> None:
        """Raise ValueError unless the recipe gave as many bytes as the shape takes."""
        if found != self.nbytes:
            raise ValueError(
                f"{self.name}: its recipe gave {found} bytes, its shape {list(self.shape)} takes {self.nbytes}"
            )


@dataclass(frozen=True)
class Port:
    """An input or output of a stage; a dimension is a number or a symbol."""

    name: str
    dtype: int
    shape: tuple[int | str, ...]


@dataclass
class Graph:
    """One stage. Nodes are appended in topological order; values are strings."""

    name: str
    scope: str = ""  # in front of the names of new nodes: a lowering keeps old nodes beside its own
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)
    constants: dict[str, Array] = field(default_factory=dict)
    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    output_values: list[str] = field(default_factory=list)
    functions: dict[str, onnx.FunctionProto] = field(default_factory=dict)
    domains: dict[str, int] = field(default_factory=lambda: {"": OPSET})

    # ------------------------------------------------------------------------------------------- construction

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        """Declare an input."""
        self.inputs.append(Port(name, dtype, tuple(shape)))
        return name

    def output(self, value: str, name: str, dtype: int, shape: Sequence[int | str]) -> None:
        """Declare `value` to be the output `name`; the value takes that name when the graph is written."""
        self.outputs.append(Port(name, dtype, tuple(shape)))
        self.output_values.append(value)

    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: object) -> str:
        """Append a node and return its first output; `op_many` returns all."""
        return self.op_many(kind, *inputs, outputs=outputs, domain=domain, **attributes)[0]

    def op_many(self, kind: str, *inputs: str, outputs: int, domain: str = "", **attributes: object) -> list[str]:
        """Append a node and return its outputs."""
        base = f"{self.scope}{kind}_{len(self.nodes)}"
        names = [base if outputs == 1 else f"{base}.{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=base, domain=domain, **attributes))
        if domain:
            self.domains.setdefault(domain, 1)
        return names

    def constant(self, value: object, dtype: type[np.generic] | None = None) -> str:
        """A small constant, kept in the file; equal constants are one."""
        array = np.asarray(value, dtype=dtype)
        digest = hashlib.blake2b(array.tobytes(), digest_size=6).hexdigest()
        name = f"const/{array.dtype}{list(array.shape)}/{digest}"
        self.constants[name] = array
        return name

    def weight(self, weight: Weight) -> str:
        """An initializer; the same name twice is the same tensor."""
        self.weights[weight.name] = weight
        return weight.name

    def function(self, proto: onnx.FunctionProto) -> None:
        """Carry the body of a node of our own domain."""
        self.functions[proto.name] = proto
        self.domains[DOMAIN] = DOMAIN_VERSION

    # ------------------------------------------------------------------------------------------------ writing

    @property
    def weight_bytes(self) -> int:
        """Bytes of all initializers."""
        return sum(weight.nbytes for weight in self.weights.values())

    def save(self, path: Path, progress: Callable[[int], None] | None = None) -> None:
        """Write `path` and, beside it, `path` + `.data` with the weights, streamed in the order of declaration."""
        self.write(path.name, lambda name: path.with_name(name).open("wb"), progress)

    def write(self, name: str, create: Create, progress: Callable[[int], None] | None = None) -> None:
        """Write the files `name` and, where there are weights to hold outside of it, `name` + `.data`.

        create: opens a new file by name for writing; the second name stands in the first file.
        """
        initializers = [numpy_helper.from_array(array, key) for key, array in self.constants.items()]
        location = name.rpartition("/")[2] + ".data"
        with ExitStack() as stack:
            outside = any(_is_external(weight) for weight in self.weights.values())
            file = stack.enter_context(create(f"{name}.data")) if outside else None
            at = 0
            for weight in self.weights.values():  # in order: parts of one weight are made together, one after the other
                if file is not None and _is_external(weight):
                    proto, at = _write(weight, file, at, location, progress)
                else:
                    proto = numpy_helper.from_array(weight.array(), weight.name)
                    proto.data_type = _kind(weight)
                    if progress is not None:
                        progress(weight.nbytes)
                initializers.append(proto)
        with create(name) as file:
            file.write(self._model(initializers).SerializeToString(deterministic=True))

    def digest(self) -> str:
        """SHA-256 of everything but the data of the weights: nodes, constants, ports; names and shapes of weights."""
        constants = [numpy_helper.from_array(array, key) for key, array in self.constants.items()]
        state = hashlib.sha256(self._model(constants).SerializeToString(deterministic=True))
        for weight in self.weights.values():
            state.update(f"{weight.name} {weight.shape} {_kind(weight)}\n".encode())
        return state.hexdigest()

    def _model(self, initializers: list[TensorProto]) -> onnx.ModelProto:
        def infos(ports: Iterable[Port]) -> Iterator[onnx.ValueInfoProto]:
            for port in ports:
                yield helper.make_tensor_value_info(port.name, port.dtype, list(port.shape))

        # Renamed rather than copied by an Identity: an engine may write a cache in place only where it is the output.
        names = dict(zip(self.output_values, (port.name for port in self.outputs), strict=True))
        graph = helper.make_graph(
            [_renamed(node, names) for node in self.nodes],
            self.name,
            list(infos(self.inputs)),
            list(infos(self.outputs)),
            initializers,
        )
        return helper.make_model(
            graph,
            functions=list(self.functions.values()),
            opset_imports=[helper.make_opsetid(domain, version) for domain, version in self.domains.items()],
            ir_version=10,
            producer_name="chatvla-edge",
        )


def _kind(weight: Weight) -> int:
    return int(helper.np_dtype_to_tensor_dtype(weight.dtype) if weight.kind is None else weight.kind)


def _is_external(weight: Weight) -> bool:
    return weight.nbytes > INLINE_BYTES


def _write(
    weight: Weight, file: Output, at: int, location: str, progress: Callable[[int], None] | None
) -> tuple[TensorProto, int]:
    """Append a weight to the file of `at` bytes, aligned; returns how the graph refers to it, and the file's size."""
    start = at + -at % ALIGNMENT
    file.write(bytes(start - at))
    at = start
    for block in weight.blocks():
        data = np.ascontiguousarray(block, dtype=weight.dtype).reshape(-1)
        file.write(data.data)  # the array itself: `tobytes` would be a second copy of it
        at += data.nbytes
        if progress is not None:
            progress(data.nbytes)
    weight.check(at - start)
    proto = TensorProto(name=weight.name, dims=weight.shape, data_location=TensorProto.EXTERNAL)
    proto.data_type = _kind(weight)
    for key, value in (("location", location), ("offset", start), ("length", weight.nbytes)):
        proto.external_data.add(key=key, value=str(value))
    return proto, at


def _renamed(node: onnx.NodeProto, names: dict[str, str]) -> onnx.NodeProto:
    if not names.keys() & {*node.input, *node.output}:
        return node
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for values in (copy.input, copy.output):
        values[:] = [names.get(value, value) for value in values]
    return copy
