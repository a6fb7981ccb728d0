"""A network's weights and a thread's buffers in the order in which the loops read them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kaleido_fast.engines.loops import arrays
from kaleido_fast.engines.loops.amx import BLOCK, TILE
from kaleido_fast.engines.loops.arrays import Layers, Tile
from kaleido_fast.engines.loops.few import SUMS_VALUES
from kaleido_fast.engines.loops.processor import LANES, MAX_OUTPUTS, VECTOR
from kaleido_fast.engines.loops.team import BOARD_VALUES
from kaleido_fast.model import KaleidoMLP, ModelSpec


def pack_fp32(model: KaleidoMLP) -> Layers:
    """Copy the weights into blocks of outputs, [input][output] each; block sizes of a layer differ by one at most."""
    return _pack(model, MAX_OUTPUTS, lambda weight: _blocks(_fp32(weight)), _biases)


def pack_rounded(model: KaleidoMLP) -> Layers:
    """`pack_fp32` of weights rounded to bf16."""
    rounded = _pack(model, MAX_OUTPUTS, lambda weight: _blocks(_fp32(_bf16(weight))), _biases)
    return rounded._replace(rounds=True)


def pack_pairs(model: KaleidoMLP) -> Layers:
    """`pack_fp32` with pairs of bf16 in place of inputs: [pair of inputs][output], the even input in the low half."""
    return _pack(model, MAX_OUTPUTS, lambda weight: _blocks(_pairs(_bf16(weight))), _biases)


def pack_tiles(model: KaleidoMLP) -> Layers:
    """Copy the weights into blocks of 32 outputs, the last of a layer perhaps of 16; zeros fill it up.

    A block is [step of 32 inputs][16 or 32 outputs][pair of inputs].
    """
    return _pack(model, BLOCK, _tiles, _tile_biases)


def _pack(model: KaleidoMLP, block: int, weights_of: Any, biases_of: Any) -> Layers:
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    table, first_weight, first_bias = [], 0, 0
    for layer in model.linears:
        n_out, n_in = layer.weight.shape
        table.append((n_in, n_out, -(-n_out // block), first_weight, first_bias))
        bias = torch.zeros(n_out) if layer.bias is None else _fp32(layer.bias)
        weights.append(weights_of(layer.weight))
        biases.append(biases_of(bias))
        first_weight, first_bias = first_weight + weights[-1].numel(), first_bias + biases[-1].numel()
    spec = model.spec
    return Layers(
        weights=_on_lines(torch.cat(weights)),
        biases=_on_lines(torch.cat(biases)),
        table=np.array(table, np.int64),
        rounds=False,
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


def _bf16(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.bfloat16)


def _biases(bias: Tensor) -> Tensor:
    return bias


def _blocks(weight: Tensor) -> Tensor:
    """(n_out, inputs) -> blocks of outputs, [input][output] each."""
    n_blocks = -(-len(weight) // MAX_OUTPUTS)
    return torch.cat([block.T.reshape(-1) for block in torch.tensor_split(weight, n_blocks)])


def _pairs(rounded: Tensor) -> Tensor:
    """(n_out, n_in) bf16 -> (n_out, ceil(n_in / 2)) int32, the even input in the low half."""
    return F.pad(rounded, (0, rounded.shape[1] % 2)).contiguous().view(torch.int32)


def _tiles(weight: Tensor) -> Tensor:
    n_out, n_in = weight.shape
    filled = F.pad(_bf16(weight), (0, -n_in % BLOCK, 0, -n_out % TILE))
    steps = filled.unflatten(1, (-1, BLOCK)).transpose(0, 1)  # [step][output][input]
    blocks = steps.split(BLOCK, dim=1)
    return torch.cat([block.reshape(-1) for block in blocks]).view(torch.int32)


def _tile_biases(bias: Tensor) -> Tensor:
    return F.pad(bias, (0, -len(bias) % BLOCK)).repeat_interleave(TILE)


def _on_lines(values: Tensor) -> np.ndarray:
    """A copy that begins on a cache line's boundary, and behind which a vector may be read."""
    copy = aligned(values.numel() + VECTOR).view(np.int32 if values.dtype == torch.int32 else np.float32)
    copy[: values.numel()] = values.numpy()
    return copy


def make_fp32_tile(spec: ModelSpec, chains: int) -> Tile:
    """One thread's buffers for tiles of ``chains`` chains, of multiply-adds in fp32."""
    state, widest = chains * spec.dim, chains * max(spec.widths)
    return Tile(
        chain_ids=np.zeros(chains, np.int64),
        state=aligned(state),
        moved=aligned(state),
        hidden=aligned(widest),
        other=aligned(widest),
        pairs=aligned(0).view(np.int32),
        rounded=aligned(0),
        sums=aligned(SUMS_VALUES),
        words=np.zeros(4 * LANES, np.uint32),
        noise=aligned(4 * LANES),
        residual=aligned(chains),
        place=None,
    )


def make_rounded_tile(spec: ModelSpec, chains: int) -> Tile:
    """`make_fp32_tile` where the state is rounded to bf16 too."""
    return make_fp32_tile(spec, chains)._replace(rounded=aligned(chains * spec.dim))


def make_pairs_tile(spec: ModelSpec, chains: int) -> Tile:
    """`make_fp32_tile` with the inputs of a layer as pairs of bf16."""
    pairs = aligned(chains * ((max(spec.widths) + 1) // 2)).view(np.int32)
    return make_fp32_tile(spec, chains)._replace(pairs=pairs)


def make_tiles_tile(spec: ModelSpec, chains: int) -> Tile:
    """`make_fp32_tile` for products of tiles: between layers there are only pairs."""
    pairs = chains * (BLOCK // 2) * -(-max(spec.widths) // BLOCK)
    hidden, other = (aligned(pairs).view(np.int32) for _ in range(2))
    return make_fp32_tile(spec, chains)._replace(hidden=hidden, other=other, sums=aligned(chains * BLOCK))


def member_tile(tile: Tile, place: np.ndarray) -> Tile:
    """The buffers of one more thread of a team that shares ``tile``, with a ``place`` of its own."""
    return tile._replace(
        pairs=aligned(len(tile.pairs)).view(np.int32),
        sums=aligned(len(tile.sums)),
        words=np.zeros(len(tile.words), np.uint32),
        noise=aligned(len(tile.noise)),
        place=place,
    )


def make_board() -> np.ndarray:
    """By which a team meets in one call of the loops."""
    return aligned(2 * BOARD_VALUES).view(np.int64)


def aligned(count: int) -> np.ndarray:
    """fp32 zeros on a cache line's boundary: a vector never lies across two lines."""
    raw = np.zeros(4 * count + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + 4 * count].view(np.float32)
