"""Lowering for ONNX Runtime with CUDA (onnxruntime-gpu): that of the CPU, but for what its CUDA kernels take.

Read off the sources of ONNX Runtime (microsoft/onnxruntime, docs/OperatorKernels.md and contrib_ops/cuda); nothing of
it was run on a GPU. What follows from them:

- `GroupQueryAttention` has kernels for float16 and bfloat16 alone (bert/group_query_attention.cc): queries, keys,
  values and the cache are float16 here. They come from normalised rows; the residual stream, whose largest values in
  trained models float16 may not hold, stays fp32. Past and present are one buffer where one address is bound to both.
- `MatMulNBits` has a float kernel, takes 4 and 8 bits in blocks of 128, returns at once for an expert without rows, and
  knows no `accuracy_level`: weights are dequantized and multiplied in fp32 (quantization/matmul_nbits.cc).
- `RotaryEmbedding` has a float kernel. `QMoE` takes float16 and bfloat16 alone, and rounds the router's weights with
  them, so the experts stay a loop.

Row independence, which lets a draft be verified without changing an answer, is a property of the CPU's kernels. Nothing
promises it here.
"""

import onnx
from onnx import TensorProto

from chatvla_edge.export.lower import onnxruntime as cpu
from chatvla_edge.export.spec import PolicySpec
from chatvla_edge.export.stages.graph import Graph, Port

PRECISIONS = ("int8", "int4")
# What the attention kernels take: a cooperative load is 16 bytes, and no kernel is built for wider heads.
HEAD_STEP, WIDEST_HEAD = 8, 256


def require(spec: PolicySpec, precision: str) -> None:
    """Raise ValueError for what no CUDA kernel computes, naming what to choose."""
    if precision not in PRECISIONS:
        why = (
            "attention on CUDA has no fp32 kernel" if precision == "fp32" else "ONNX Runtime has no kernel for it there"
        )
        raise ValueError(
            f"the cuda target cannot run {precision!r} ({why}): choose {' or '.join(PRECISIONS)}, or the target cpu"
        )
    size = spec.language.head_dim
    if size % HEAD_STEP or size > WIDEST_HEAD:
        raise ValueError(
            f"the cuda target cannot run attention heads of {size}: expected a multiple of {HEAD_STEP} up to "
            f"{WIDEST_HEAD}. Choose the target cpu"
        )


def lower(graph: Graph, spec: PolicySpec, target: cpu.Target) -> Graph:
    """Rewrite a neutral stage graph for ONNX Runtime with CUDA."""
    require(spec, target.precision)
    out = cpu.lower(graph, spec, target, _Lowering)
    caches = {
        name for node in out.nodes if node.op_type == "GroupQueryAttention" for name in (*node.input[3:5], *node.output)
    }
    out.inputs = [_half(port) if port.name in caches else port for port in out.inputs]
    out.outputs = [
        _half(port) if value in caches else port for port, value in zip(out.outputs, out.output_values, strict=True)
    ]
    return out


def _half(port: Port) -> Port:
    return Port(port.name, TensorProto.FLOAT16, port.shape)


class _Lowering(cpu.Lowering):
    def _attention(self, node: onnx.NodeProto) -> None:
        """As on the CPU, in float16."""
        inner = onnx.NodeProto()
        inner.CopyFrom(node)
        inner.input[:3] = [self.out.op("Cast", value, to=TensorProto.FLOAT16) for value in node.input[:3]]
        inner.output[0] = f"{node.output[0]}/half"
        super()._attention(inner)
        self.out.op("Cast", inner.output[0], to=TensorProto.FLOAT)
        self.out.nodes[-1].output[0] = node.output[0]
