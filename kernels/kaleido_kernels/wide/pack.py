"""Weights and scratch of the wide kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kaleido_kernels.packing import OPERAND_TYPES, Layers, check_layers, device_precision, host_zeros, split_operand
from kaleido_kernels.precision import operand_parts
from kaleido_kernels.shapes import NetShape
from kaleido_kernels.wide.plan import WideTile, output_width, program_blocks, state_width, wide_layers

MAX_ROWS = 2**31 - 1  # rows of a copy descriptor are 32-bit


@dataclass(frozen=True)
class WideWeights:
    """A network packed for one tile: see the kernel's arguments of the same names."""

    shape: NetShape
    tile: WideTile
    precision: str
    weight: Tensor
    last: Tensor
    bias: Tensor
    last_bias: Tensor
    table: Tensor


@dataclass(frozen=True)
class WideScratch:
    """Memory that programs work in, reusable between launches: it needs no particular content."""

    act: Tensor
    raw: Tensor
    state: Tensor

    @property
    def n_programs(self) -> int:
        return len(self.raw)


def pack_wide(
    layers: Layers, shape: NetShape, tile: WideTile, precision: str, device: torch.device | str = "cpu"
) -> WideWeights:
    """Pack for `launch_wide`. ``precision`` is a device precision, or one asked for.

    Raises:
        ValueError: weights that do not fit the shape or the precision, or more than a copy descriptor can address.
    """
    check_layers(layers, shape)
    form = device_precision(layers, precision)
    table = wide_layers(shape, tile)
    weights, biases = [], []
    for number, (weight, bias) in enumerate(layers):
        cols = tile.last_cols if number == shape.n_layers - 1 else tile.cols
        n_out, n_in = weight.shape
        padded = host_zeros(table[number].col_tiles * cols, table[number].inner_blocks * tile.inner)
        padded[:n_out, :n_in] = weight.detach().cpu()
        weights.append(_weight_blocks(padded, cols, tile.inner, form))
        padded_bias = host_zeros(len(padded))
        if bias is not None:
            padded_bias[:n_out] = bias.detach().cpu()
        biases.append(padded_bias)
    # A network of one layer has no hidden weights; a copy descriptor needs at least one block.
    hidden = torch.cat(weights[:-1] or [torch.zeros_like(weights[-1][: tile.inner]).reshape(-1, tile.inner)])
    hidden_bias = torch.cat(biases[:-1] or [host_zeros(tile.cols)])
    if len(hidden) > MAX_ROWS:
        raise ValueError(f"{len(hidden):,} rows of packed weights: at most {MAX_ROWS:,} can be addressed")
    rows = torch.tensor([entry.row() for entry in table], dtype=torch.int32, device="cpu")
    tensors = (hidden, weights[-1], hidden_bias, biases[-1], rows)
    return WideWeights(shape, tile, form, *(tensor.to(device) for tensor in tensors))


def _weight_blocks(weight: Tensor, cols: int, inner: int, form: str) -> Tensor:
    """(N, K) -> (N / cols * K / inner * parts * cols, inner): blocks in the order in which the kernel loads them."""
    tiles = weight.reshape(len(weight) // cols, cols, -1, inner).permute(0, 2, 1, 3)
    parts = split_operand(tiles, form)[: operand_parts(form)]
    return torch.stack(parts, dim=2).reshape(-1, inner).contiguous()


def allocate_scratch(packed: WideWeights, n_programs: int) -> WideScratch:
    """Uninitialised scratch for ``n_programs`` programs: one or two a streaming multiprocessor."""
    shape, tile, device = packed.shape, packed.tile, packed.weight.device
    blocks = n_programs * program_blocks(shape, tile) * operand_parts(packed.precision)
    if blocks * tile.rows > MAX_ROWS:
        raise ValueError(f"{blocks * tile.rows:,} rows of scratch, at most {MAX_ROWS:,}: use fewer programs")
    act = torch.empty(blocks * tile.rows, tile.inner, dtype=OPERAND_TYPES[packed.precision], device=device)
    raw = torch.empty(n_programs, tile.rows, output_width(shape, tile), dtype=torch.float32, device=device)
    state = torch.empty(n_programs, tile.rows, state_width(shape, tile), dtype=torch.float32, device=device)
    return WideScratch(act, raw, state)
