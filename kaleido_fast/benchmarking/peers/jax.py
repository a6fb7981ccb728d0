"""JAX: one jit-compiled loop over the steps."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import torch

from kaleido_fast.benchmarking.contest import Contestant
from kaleido_fast.benchmarking.peers import Setting
from kaleido_fast.errors import InputError

RULES: dict[str, Any] = {"relu": jax.nn.relu, "gelu": partial(jax.nn.gelu, approximate=False), "gelu_tanh": jax.nn.gelu}
RULES |= {"silu": jax.nn.silu, "tanh": jax.numpy.tanh, "sigmoid": jax.nn.sigmoid}


def build(setting: Setting) -> Contestant:
    """jit(fori_loop) in fp32 on JAX's own device, which must be of the same kind."""
    if jax.default_backend() != ("gpu" if setting.device.type == "cuda" else "cpu"):
        raise InputError(f"JAX runs on {jax.default_backend()} here")
    spec = setting.model.spec
    rules = {**RULES, "leaky_relu": partial(jax.nn.leaky_relu, negative_slope=spec.negative_slope)}
    weights = [[jax.numpy.asarray(p.detach().cpu().numpy()) for p in x.parameters()] for x in setting.model.linears]

    @jax.jit  # weights are arguments: as constants they would be compiled in
    def steps(layers: Any, x: Any, n: int) -> Any:
        def step(_: int, x: Any) -> Any:
            for i, (weight, *bias) in enumerate(layers):
                x = sum(bias, jax.numpy.matmul(x, weight.T, precision="highest"))
                x = rules[spec.activation if i < len(layers) - 1 else spec.bound](x)
            return x

        return jax.lax.fori_loop(0, n, step, x)

    take, give = jax.dlpack.from_dlpack, torch.from_dlpack
    return Contestant(lambda z0, n_steps: give(steps(weights, take(z0), n_steps).block_until_ready()))
