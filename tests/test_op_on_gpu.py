"""The operator makes no GPU wait: what is called, and on which stream."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import assert_same, needs, random_mlp
from torch.utils._python_dispatch import TorchDispatchMode

from kaleido_fast import InputError, sample_op
from kaleido_fast.op import _sample_chains
from kaleido_fast.planning.request import SampleRequest
from kaleido_fast.running.packed import PackedModel, layers_of

MODEL = random_mlp(6, 11, 13, 6)
ENGINES = ["reference", "cpu", "triton"]


class Recorded(TorchDispatchMode):
    """Notes torch's calls below the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    @property
    def names(self) -> set[str]:
        return set(self.calls)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.name().split("::")[1].split(".")[0]] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("engine", ["reference", "triton"])
@pytest.mark.parametrize(
    "options", [{}, {"jitter": 0.1, "n_draws": 2, "thin": 3, "init": "normal"}, {"precision": "bf16"}], ids=str
)
def test_nothing_that_would_wait_for_a_gpu_is_called(engine, options, monkeypatch):
    """What these engines call is the same on a GPU: no number is read and no place of a mask is looked up."""
    needs(engine)
    request = SampleRequest(n_chains=9, burn_in=2, tol=None, engine=engine, **options)
    z0, (weights, biases) = torch.rand(9, 6).half(), layers_of(MODEL)
    _sample_chains(request, MODEL.spec, weights, biases, None, None)  # packs
    monkeypatch.setattr(PackedModel, "holds", lambda model, tensors: True)  # on a GPU parameters are not read
    with Recorded() as recorded:
        _sample_chains(request, MODEL.spec, weights, biases, None, None)
        _sample_chains(request, MODEL.spec, weights, biases, z0, 4)
    waiting = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "index", "index_put_", "masked_select"}
    assert not recorded.names & {*waiting, "unique", "tolist", "bincount", "repeat_interleave"}
    assert "empty" in recorded.names


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_and_the_callers_stream_is_used():
    model = random_mlp(64, 128, 64).cuda()
    options = {"n_chains": 1000, "burn_in": 9, "jitter": 0.1}
    want = sample_op(model, **options)
    stream = torch.cuda.Stream()
    for where in (torch.cuda.current_stream(), stream):
        with torch.cuda.stream(where):
            sample_op(model, **options)  # packs
            torch.cuda.set_sync_debug_mode("error")
            try:
                chains = sample_op(model, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        where.synchronize()
        assert_same(chains, want)


@pytest.mark.gpu
def test_on_a_gpu_capture_is_refused_and_the_compiler_leaves_the_operator_out_of_graphs():
    model = random_mlp(64, 128, 64).cuda()
    sample_op(model, n_chains=100, burn_in=3)
    with pytest.raises(InputError, match="capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        sample_op(model, n_chains=100, burn_in=3)
    program = torch.compile(lambda x: sample_op(model, z0=x / 2, burn_in=3).final + 1, mode="reduce-overhead")
    x = torch.rand(50, 64, device="cuda")
    for _ in range(4):
        assert torch.equal(program(x), sample_op(model, z0=x / 2, burn_in=3).final + 1)
