"""One step as an ONNX graph, for the peers that read this format."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper

from kaleido_fast.model import KaleidoMLP

OPERATORS = {"relu": "Relu", "leaky_relu": "LeakyRelu", "gelu": "Gelu", "gelu_tanh": "Gelu", "tanh": "Tanh"}
OPERATORS |= {"sigmoid": "Sigmoid"}


def onnx_bytes(model: KaleidoMLP, n_chains: int) -> bytes:
    """The step ``x (n_chains, D) -> y (n_chains, D)`` in fp32: a Gemm and an activation a layer."""
    spec, nodes, weights, x = model.spec, [], [], "x"
    options: dict[str, dict[str, Any]]
    options = {"leaky_relu": {"alpha": spec.negative_slope}, "gelu_tanh": {"approximate": "tanh"}}
    names = [spec.activation] * (spec.n_layers - 1) + [spec.bound]
    for i, (layer, name) in enumerate(zip(model.linears, names, strict=True)):
        inputs = [f"w{i}", f"b{i}"][: 2 if layer.bias is not None else 1]
        for key, tensor in zip(inputs, layer.parameters(), strict=True):
            weights.append(numpy_helper.from_array(tensor.detach().cpu().numpy(), key))
        nodes.append(helper.make_node("Gemm", [x, *inputs], [f"h{i}"], transB=1))
        x = "y" if i == spec.n_layers - 1 else f"a{i}"
        if name == "silu":
            nodes.append(helper.make_node("Sigmoid", [f"h{i}"], [f"s{i}"]))
            nodes.append(helper.make_node("Mul", [f"h{i}", f"s{i}"], [x]))
            continue
        nodes.append(helper.make_node(OPERATORS[name], [f"h{i}"], [x], **options.get(name, {})))
    ends = [helper.make_tensor_value_info(key, TensorProto.FLOAT, [n_chains, spec.dim]) for key in ("x", "y")]
    graph = helper.make_graph(nodes, "step", ends[:1], ends[1:], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(made)
    return made.SerializeToString()
