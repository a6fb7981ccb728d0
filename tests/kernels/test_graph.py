"""The graph path against torch: captured on a GPU, elsewhere with its fused kernel interpreted, products by torch."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from kernel_oracle import (
    DEVICE,
    FP32,
    OPERANDS,
    assert_agree,
    assert_close,
    empty_outputs,
    moved_outputs,
    on_device,
    random_net,
    sample,
    use_true_bfloat16,
)

from kaleido_fast import InputError, ModelSpec, SampleRequest
from kaleido_fast.planning.facts import DeviceFacts
from kaleido_fast.planning.plan import make_plan
from kaleido_kernels.choice import choose
from kaleido_kernels.graph.kernel import GraphRunner
from kaleido_kernels.graph.pack import pack_graph
from kaleido_kernels.graph.plan import CACHED_BYTES, GraphTile, candidates, graph_bytes, graph_candidates, hidden_bytes
from kaleido_kernels.launch import LaunchRequest, Outputs, allocate_outputs
from kaleido_kernels.schedule import Schedule
from kaleido_kernels.shapes import KERNELS, NetShape
from kaleido_kernels.tile import GpuFacts
from kaleido_kernels.tuned import tile_from_json, tile_to_json, tuned_key

SMALL = GraphTile(16, rows=8, cols=16)
PRIMES = NetShape((7, 37, 17, 7))
FP16 = ("fp16", 4e-3, 0.0)
BF16 = ("bf16", 3e-2, 0.0)
H200 = DeviceFacts("cuda", "H200", memory=2**37, has_triton=True, gpu=GpuFacts(232_448, (9, 0), n_sm=132))


def poisoned(packed, tile=SMALL) -> GraphRunner:
    """A runner whose buffers are full of NaN but where zeros are promised: a value read before it is written shows."""
    runner = GraphRunner(packed, tile, capture=packed.weights[0].is_cuda)
    for tensor in (*runner.buffers.hidden, runner.buffers.raw, runner.buffers.state, runner.buffers.result):
        tensor.fill_(float("nan"))
    return runner


def run(layers, shape, request, *, precision="fp32", tile=SMALL, runner=None) -> Outputs:
    runner = runner or poisoned(pack_graph(layers, shape, precision, DEVICE), tile)
    outputs = empty_outputs(request, shape)
    runner.launch(on_device(request), outputs)
    return moved_outputs(outputs, "cpu")


def check(shape, request, triple=FP32, **options) -> Outputs:
    """Runs both and compares draws, final states and residuals."""
    precision, atol, rtol = triple
    layers = random_net(shape)
    got = run(layers, shape, request, precision=precision, **options)
    want = sample(layers, shape, request, OPERANDS[precision])
    assert_agree(got, want, atol, rtol, f"{shape.widths} {precision}")
    return got


@pytest.mark.parametrize("widths", [(1, 11, 1), (7, 37, 17, 7), (67, 41, 67), (5, 5), (3, 2, 71, 2, 3)], ids=str)
def test_one_step_equals_torch(widths):
    for triple in (FP32, FP16):
        check(NetShape(widths), LaunchRequest(19, Schedule()), triple)


def test_one_step_in_bf16_equals_torch(monkeypatch):
    use_true_bfloat16(monkeypatch)
    check(PRIMES, LaunchRequest(19, Schedule()), BF16)


@pytest.mark.parametrize("n_chains", [1, 16, 35])
def test_several_steps_and_draws_equal_torch(n_chains):
    check(PRIMES, LaunchRequest(n_chains, Schedule(burn_in=2, n_draws=2, thin=2)))


def test_no_chain_is_no_work():
    outputs = run(random_net(PRIMES), PRIMES, LaunchRequest(0, Schedule(n_draws=3)))
    assert outputs.final.shape == (0, 7) and outputs.residual.shape == (0,)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "tanh"])
@pytest.mark.parametrize("bound", ["tanh", "sigmoid"])
def test_every_activation_and_bound(activation, bound):
    low = {"tanh": -1.0, "sigmoid": 0.0}[bound]
    shape = NetShape((5, 19, 5), activation, bound, negative_slope=0.2, low=low)
    got = check(shape, LaunchRequest(5, Schedule(burn_in=1)), ("fp32", 5e-6, 1e-5))
    assert got.final.min() >= low and got.final.max() <= 1.0


def test_layers_without_bias():
    check(NetShape((5, 19, 13, 5), bias=(False, True, False)), LaunchRequest(5, Schedule()))


@pytest.mark.parametrize("noise", ["normal", "uniform", "upstream"])
@pytest.mark.parametrize("dim", [3, 21])
def test_jitter_follows_the_schedule(noise, dim):
    schedule = Schedule(burn_in=2, n_draws=2, thin=3, settle=1, jitter=0.3, noise=noise)
    shape = NetShape((dim, 19, dim), low=-0.9, high=0.7)
    check(shape, LaunchRequest(9, schedule, seed=2**63 + 5), ("fp32", 1e-5, 1e-5))


@pytest.mark.parametrize("init", ["uniform", "normal"])
def test_chain_ids_across_the_32_bit_border(init):
    request = LaunchRequest(5, Schedule(thin=3, settle=0, jitter=0.2), first_chain=2**32 - 2, init=init, seed=3)
    by_row = check(PRIMES, request, ("fp32", 1e-5, 1e-5))
    ids = torch.tensor([2**32 + 2, 2**40 + 1, 2**32 - 2])
    chosen = replace(request, n_chains=3, chain_ids=ids, first_chain=0)
    by_id = check(PRIMES, chosen, ("fp32", 1e-5, 1e-5))
    assert torch.equal(by_id.final[0], by_row.final[4]) and torch.equal(by_id.final[2], by_row.final[0])


def test_given_states_and_a_split_in_time_change_no_bit():
    layers = random_net(PRIMES)
    schedule = Schedule(burn_in=1, n_draws=2, thin=2, settle=1, jitter=0.3)
    whole = run(layers, PRIMES, LaunchRequest(17, schedule, seed=5))
    first = run(layers, PRIMES, LaunchRequest(17, schedule, seed=5, run_steps=2))
    rest = run(layers, PRIMES, LaunchRequest(17, schedule, seed=5, first_step=2, start=first.final))
    assert whole.draws is not None and rest.draws is not None
    assert torch.equal(rest.final, whole.final) and torch.equal(rest.residual, whole.residual)
    assert torch.equal(rest.draws, whole.draws), "both draws end after the split"


def test_neighbours_and_rows_change_no_bit():
    layers = random_net(PRIMES)
    request = LaunchRequest(35, Schedule(thin=2, settle=0, jitter=0.3), seed=1)
    together = run(layers, PRIMES, request)
    ids = torch.randperm(35, generator=torch.Generator().manual_seed(0))
    mixed = run(layers, PRIMES, replace(request, chain_ids=ids))
    assert torch.equal(mixed.final, together.final[ids]) and torch.equal(mixed.residual, together.residual[ids])


def test_one_runner_serves_launches_of_other_seeds_sizes_and_schedules():
    """What a captured graph reads, it reads from device memory; a launch leaves nothing behind for the next."""
    layers = random_net(PRIMES)
    shared = poisoned(pack_graph(layers, PRIMES, "fp32", DEVICE))
    quiet, noisy = Schedule(burn_in=1, n_draws=2), Schedule(thin=3, settle=0, jitter=0.3)
    nan = torch.full((16, 7), float("nan"))
    for request in (
        LaunchRequest(35, noisy, seed=1),
        LaunchRequest(16, noisy, seed=1, start=nan),
        LaunchRequest(3, noisy, seed=2**63 + 1, first_chain=2**40),
        LaunchRequest(20, quiet, seed=1),
        LaunchRequest(5, noisy, seed=1, init="normal"),
    ):
        got = run(layers, PRIMES, request, runner=shared)
        want = run(layers, PRIMES, request)
        assert_close(got.final, want.final, 0.0, 0.0, f"{request} final")
        assert_close(got.residual, want.residual, 0.0, 0.0, f"{request} residual")


def test_nan_stays_in_its_chain_and_is_reported():
    start = torch.zeros(5, 7)
    start[2, 6] = float("nan")
    got = check(PRIMES, LaunchRequest(5, Schedule(n_draws=2, settle=0, jitter=0.1), start=start), ("fp32", 1e-5, 1e-5))
    assert got.residual.isnan().tolist() == [False, False, True, False, False]


def test_the_host_programs_permissions_do_not_reach_the_products():
    layers = random_net(PRIMES)
    want = run(layers, PRIMES, LaunchRequest(5, Schedule()))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            got = run(layers, PRIMES, LaunchRequest(5, Schedule()))
        assert torch.get_float32_matmul_precision() == "medium"
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # from here on torch refuses its older question
        again = run(layers, PRIMES, LaunchRequest(5, Schedule()))
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision(before)
    assert torch.equal(got.final, want.final) and torch.equal(again.final, want.final)


@pytest.mark.gpu
def test_a_thousand_captured_launches_give_the_same_bits():
    layers = random_net(PRIMES)
    request = LaunchRequest(35, Schedule(burn_in=3, settle=0, jitter=0.2))
    runner = poisoned(pack_graph(layers, PRIMES, "bf16", "cuda"))
    first = run(layers, PRIMES, request, runner=runner)
    for _ in range(1000):
        assert torch.equal(run(layers, PRIMES, request, runner=runner).final, first.final)


@pytest.mark.gpu
def test_a_launch_inside_the_host_programs_capture_is_captured_with_it():
    layers = random_net(PRIMES)
    request = LaunchRequest(9, Schedule(burn_in=2))
    runner = poisoned(pack_graph(layers, PRIMES, "fp16", "cuda"))
    outputs = allocate_outputs(request, PRIMES, torch.device("cuda"))
    runner.launch(request, outputs)
    want = outputs.final.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        runner.launch(request, outputs)
    outputs.final.zero_()
    graph.replay()
    assert torch.equal(outputs.final, want)


def test_a_tuned_table_or_a_name_chooses_it_and_nothing_else():
    facts = GpuFacts()
    mnist = NetShape((784, *[500] * 10, 784))
    assert choose(mnist, "fp16", facts).kernel == "onchip"
    tile = graph_candidates(mnist, "fp16")[0]
    assert tile_from_json(tile_to_json(tile)) == tile
    tuned = {tuned_key(mnist, "fp16"): tile_to_json(tile)}
    assert choose(mnist, "fp16", facts, tuned=tuned).tile == tile
    assert choose(mnist, "fp16", facts, tuned=tuned, kernel="wide").kernel == "wide"
    named = choose(mnist, "fp32", facts, kernel="graph")
    assert named.kernel == "graph" and "asked for by name" in named.explain()
    for kernel in KERNELS:
        assert choose(NetShape((2, 50, 2)), "fp16", facts, kernel=kernel).kernel == kernel


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kernel": "narrow"}, "kernel 'narrow' cannot run this: .*784 wide, at most 128"),
        ({"kernel": "graph", "precision": "tf32"}, "kernel 'graph' cannot run this: .*tf32"),
        ({"kernel": "wide", "engine": "cpu"}, "kernel 'wide' with engine 'cpu'"),
        ({"kernel": "wade"}, "did you mean 'wide'"),
    ],
)
def test_a_kernel_that_cannot_run_is_named_with_the_reason(options, text):
    spec = ModelSpec((784, 500, 784))
    with pytest.raises(InputError, match=text):
        make_plan(SampleRequest(n_chains=100, **options), spec, H200, 784)


@pytest.mark.parametrize(
    ("capability", "precision", "chains"),
    [((9, 0), "fp16", 8448), ((9, 0), "fp32", 4096), ((8, 0), "fp16", 4096), ((10, 0), "bf16", 8448)],
)
def test_the_cache_helps_the_activations_of_a_block(capability, precision, chains):
    cifar = NetShape((3072, *[2000] * 10, 3072))
    first = candidates(cifar, precision, GpuFacts(capability=capability))[0].block_chains
    cached = CACHED_BYTES[min(capability[0], 9)]
    assert first == chains
    assert hidden_bytes(cifar, precision, first) <= cached < hidden_bytes(cifar, precision, 2 * first)


def test_the_memory_of_a_block_is_counted():
    packed = pack_graph(random_net(PRIMES), PRIMES, "fp16")
    buffers = GraphRunner(packed, SMALL, capture=False).buffers
    tensors = (*buffers.hidden, *(getattr(buffers, name) for name in ("operand", "raw", "state", "result")))
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*tensors, buffers.residual, buffers.chains))
    assert graph_bytes(PRIMES, "fp16", SMALL) == held


@pytest.mark.parametrize("options", [{"rows": 3}, {"block_chains": 100, "rows": 16}, {"cols": 512}, {"warps": 3}])
def test_impossible_tiles_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GraphTile(**options)


def test_the_fused_kernel_compiles_without_spills_or_short_offsets():
    code = """
from kaleido_kernels.proving.inspect.compiling import compile_job
from kaleido_kernels.proving.inspect.jobs import Job
from kaleido_kernels.graph.plan import GraphTile
from kaleido_kernels.proving.verdicts import narrow_offsets
from kaleido_kernels.shapes import NETWORKS
jobs = (("mnist", "fp16", "normal"), ("points1d", "bf16", "none"), ("cifar", "fp32", "upstream"))
for net, precision, jitter in jobs:
    job = Job(net, NETWORKS[net], GraphTile(), precision, jitter)
    made = compile_job(job, "sm_90")
    assert made.stack == 0 and made.registers <= 128, (job, made.stack, made.registers)
    assert not narrow_offsets(made.ttir)
    assert "tt.dot" not in made.ttir
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([".", "kernels"])
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
