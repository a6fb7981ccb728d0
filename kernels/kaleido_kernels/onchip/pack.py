"""Weights and scratch of the onchip kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kaleido_kernels.onchip.plan import (
    CHUNK,
    GROUPS,
    SLOT_ROWS,
    OnchipLayout,
    OnchipTile,
    inner_slots,
    onchip_layout,
)
from kaleido_kernels.packing import (
    OPERAND_TYPES,
    Layers,
    check_layers,
    device_precision,
    host_zeros,
    padded,
    split_operand,
)
from kaleido_kernels.shapes import NetShape

SCRATCH_ORDER = tuple(8 * block + 2 * pair + value for pair in range(4) for block in range(8) for value in range(2))
"""Column of a state at each place of a chunk in memory: as a thread of a product holds them, one behind the other."""


@dataclass(frozen=True)
class PackedOnchip:
    """A network as `onchip_kernel` reads it.

    Args:
        shape: what was packed.
        tile: what it was packed for.
        precision: "fp16x3", "fp16" or "bf16".
        layout: sizes.
        weights: (n_slots * 256, 64) operands, slots in the order of their use.
        bias: (n_layers - 1, padded width) of hidden layers, then (last_tiles * last) of the last one, flat, fp32.
        inner: (n_layers - 1,) int32, slots of one half of each hidden layer's outputs, without parts of split fp32.
    """

    shape: NetShape
    tile: OnchipTile
    precision: str
    layout: OnchipLayout
    weights: Tensor
    bias: Tensor
    inner: Tensor


@dataclass(frozen=True)
class OnchipScratch:
    """Memory that programs work in, reusable between launches: it needs no particular content.

    Args:
        inputs: (n_programs * 2 * in_chunks * group, 64) operands; one chunk where inputs do not go through memory.
        state: (n_programs * 2, in_chunks, group * 64) fp32, a chunk in the order of threads.
        n_programs: programs at a time.
    """

    inputs: Tensor
    state: Tensor
    n_programs: int


def pack_onchip(
    layers: Layers, shape: NetShape, tile: OnchipTile, precision: str, device: torch.device | str = "cpu"
) -> PackedOnchip:
    """Pack for `launch_onchip`. ``precision`` is a device precision, or one asked for.

    Raises:
        ValueError: weights that do not fit the shape, the precision or the kernel.
    """
    check_layers(layers, shape)
    form = device_precision(layers, precision)
    if form not in ("fp16x3", "fp16", "bf16"):
        raise ValueError(f"onchip: its operands have 16 bits, those of {form} have 32; use kernel='wide'")
    layout = onchip_layout(shape, tile, form)
    inner = inner_slots(shape, tile)
    slots: list[Tensor] = []
    biases: list[Tensor] = []
    for number, (weight, bias) in enumerate(layers):
        is_last = number == shape.n_layers - 1
        cols, tiles = (layout.last, layout.last_tiles) if is_last else (layout.cols, layout.halves)
        pieces = layout.last_pieces if is_last else layout.pieces
        n_slots = layout.last_slots if is_last else inner[number]
        matrix = padded(weight.detach().cpu(), cols * tiles, n_slots * pieces * CHUNK)
        if number == 0 and layout.through_memory:
            matrix = matrix.view(len(matrix), -1, CHUNK)[:, :, list(SCRATCH_ORDER)].reshape(matrix.shape)
        slots += _slots(matrix, cols, pieces)
        row = host_zeros(weight.shape[0]) if bias is None else bias.detach().cpu()
        biases.append(pad(row, (0, cols * tiles - len(row))))
    parts = split_operand(torch.stack(slots), form)[: layout.parts]
    weights = torch.stack(parts, dim=1).reshape(-1, CHUNK).contiguous()
    assert len(weights) == layout.n_slots * SLOT_ROWS
    counts = torch.tensor(inner, dtype=torch.int32, device="cpu")
    tensors = (weights, torch.cat(biases), counts)
    return PackedOnchip(shape, tile, form, layout, *(tensor.to(device) for tensor in tensors))


def _slots(matrix: Tensor, cols: int, pieces: int) -> list[Tensor]:
    """(outputs, inputs) as slots (256, 64): ``cols`` outputs of ``pieces`` chunks of inputs, one below the other."""
    blocks = matrix.view(len(matrix) // cols, cols, -1, pieces, CHUNK).permute(0, 2, 3, 1, 4)
    return list(blocks.reshape(-1, SLOT_ROWS, CHUNK))


def allocate_scratch(packed: PackedOnchip, n_programs: int) -> OnchipScratch:
    """Uninitialised scratch for ``n_programs`` programs: one a streaming multiprocessor."""
    layout, device = packed.layout, packed.weights.device
    chunks = n_programs * GROUPS * layout.in_chunks if layout.through_memory else 1
    inputs = torch.empty(chunks * layout.group, CHUNK, dtype=OPERAND_TYPES[packed.precision], device=device)
    state = torch.empty(n_programs * GROUPS, layout.in_chunks, layout.group * CHUNK, device=device)
    return OnchipScratch(inputs, state, n_programs)
