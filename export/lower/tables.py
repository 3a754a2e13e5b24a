"""Tables that rows are gathered from, kept as they were trained.

An embedding is looked up, not multiplied: its rows may be stored in 16 bits and widened when they are used, which is
exact. Where a quantized output head is made from the same matrix, the table is all that is left of it in fp32, 0.93 GB
of a 2B policy.
"""

import onnx
from onnx import TensorProto

from chatvla_edge.export.stages.graph import Graph


def narrow(graph: Graph) -> None:
    """Gather from the stored form of each table that nothing else of the graph uses, and widen the rows."""
    users: dict[str, int] = {}
    for node in graph.nodes:
        for name in node.input:
            users[name] = users.get(name, 0) + 1
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        nodes.append(node)
        table = graph.weights.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or table.stored is None or users[table.name] > 1:
            continue
        del graph.weights[table.name]
        graph.weight(table.stored)
        narrowed = onnx.NodeProto()
        narrowed.CopyFrom(node)
        narrowed.input[0] = table.stored.name
        narrowed.output[0] = f"{node.output[0]}/stored"
        nodes[-1] = narrowed
        nodes.append(
            onnx.helper.make_node(
                "Cast", [narrowed.output[0]], [node.output[0]], f"{node.name}/cast", to=TensorProto.FLOAT
            )
        )
    graph.nodes[:] = nodes
