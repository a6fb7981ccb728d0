"""OpenVINO: one inference call a step between two bound buffers."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor

from kaleido_fast.benchmarking.contest import Contestant
from kaleido_fast.benchmarking.peers import Setting
from kaleido_fast.benchmarking.peers.onnx_graph import onnx_bytes


def build(setting: Setting) -> Contestant:
    """A compiled model with products in the setting's precision (unasked: bf16 where the CPU has it), fixed shape."""
    # Importing it reports its use over the network, from a forked process; without this module it does not.
    sys.modules.setdefault("openvino_telemetry", cast(Any, None))
    import openvino

    core = openvino.Core()
    properties = {"INFERENCE_NUM_THREADS": setting.threads, "PERFORMANCE_HINT": "LATENCY"}
    properties |= {"INFERENCE_PRECISION_HINT": setting.precision.replace("fp", "f")}
    model = core.read_model(onnx_bytes(setting.model, setting.n_chains))
    request = core.compile_model(model, "CPU", properties).create_infer_request()
    buffers = [torch.empty(setting.n_chains, setting.model.spec.dim) for _ in range(2)]
    tensors = [openvino.Tensor(buffer.numpy(), shared_memory=True) for buffer in buffers]

    def run(z0: Tensor, n_steps: int) -> Tensor:
        buffers[0].copy_(z0)
        for step in range(n_steps):
            request.set_input_tensor(tensors[step % 2])
            request.set_output_tensor(tensors[(step + 1) % 2])
            request.infer()
        return buffers[n_steps % 2].clone()

    return Contestant(run, precision=setting.precision)
