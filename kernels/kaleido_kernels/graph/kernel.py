"""The graph path: matrix products by the vendor's library, everything else of a step in one fused kernel.

For wide networks the library's products are hard to beat. A block of chains whose activations the second-level cache
still helps runs step by step:

    addmm chain     operand -> h -> h -> ... -> raw sums; bias and ReLU in the product's epilogue
    fused kernel    bound, residual, noise, clamp; the operand of the next step

On a CUDA device the step is captured once in a CUDA graph and replayed: step number, chain ids and the number of the
last step are read from device memory. On CPU tensors the same code runs uncaptured (TRITON_INTERPRET=1).

Hidden layers' biases have the type of the operands, as the epilogue wants it; sums, the last bias, bound and state are
fp32. Products in fp32 are plain fp32, never TF32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kaleido_kernels.arguments import QUIET, LaunchKind, compiled_map
from kaleido_kernels.exact import exact_products
from kaleido_kernels.graph.pack import GraphWeights, allocate_buffers, pack_graph
from kaleido_kernels.graph.plan import GRAPH_FORMS, GraphTile, padded_width
from kaleido_kernels.launch import OPERANDS, LaunchRequest, Outputs, check_tensors, shares_on
from kaleido_kernels.noise import first_state, go_by_part, jitter_input, jitter_output, kept_share
from kaleido_kernels.packing import Layers
from kaleido_kernels.schedule import Schedule
from kaleido_kernels.shapes import NetShape
from kaleido_kernels.steps import (
    Chains,
    Noise,
    Timing,
    bound_output,
    draw_at,
    draw_end,
    hidden_activation,
    is_draw,
    is_jittered,
    place_columns,
    row_residual,
    to_operand,
    worst,
)
from kaleido_kernels.variant import Variant, use_asm_on

STEP, END, ROWS_USED, SEED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
ACTIVATE_BLOCK = 1024
ACTIVATE_WARPS = 4
NUM_STAGES = 1  # neither kernel has loads to pipeline


class Block(NamedTuple):
    """The memory of a block of chains: see the kernel's arguments of these names."""

    raw_ptr: Any
    bias_ptr: Any
    operand_ptr: Any
    state_ptr: Any
    result_ptr: Any


@triton.jit
def write_input(
    x, block, chains, place, first_col, step, keep, timing, noise,
    MAP: tl.constexpr, DIM_PADDED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Stores the input of ``step`` from x, of all rows: jittered where the schedule says so, as operand; if ``keep``
    in fp32 as well."""
    jittered = is_jittered(step, timing)
    x = jitter_input(x, step, jittered, noise, chains.ids, first_col, MAP, ROWS, COLS)
    col = first_col + tl.arange(0, COLS)
    mask = tl.broadcast_to((col < MAP.dim)[None, :], (ROWS, COLS))
    if keep:
        tl.store(block.state_ptr + place, x, mask=mask)
    high, _ = to_operand(x, MAP)
    tl.store(block.operand_ptr + chains.rows[:, None] * DIM_PADDED + col[None, :], high, mask=mask)


@triton.jit
def step_output(block, chains, used, first_col, MAP: tl.constexpr, DIM_PADDED: tl.constexpr, COLS: tl.constexpr,
                USE_ASM: tl.constexpr):  # fmt: skip
    """Columns ``first_col`` .. of what the step gives, from the products' sums."""
    col = first_col + tl.arange(0, COLS)
    x = tl.load(block.raw_ptr + chains.rows[:, None] * DIM_PADDED + col[None, :], mask=used, other=0.0)
    x = x + tl.load(block.bias_ptr + col, mask=col < MAP.dim, other=0.0)[None, :]
    return bound_output(x, MAP, USE_ASM)


@triton.jit(do_not_specialize=("burn_in", "thin", "settle"))
def graph_step_kernel(
    raw_ptr,  # (block, DIM_PADDED) fp32: sums of the last layer without bias; unused with FIRST
    bias_ptr,  # (DIM_PADDED,) fp32 of the last layer; unused with FIRST
    operand_ptr,  # (block, DIM_PADDED): the input of the next step; its padding stays zero
    state_ptr,  # (block, D) fp32: the input of the step that ends, then that of the next, where it is read again
    result_ptr,  # (block, D) fp32: with FIRST == "given" the states to start from, else the state after the step
    residual_ptr,  # (block,) fp32
    chains_ptr,  # (block,) int64
    control_ptr,  # (CONTROL_VALUES,) int64: step, end of the launch, rows in use, seed
    shares_ptr,  # (thin,) fp32: g_t of the steps of a draw; None unless they are those of a flow
    jitter: tl.float32, burn_in: tl.int32, thin: tl.int32, settle: tl.int32,
    MAP: tl.constexpr, DIM_PADDED: tl.constexpr, FIRST: tl.constexpr, USE_ASM: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Grid: (block / ROWS,). FIRST: "" ends a step; "noise" and "given" make the input of the launch's first step."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    step = tl.load(control_ptr + STEP).to(tl.int32)
    end_step = tl.load(control_ptr + END).to(tl.int32)
    seed = tl.load(control_ptr + SEED)
    exist = rows < tl.load(control_ptr + ROWS_USED)
    chains = Chains(rows, exist, tl.load(chains_ptr + rows, mask=exist, other=0))
    block = Block(raw_ptr, bias_ptr, operand_ptr, state_ptr, result_ptr)
    timing, noise = Timing(burn_in, None, thin, settle), Noise(seed, jitter, shares_ptr)
    residual = tl.zeros([ROWS], tl.float32)
    next_step = step + 1 if FIRST == "" else step
    keep = (next_step == end_step) | is_draw(next_step, timing)
    # The input of a step is read again for the last one's residual, and by a flow.
    keep_input = (next_step == end_step - 1) | (shares_ptr is not None)
    share = kept_share(noise, step, draw_end(draw_at(step, timing), timing), timing)
    for number in range((MAP.dim + COLS - 1) // COLS):
        first_col = number * COLS
        # Rows that are not in use get zeros for a state: what is left there of other chains might be NaN.
        place, used = place_columns(chains, first_col, MAP.dim, COLS)
        if FIRST == "":
            x = step_output(block, chains, used, first_col, MAP, DIM_PADDED, COLS, USE_ASM)
            if shares_ptr is not None:
                change = x - tl.load(state_ptr + place, mask=used, other=0.0)
                tl.debug_barrier()  # `write_input` writes to where this was read
                if next_step == end_step:
                    residual = worst(residual, row_residual(change, first_col, MAP.dim, COLS))
                x = go_by_part(x, change, share, MAP)
            elif next_step == end_step:
                change = x - tl.load(state_ptr + place, mask=used, other=0.0)
                residual = worst(residual, row_residual(change, first_col, MAP.dim, COLS))
            x = jitter_output(x, next_step, noise, chains.ids, first_col, MAP, ROWS, COLS)
            if keep:
                tl.store(result_ptr + place, x, mask=used)
        elif FIRST == "given":
            x = first_state(result_ptr, noise, chains, first_col, MAP, ROWS, COLS)
        else:
            x = first_state(None, noise, chains, first_col, MAP, ROWS, COLS)
        # Not after the last step, where the state before it is still to be read by other threads.
        if next_step != end_step:
            write_input(
                x, block, chains, place, first_col, next_step, keep_input, timing, noise, MAP, DIM_PADDED, ROWS, COLS
            )
    if FIRST == "":
        if next_step == end_step:
            tl.store(residual_ptr + rows, residual, mask=exist)


@triton.jit(do_not_specialize=("n_values",))
def activate_kernel(
    h_ptr,  # (n_values,) operands
    n_values: tl.int32,  # a multiple of 16, as padded widths are
    MAP: tl.constexpr,
    USE_ASM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A hidden activation in place, for those that no product's epilogue has. Grid: (cdiv(n_values, BLOCK),)."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < tl.multiple_of(n_values, 16)
    x = tl.load(h_ptr + place, mask=mask, other=0.0).to(tl.float32)
    high, _ = to_operand(hidden_activation(x, MAP, USE_ASM), MAP)
    tl.store(h_ptr + place, high, mask=mask)


@functools.lru_cache(maxsize=256)
def variant(
    shape: NetShape, precision: str, tile: GraphTile, kind: LaunchKind = QUIET, use_asm: bool = True, first: str = ""
) -> Variant:
    """The fused kernel as it is launched: of ``kind`` its jitter and init matter, ``first`` is the kernel's FIRST.

    ``precision`` is "fp32", "fp16" or "bf16", or a device precision of the graph path.
    """
    form = GRAPH_FORMS[precision]
    constants = {
        "MAP": compiled_map(shape, form, kind),
        "DIM_PADDED": padded_width(shape.dim),
        "FIRST": first,
        "USE_ASM": use_asm,
        "ROWS": tile.rows,
        "COLS": tile.cols,
    }
    signature = dict.fromkeys(("raw_ptr", "bias_ptr", "state_ptr", "result_ptr", "residual_ptr"), "*fp32")
    signature |= {"operand_ptr": OPERANDS[form], "chains_ptr": "*i64", "control_ptr": "*i64", "jitter": "fp32"}
    signature |= {"shares_ptr": "*fp32" if kind.by_parts else "none"}
    signature |= dict.fromkeys(("burn_in", "thin", "settle"), "i32")
    return Variant(graph_step_kernel, signature, constants, tile.warps, NUM_STAGES)


@functools.lru_cache(maxsize=256)
def activation_variant(shape: NetShape, precision: str, use_asm: bool = True) -> Variant:
    """The kernel of a hidden activation as it is launched; ``precision`` as in `variant`."""
    form = GRAPH_FORMS[precision]
    constants = {
        "MAP": compiled_map(shape, form, QUIET),
        "USE_ASM": use_asm,
        "BLOCK": ACTIVATE_BLOCK,
    }
    signature = {"h_ptr": OPERANDS[form], "n_values": "i32"}
    return Variant(activate_kernel, signature, constants, ACTIVATE_WARPS, NUM_STAGES)


class GraphRunner:
    """Runs launches with one set of buffers; two launches at a time need two runners.

    Args:
        packed: the network.
        tile: size of a block and of the fused kernel's programs.
        capture: whether to capture the step in a CUDA graph; needs a CUDA device.
    """

    def __init__(self, packed: GraphWeights, tile: GraphTile, *, capture: bool) -> None:
        self.packed, self.tile = packed, tile
        self.device = packed.weights[0].device
        self.buffers = allocate_buffers(packed, tile)
        self.capture = capture
        self._captured: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, Tensor | None]] = {}

    def launch(self, request: LaunchRequest, outputs: Outputs) -> None:
        """Run a launch, block by block; see `kaleido_kernels.launch`.

        Raises:
            ValueError: tensors that do not fit, checks.
        """
        if request.checks is not None:
            raise ValueError("the graph path runs every step: it takes no checks")
        check_tensors(request, self.packed.shape, self.device, outputs)
        size = self.tile.block_chains
        with torch.inference_mode():
            for first in range(0, request.n_chains, size):
                self._run_block(request, outputs, slice(first, min(first + size, request.n_chains)))

    def _run_block(self, request: LaunchRequest, outputs: Outputs, rows: slice) -> None:
        buffers, n = self.buffers, rows.stop - rows.start
        schedule, last_step = request.schedule, request.first_step + request.n_run
        self._load(request, rows, last_step)
        self._fused(schedule, request.init, "noise" if request.start is None else "given")
        step = self._step_runner(schedule)
        for number in range(request.first_step, last_step):
            step()
            draw = schedule.draw_at(number)
            if outputs.draws is not None and number + 1 == schedule.draw_end(draw):
                outputs.draws[rows, draw] = buffers.result[:n]
        outputs.final[rows] = buffers.result[:n]
        outputs.residual[rows] = buffers.residual[:n]

    def _load(self, request: LaunchRequest, rows: slice, last_step: int) -> None:
        """Chains, start states and control values of a block into the static buffers."""
        buffers, n = self.buffers, rows.stop - rows.start
        if request.chain_ids is not None:
            buffers.chains[:n] = request.chain_ids[rows]
        else:
            first = request.first_chain + rows.start
            torch.arange(first, first + n, out=buffers.chains[:n])
        if request.start is not None:
            buffers.result[:n] = request.start[rows]
        # Filled one by one: a copy from a list would wait for the device.
        for place, value in enumerate((request.first_step, last_step, n, request.signed_seed)):
            buffers.control[place].fill_(value)

    def _step_runner(self, schedule: Schedule) -> Any:
        """One step as a function without arguments: a captured graph's replay, or the step itself."""
        if not self.capture or torch.cuda.is_current_stream_capturing():
            return lambda: self._step(schedule)
        noise = (schedule.jitter_kind, schedule.jitter, schedule.noise_to)
        key = (*noise, schedule.burn_in, schedule.thin, schedule.settle)
        if key not in self._captured:
            # What the graph reads is kept with it.
            self._captured = {key: (self._capture_step(schedule), shares_on(schedule, self.device))}
        return self._captured[key][0].replay

    def _capture_step(self, schedule: Schedule) -> torch.cuda.CUDAGraph:
        """The step as a CUDA graph. The run before it, which compiles and sets up, is undone afterwards."""
        before = [tensor.clone() for tensor in self._changed()]
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            self._step(schedule)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use other devices meanwhile.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            self._step(schedule)
        for tensor, value in zip(self._changed(), before, strict=True):
            tensor.copy_(value)
        return graph

    def _changed(self) -> tuple[Tensor, ...]:
        """What a step reads and overwrites."""
        buffers = self.buffers
        return buffers.operand, buffers.state, buffers.control

    def _step(self, schedule: Schedule) -> None:
        """All layers, the fused kernel, and the step counter: what is captured."""
        with exact_products(self.device):  # not around replays, which do not ask: other threads would have to wait
            self._products()
        self._fused(schedule, "uniform", "")
        self.buffers.control[0].add_(1)

    def _products(self) -> None:
        """The addmm chain from ``operand`` to ``raw``."""
        packed, buffers, n = self.packed, self.buffers, self.tile.block_chains
        h = buffers.operand
        for index, (weight, bias) in enumerate(zip(packed.weights[:-1], packed.biases[:-1], strict=True)):
            out = buffers.hidden[index % 2][: n * len(weight)].view(n, len(weight))
            if packed.shape.activation == "relu":
                torch._addmm_activation(bias, h, weight.t(), out=out)
            else:
                torch.addmm(bias, h, weight.t(), out=out)
                self._activate(out)
            h = out
        last = packed.weights[-1].t()
        if packed.precision == "ieee":
            torch.mm(h, last, out=buffers.raw)
        elif self.device.type == "cuda":
            torch.mm(h, last, out_dtype=torch.float32, out=buffers.raw)
        else:  # torch has 16-bit products with fp32 results on CUDA devices only
            torch.mm(h.to(torch.float32), last.to(torch.float32), out=buffers.raw)

    def _activate(self, h: Tensor) -> None:
        chosen = activation_variant(self.packed.shape, self.packed.precision, use_asm_on(self.device))
        chosen.launch(-(-h.numel() // ACTIVATE_BLOCK), [h, h.numel()])

    def _fused(self, schedule: Schedule, init: str, first: str) -> None:
        buffers, packed, tile = self.buffers, self.packed, self.tile
        kind = QUIET._replace(jitter=schedule.jitter_kind, init=QUIET.init if schedule.restarts else init)
        chosen = variant(packed.shape, packed.precision, tile, kind, use_asm_on(self.device), first)
        arguments = [
            buffers.raw,
            packed.biases[-1],
            *(buffers.operand, buffers.state, buffers.result, buffers.residual, buffers.chains, buffers.control),
            shares_on(schedule, self.device),
            *(float(schedule.jitter), schedule.burn_in, schedule.thin, schedule.settle),
        ]
        chosen.launch(tile.block_chains // tile.rows, arguments)


def launcher(
    layers: Layers,
    shape: NetShape,
    tile: GraphTile,
    precision: str,
    device: torch.device,
    *,
    capture: bool,
    **_: object,
) -> Callable[[LaunchRequest, Outputs], None]:
    """See `kaleido_kernels.kernels.make_launcher`."""
    return GraphRunner(pack_graph(layers, shape, precision, device), tile, capture=capture).launch
