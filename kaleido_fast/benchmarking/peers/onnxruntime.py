"""ONNX Runtime: one session call a step between two bound buffers."""

from __future__ import annotations

import onnxruntime
import torch
from torch import Tensor

from kaleido_fast.benchmarking.contest import Contestant
from kaleido_fast.benchmarking.peers import Setting
from kaleido_fast.benchmarking.peers.onnx_graph import onnx_bytes
from kaleido_fast.errors import InputError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def build(setting: Setting) -> Contestant:
    """A session with all graph optimisations, on as many threads as every contestant has."""
    kind, shape = setting.device.type, (setting.n_chains, setting.model.spec.dim)
    if PROVIDERS[kind] not in onnxruntime.get_available_providers():
        raise InputError(f"this build of onnxruntime has no {PROVIDERS[kind]}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setting.threads
    graph = onnx_bytes(setting.model, setting.n_chains)
    session = onnxruntime.InferenceSession(graph, options, providers=[PROVIDERS[kind]])
    buffers = [torch.empty(shape, device=setting.device) for _ in range(2)]
    bindings = [session.io_binding() for _ in range(2)]
    for binding, source, target in zip(bindings, buffers, buffers[::-1], strict=True):
        binding.bind_input("x", kind, 0, "float32", shape, source.data_ptr())
        binding.bind_output("y", kind, 0, "float32", shape, target.data_ptr())

    def run(z0: Tensor, n_steps: int) -> Tensor:
        buffers[0].copy_(z0)
        for step in range(n_steps):
            session.run_with_iobinding(bindings[step % 2])
        return buffers[n_steps % 2].clone()

    return Contestant(run)
