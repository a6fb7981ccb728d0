"""Weights and buffers of the graph path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kaleido_kernels.graph.plan import GRAPH_FORMS, GraphTile, padded_width
from kaleido_kernels.packing import OPERAND_TYPES, Layers, check_layers, device_precision, host_zeros
from kaleido_kernels.shapes import NetShape

CONTROL_VALUES = 4
"""Numbers in device memory that a block reads: step, end of the launch, rows in use, seed."""


@dataclass(frozen=True)
class GraphWeights:
    """A network as the graph path reads it.

    Args:
        shape: what was packed.
        precision: "ieee", "fp16" or "bf16".
        weights: (padded out, padded in) a layer, operands.
        biases: (padded out,) a layer, zeros where there is none: operands, the last one fp32.
    """

    shape: NetShape
    precision: str
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]


def pack_graph(layers: Layers, shape: NetShape, precision: str, device: torch.device | str = "cpu") -> GraphWeights:
    """Pack for `GraphRunner`. ``precision`` is a device precision, or one asked for; not tf32.

    Raises:
        ValueError: weights that do not fit the shape or the precision, or a precision that this path lacks.
    """
    check_layers(layers, shape)
    device_precision(layers, precision)  # refuses weights outside the range of the precision
    if precision not in GRAPH_FORMS:
        raise ValueError(f"graph: precision {precision!r} is not offered: use fp32, fp16 or bf16, or kernel='wide'")
    form = GRAPH_FORMS[precision]
    weights, biases = [], []
    for index, (weight, bias) in enumerate(layers):
        n_out, n_in = weight.shape
        padded = host_zeros(padded_width(n_out), padded_width(n_in))
        padded[:n_out, :n_in] = weight.detach().cpu()
        row = host_zeros(len(padded))
        if bias is not None:
            row[:n_out] = bias.detach().cpu()
        last = index == shape.n_layers - 1
        weights.append(padded.to(OPERAND_TYPES[form]).to(device))
        biases.append((row if last else row.to(OPERAND_TYPES[form])).to(device))
    return GraphWeights(shape, form, tuple(weights), tuple(biases))


@dataclass(frozen=True)
class GraphBuffers:
    """The static memory of a block: what a captured graph reads and writes. It needs no particular content.

    Args:
        operand: (block, padded D): the input of a step; zero beyond D.
        hidden: two of (block, padded widest hidden layer) values, flat, used in turns.
        raw: (block, padded D) fp32.
        state, result: (block, D) fp32.
        residual: (block,) fp32.
        chains: (block,) int64.
        control: (CONTROL_VALUES,) int64.
    """

    operand: Tensor
    hidden: tuple[Tensor, Tensor]
    raw: Tensor
    state: Tensor
    result: Tensor
    residual: Tensor
    chains: Tensor
    control: Tensor


def allocate_buffers(packed: GraphWeights, tile: GraphTile) -> GraphBuffers:
    """Buffers of one block on the weights' device."""
    shape, n, device = packed.shape, tile.block_chains, packed.weights[0].device
    operand, dim = OPERAND_TYPES[packed.precision], padded_width(shape.dim)
    hidden = n * padded_width(max(shape.hidden, 1))
    return GraphBuffers(
        torch.zeros(n, dim, dtype=operand, device=device),
        (torch.empty(hidden, dtype=operand, device=device), torch.empty(hidden, dtype=operand, device=device)),
        torch.empty(n, dim, dtype=torch.float32, device=device),
        torch.empty(n, shape.dim, dtype=torch.float32, device=device),
        torch.empty(n, shape.dim, dtype=torch.float32, device=device),
        torch.empty(n, dtype=torch.float32, device=device),
        torch.zeros(n, dtype=torch.int64, device=device),
        torch.zeros(CONTROL_VALUES, dtype=torch.int64, device=device),
    )
