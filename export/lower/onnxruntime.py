"""Lowering for ONNX Runtime on the CPU: its own attention and rotary operators, experts as a loop over even batches.

Row independence (docs/decisions.md 12) decides the form of the experts. ONNX Runtime's kernels for one row and for odd
row counts round differently from those for even ones, so every expert gets an even number of rows: an odd batch is
filled up with a row whose result nothing reads. `QMoE` is not used for the same reason: its rows are not independent
even then. `DynamicQuantizeMatMul` is not used either: it has one activation scale for all rows.

Maps with one scale per row are multiplied in integers: each row of activations is rounded to 8 bits by a scale of its
own, products are summed in int32, which is exact, and both scales come last, element by element. Such rows cannot
depend on each other. Activations are unsigned (128 is zero) since ONNX Runtime has kernels for AMX and VNNI for
unsigned by signed only: signed by signed was 18 to 40 times slower.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice

import numpy as np
import onnx
from onnx import TensorProto, helper

from chatvla_edge.export.lower.tables import narrow
from chatvla_edge.export.quantize import PRECISIONS, BlockFormat, Precision, Quantized, is_quantized, quantize
from chatvla_edge.export.spec import LanguageSpec, PolicySpec
from chatvla_edge.export.stages.graph import DOMAIN, Array, Graph, Weight

MICROSOFT = "com.microsoft"
_ZERO = helper.make_tensor("zero", TensorProto.INT64, [1], [0])
_MIDDLE = helper.make_tensor("middle", TensorProto.UINT8, [1], [128])


@dataclass(frozen=True)
class Target:
    """What to lower for: weight precision, and the capacity of the cache (rows)."""

    precision: str
    capacity: int

    @property
    def form(self) -> Precision:
        """The form of each linear map."""
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"the cpu target has no precision {self.precision!r}, expected one of {', '.join(PRECISIONS)}"
            )
        return PRECISIONS[self.precision]


def lower(graph: Graph, spec: PolicySpec, target: Target, lowering: "type[Lowering] | None" = None) -> Graph:
    """Rewrite a neutral stage graph for ONNX Runtime on the CPU; `lowering` makes other choices for another device."""
    out = Graph(
        graph.name,
        scope="ort/",
        inputs=list(graph.inputs),
        outputs=list(graph.outputs),
        output_values=list(graph.output_values),
        constants=dict(graph.constants),
    )
    state = (lowering or Lowering)(graph, out, spec.language, target)
    for node in graph.nodes:
        state.node(node)
    narrow(out)
    used = {name for node in out.nodes for name in node.input}
    out.weights = {name: weight for name, weight in out.weights.items() if name in used}
    out.constants = {name: array for name, array in out.constants.items() if name in used}
    return out


class Lowering:
    """Node by node: what becomes of each."""

    def __init__(self, graph: Graph, out: Graph, language: LanguageSpec, target: Target) -> None:
        self.graph, self.out, self.language, self.target = graph, out, language, target
        self.shared: dict[str, str] = {}
        self.rounded: dict[str, _Rows] = {}

    def node(self, node: onnx.NodeProto) -> None:
        """Emit what becomes of one node."""
        handlers = {"MRopeQuery": self._mrope, "MRopeKey": self._mrope, "CachedAttention": self._attention}
        if node.domain == DOMAIN:
            (self._experts if node.op_type == "TopKMoE" else handlers[node.op_type])(node)
        elif node.op_type == "Gemm" and (form := self._form(node)) is not None:
            self._linear(node, form)
        else:
            self._keep(node)

    def _keep(self, node: onnx.NodeProto) -> None:
        for name in node.input:
            if name in self.graph.weights:
                self.out.weight(self.graph.weights[name])
        self.out.nodes.append(node)

    # ------------------------------------------------------------------------------------------ linear maps

    def _form(self, node: onnx.NodeProto) -> BlockFormat | None:
        weight = self.graph.weights.get(node.input[1])
        return None if weight is None else self.target.form.form(weight.name, weight.shape)

    def _linear(self, node: onnx.NodeProto, form: BlockFormat) -> None:
        weight = self.graph.weights[node.input[1]]
        if form.block:
            product = self._matmul(node.input[0], weight, form)
        else:
            rows = self._rounded(node.input[0])
            product = self.out.op("Mul", self._integer(rows.codes, weight, form), self._column(rows.scales))
        bias = node.input[2] if len(node.input) > 2 else None
        if bias is None:
            # The product itself is the output: a node that renames it would be a copy.
            self.out.nodes[-1].output[0] = node.output[0]
            return
        self.out.weight(self.graph.weights[bias])
        self.out.op("Add", product, bias)
        self.out.nodes[-1].output[0] = node.output[0]

    def _matmul(self, x: str, weight: Weight, form: BlockFormat | None) -> str:
        """x W^T with the weight in blocks, None for fp32; weight [N, K]."""
        rows, columns = weight.shape
        if form is None:
            return self.out.op("Gemm", x, self.out.weight(weight), transB=1)
        codes, scales = _packed(weight, form)
        return self.out.op(
            "MatMulNBits",
            x,
            self.out.weight(codes),
            self.out.weight(scales),
            domain=MICROSOFT,
            K=columns,
            N=rows,
            bits=form.bits,
            block_size=form.block,
            # int8 arithmetic with a scale per block of the row: several times faster, and still row by row.
            accuracy_level=4,
        )

    def _rounded(self, x: str) -> "_Rows":
        """x [T, K] in 8 bits, one scale per row; maps of the same x share it."""
        if x not in self.rounded:
            op, const = self.out.op, self.out.constant
            largest = op("ReduceMax", op("Abs", x), const([1], np.int64), keepdims=0)
            # A row of zeros has scale 0: whatever its codes become then, times 0 they are 0 again.
            scales = op("Mul", largest, const(np.float32(1 / 127), np.float32))
            middle = op("ConstantOfShape", op("Shape", scales), value=_MIDDLE)
            self.rounded[x] = _Rows(op("QuantizeLinear", x, scales, middle, axis=0), scales)
        return self.rounded[x]

    def _integer(self, codes: str, weight: Weight, form: BlockFormat) -> str:
        """Sums of integer products times the weight's scales [T, N]; the rows' own scales are still to come."""
        values, scales = _transposed(weight, form)
        return self.out.op(
            "MatMulIntegerToFloat",
            codes,
            self.out.weight(values),
            self.out.constant(1.0, np.float32),
            self.out.weight(scales),
            self.out.constant(128, np.uint8),
            domain=MICROSOFT,
        )

    def _column(self, vector: str) -> str:
        return self._once(f"column of {vector}", lambda: self._unsqueeze(vector, 1))

    # -------------------------------------------------------------------------------------------- attention

    def _mrope(self, node: onnx.NodeProto) -> None:
        """Rotary positions of one axis with tables of this pass: row i of them holds the three axes of row i.

        `MRotaryEmbedding` does the same in one node, but ONNX Runtime 1.23 (the last for Python 3.10) lacks it.
        """
        language = self.language
        heads = language.heads if node.op_type == "MRopeQuery" else language.kv_heads
        x = self._unsqueeze(node.input[0], 0)
        cos, sin = (self._once(kind, partial(self._turns, kind, node.input[1])) for kind in ("cos", "sin"))
        first = self.out.constant([0], np.int64)
        self.out.op("RotaryEmbedding", x, first, cos, sin, domain=MICROSOFT, num_heads=heads)
        # Stays [1, T, heads * d]: only the attention reads it.
        self.out.nodes[-1].output[0] = node.output[0]

    def _turns(self, kind: str, positions: str) -> str:
        """[T, d / 2]: section s of the frequencies at the positions of axis s."""
        op, sections = self.out.op, list(self.language.mrope_section)
        rows = op("Gather", self._table(kind), positions, axis=0)
        parts = self.out.op_many("Split", rows, self.out.constant(sections, np.int64), outputs=3, axis=2)
        picked = [op("Gather", part, self.out.constant(axis, np.int64), axis=0) for axis, part in enumerate(parts)]
        return op("Concat", *picked, axis=1)

    def _table(self, kind: str) -> str:
        """Rotary cosines or sines [capacity, d / 2]: a position never exceeds the row that holds it."""
        language = self.language
        size = language.head_dim
        frequencies = (
            np.float32(1)
            / np.float32(language.rope_theta) ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
        ).astype(np.float32)

        def blocks() -> Iterator[Array]:
            angles = np.outer(np.arange(self.target.capacity, dtype=np.float32), frequencies).astype(np.float32)
            yield (np.cos if kind == "cos" else np.sin)(angles)

        shape = (self.target.capacity, size // 2)
        return self.out.weight(Weight(f"rotary.{kind}", shape, np.dtype(np.float32), blocks))

    def _attention(self, node: onnx.NodeProto) -> None:
        q, k, v, past_k, past_v, length = node.input
        language = self.language
        value = self._unsqueeze(v, 0)
        total = self._once("total", lambda: self._total(v, length))
        last = self._once("last", lambda: self.out.op("Sub", total, self.out.constant([1], np.int32)))
        scalar = self._once("total_scalar", lambda: self.out.op("Squeeze", total, self.out.constant([0], np.int64)))
        names = self.out.op_many(
            "GroupQueryAttention",
            q,
            k,
            value,
            past_k,
            past_v,
            last,
            scalar,
            outputs=3,
            domain=MICROSOFT,
            num_heads=language.heads,
            kv_num_heads=language.kv_heads,
            do_rotary=0,
            scale=float(language.head_dim**-0.5),
        )
        attention = self.out.nodes[-1]
        attention.output[1], attention.output[2] = node.output[1], node.output[2]
        self.out.op("Squeeze", names[0], self.out.constant([0], np.int64))
        self.out.nodes[-1].output[0] = node.output[0]

    def _total(self, rows: str, length: str) -> str:
        """Rows in the cache after this pass, int32 [1]."""
        count = self.out.op("Shape", rows, start=0, end=1)
        return self.out.op("Cast", self.out.op("Add", count, length), to=TensorProto.INT32)

    def _unsqueeze(self, value: str, axis: int) -> str:
        return self.out.op("Unsqueeze", value, self.out.constant([axis], np.int64))

    def _once(self, key: str, make: Callable[[], str]) -> str:
        """A value that all layers share."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    # ---------------------------------------------------------------------------------------------- experts

    def _experts(self, node: onnx.NodeProto) -> None:
        x, logits, gate_up, down = node.input
        experts, width, op, const = self.language.experts, self.language.routed_width, self.out.op, self.out.constant
        # One expert's three maps are quantized or none is: gate and up are one product here, two in the checkpoint.
        form = self.target.form.experts if is_quantized("", (width, self.language.hidden)) else None
        by_row = form is not None and not form.block
        kept, ids = self.out.op_many("TopK", logits, const([experts.top_k], np.int64), outputs=2, axis=-1)
        if experts.renormalize:
            weights = op("Softmax", kept, axis=-1)
        else:
            weights = op("GatherElements", op("Softmax", logits, axis=-1), ids, axis=-1)
        column = const([1], np.int64)
        # Visit v = row * k + slot. The visits to one expert lie together, filled up to an even number.
        flat = op("Reshape", ids, const([-1, 1], np.int64))
        visits = op("Cast", op("Equal", flat, const(np.arange(experts.routed)[None], np.int64)), to=TensorProto.INT64)
        counts = op("ReduceSum", visits, const([0], np.int64), keepdims=0)
        sizes = counts if by_row else op("Add", counts, op("Mod", counts, const(2, np.int64)))
        starts = op("CumSum", sizes, const(0, np.int64), exclusive=1)
        ranks = op("CumSum", visits, const(0, np.int64), exclusive=1)
        places = op("ReduceSum", op("Mul", visits, op("Add", ranks, starts)), column, keepdims=0)
        # What fills up is row 0 over again; nothing reads what the expert makes of it.
        nothing = op("ConstantOfShape", op("ReduceSum", sizes, const([0], np.int64), keepdims=1), value=_ZERO)
        sources = op("ScatterElements", nothing, places, self._once("visiting", lambda: self._visiting(x)), axis=0)
        slots = op("Reshape", places, const([-1, experts.top_k], np.int64))

        def parts(rows: str) -> list[str]:
            return self.out.op_many("Split", op("Gather", rows, sources, axis=0), sizes, outputs=experts.routed, axis=0)

        if form is not None and by_row:
            rows = self._rounded(x)
            codes, scales = parts(rows.codes), parts(rows.scales)
            made, own = [], []
            for index in range(experts.routed):
                maps = [_expert(self.graph.weights[gate_up], index, half) for half in range(2)]
                gate, up = (self._integer(codes[index], half, form) for half in maps)
                gate = op("Mul", gate, self._unsqueeze(scales[index], 1))
                # silu is not linear, so its rows are scaled before it; those of `up` are scaled last.
                inner = self._rounded(op("Mul", op("QuickGelu", gate, domain=MICROSOFT, alpha=1.0), up))
                made.append(self._integer(inner.codes, _expert(self.graph.weights[down], index), form))
                own.append(inner.scales)
            both = op("Mul", op("Gather", op("Concat", *own, axis=0), slots, axis=0), self._column(rows.scales))
            weights = op("Mul", weights, both)
        else:
            made = []
            for index, part in enumerate(parts(x)):
                both = self._matmul(part, _expert(self.graph.weights[gate_up], index), form)
                gate, up = self.out.op_many("Split", both, const([width, width], np.int64), outputs=2, axis=1)
                inner_rows = op("Mul", op("Mul", gate, op("Sigmoid", gate)), up)
                made.append(self._matmul(inner_rows, _expert(self.graph.weights[down], index), form))
        found = op("Gather", op("Concat", *made, axis=0), slots, axis=0)  # [T, k, D]
        shares = op("Unsqueeze", weights, const([2], np.int64))
        op("ReduceSum", op("Mul", found, shares), column, keepdims=0)
        self.out.nodes[-1].output[0] = node.output[0]

    def _visiting(self, x: str) -> str:
        """The row that each visit comes from, [T * k]: 0, 0, 1, 1, 2, 2, ... for k = 2."""
        op, const = self.out.op, self.out.constant
        count = op("Squeeze", op("Shape", x, start=0, end=1), const([0], np.int64))
        rows = op("Unsqueeze", op("Range", const(0, np.int64), count, const(1, np.int64)), const([1], np.int64))
        return op(
            "Reshape", op("Expand", rows, const([1, self.language.experts.top_k], np.int64)), const([-1], np.int64)
        )


@dataclass(frozen=True)
class _Rows:
    """Activations in 8 bits: codes [T, K] uint8, 128 is zero, and scales [T]."""

    codes: str
    scales: str


def _expert(stacked: Weight, index: int, half: int | None = None) -> Weight:
    """One expert out of a stacked weight [E, N, K]: its own initializer, which reads that expert alone.

    half 0 or 1: the first or second half of its N rows, which must be a piece of its recipe.
    """
    assert stacked.entry is not None, stacked.name
    entry = partial(stacked.entry, index)
    _, rows, columns = stacked.shape
    if half is None:
        return Weight(f"{stacked.name}.{index}", (rows, columns), stacked.dtype, entry)

    def piece() -> Iterator[Array]:
        return islice(entry(), half, half + 1)

    return Weight(f"{stacked.name}.{index}.{half}", (rows // 2, columns), stacked.dtype, piece)


def _transposed(weight: Weight, form: BlockFormat) -> tuple[Weight, Weight]:
    """Values [K, N] int8 and scales [N] of a weight with one scale per row."""
    rows, columns = weight.shape
    codes, scales = _packed(weight, form)

    def values() -> Iterator[Array]:
        (found,) = codes.blocks()
        centred = np.asarray(found).reshape(rows, columns).view(np.int8) ^ np.int8(-128)
        yield np.ascontiguousarray(centred.T)

    return (
        Weight(f"{weight.name}.values", (columns, rows), np.dtype(np.int8), values),
        Weight(scales.name, (rows,), scales.dtype, scales.blocks),
    )


def _packed(weight: Weight, form: BlockFormat) -> tuple[Weight, Weight]:
    """Codes and scales of a weight as two initializers; it is read and quantized once for both."""
    rows, columns = weight.shape
    count = form.blocks(columns)

    @lru_cache(maxsize=1)
    def quantized() -> Quantized:
        try:
            return quantize(np.asarray(weight.array(), np.float32), form)
        except ValueError as error:
            raise ValueError(f"{weight.name}: {error}") from error

    def codes() -> Iterator[Array]:
        yield quantized().codes

    def scales() -> Iterator[Array]:
        yield quantized().scales
        quantized.cache_clear()

    size = form.width(columns) * form.bits // 8
    return (
        Weight(f"{weight.name}.codes", (rows, count, size), np.dtype(np.uint8), codes),
        Weight(f"{weight.name}.scales", (rows, count), np.dtype(np.float32), scales),
    )
