"""A network's weights and a thread's buffers in the order in which the loops read them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kaleido_fast.engines.loops import arrays
from kaleido_fast.engines.loops.arrays import Layers, Tile
from kaleido_fast.engines.loops.processor import LANES, MAX_OUTPUTS
from kaleido_fast.model import KaleidoMLP, ModelSpec


def pack_layers(model: KaleidoMLP, precision: str) -> Layers:
    """Copy the weights into blocks of outputs, [input][output] each; block sizes of a layer differ by one at most."""
    pack = _bf16_pairs if precision == "bf16" else _fp32
    weights: list[Tensor] = []
    biases: list[np.ndarray] = []
    table, first_weight, first_bias = [], 0, 0
    for layer in model.linears:
        n_out, n_in = layer.weight.shape
        n_blocks = -(-n_out // MAX_OUTPUTS)
        table.append((n_in, n_out, n_blocks, first_weight, first_bias))
        weight = pack(layer.weight)
        weights.append(torch.cat([block.T.reshape(-1) for block in torch.tensor_split(weight, n_blocks)]))
        first_weight, first_bias = first_weight + weight.numel(), first_bias + n_out
        biases.append(np.zeros(n_out, np.float32) if layer.bias is None else _fp32(layer.bias).numpy())
    spec = model.spec
    return Layers(
        weights=torch.cat(weights).numpy(),
        biases=np.concatenate(biases),
        table=np.array(table, np.int64),
        activation=getattr(arrays, spec.activation.upper()),
        slope=np.float32(spec.negative_slope),
        bound=getattr(arrays, spec.bound.upper()),
        low=np.float32(spec.low),
        high=np.float32(spec.high),
        mid=np.float32((spec.low + spec.high) / 2),
        half=np.float32((spec.high - spec.low) / 2),
        span=np.float32(spec.high - spec.low),
    )


def _fp32(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float32)


def _bf16_pairs(weight: Tensor) -> Tensor:
    """(n_out, n_in) -> (n_out, ceil(n_in / 2)) int32, the even input in the low half."""
    rounded = weight.detach().to("cpu", torch.bfloat16)
    if rounded.shape[1] % 2:
        rounded = F.pad(rounded, (0, 1))
    bits = rounded.view(torch.int16).to(torch.int32)
    return (bits[:, ::2] & 0xFFFF) | (bits[:, 1::2] << 16)


def make_tile(spec: ModelSpec, chains: int, precision: str) -> Tile:
    """One thread's buffers for tiles of ``chains`` chains."""
    state, widest, lanes = chains * spec.dim, chains * max(spec.widths), LANES
    pairs = chains * ((max(spec.widths) + 1) // 2) if precision == "bf16" else 0
    return Tile(
        chain_ids=np.zeros(chains, np.int64),
        state=aligned(state),
        moved=aligned(state),
        hidden=aligned(widest),
        other=aligned(widest),
        pairs=aligned(pairs).view(np.int32),
        words=np.zeros(4 * lanes, np.uint32),
        noise=aligned(4 * lanes),
        residual=aligned(chains),
    )


def aligned(count: int) -> np.ndarray:
    """fp32 zeros on a cache line's boundary: a vector never lies across two lines."""
    raw = np.zeros(4 * count + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + 4 * count].view(np.float32)
