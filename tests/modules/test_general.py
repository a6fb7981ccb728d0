"""Modules that are no plain MLP: sampled as in evaluation, left as they were, their answers checked."""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_states_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from kaleido_fast import InputError, SamplingInterruptedError, SamplingMemoryError, attractors, fast_sample, sample_to
from kaleido_fast.engines.general import ModuleEngine
from kaleido_fast.modules.general import Evaluated, reached
from kaleido_fast.noise import start_noise
from kaleido_fast.planning.blocks import full_module_tile, module_tile
from kaleido_fast.planning.request import SampleRequest, Trace

pytestmark = [  # torch would rather have others used, but they are
    pytest.mark.filterwarnings("ignore:.*(weight_norm|torch.jit).*deprecated")
]
DIM = 6
RANGE = (-1.0, 1.0)


class Mapped(nn.Module):
    """A module whose forward is any function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class HiddenParts(nn.Module):
    """Keeps its layers where torch does not find them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.parts = [nn.Linear(DIM, DIM), {"norm": nn.BatchNorm1d(DIM)}, nn.Dropout(0.5)]

    def forward(self, x):
        linear, norms, drop = self.parts
        return torch.tanh(drop(norms["norm"](linear(x))))


class Locked(nn.Module):
    """Holds what Python cannot copy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.lock = threading.Lock()
        self.norm, self.linear = nn.BatchNorm1d(DIM), nn.Linear(DIM, DIM)

    def forward(self, x):
        with self.lock:
            return torch.tanh(self.linear(self.norm(x)))


class Uncopyable(Locked):
    """Cannot be made anew at all."""

    def __new__(cls, token=None):
        if token is None:
            raise TypeError("made by its factory alone")
        return super().__new__(cls)

    def __init__(self, token) -> None:
        super().__init__()


class Energy(nn.Module):
    """Needs gradients in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.linear = nn.Linear(DIM, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(torch.tanh(self.linear(x)).sum(), x)
        return torch.tanh(x - slope)


def normed(norm) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(norm(nn.Linear(DIM, 9)), nn.PReLU(), nn.Linear(9, DIM), nn.Tanh())


def with_statistics() -> nn.Module:
    torch.manual_seed(1)
    inner = nn.Sequential(nn.Linear(9, 9), nn.BatchNorm1d(9, momentum=0.5), nn.Dropout(0.4))
    return nn.Sequential(nn.Linear(DIM, 9), inner, nn.PReLU(), nn.Dropout(0.5), nn.Linear(9, DIM), nn.Tanh())


def around_a_closure() -> nn.Module:
    inner = with_statistics()
    return Mapped(lambda x: inner(x))


def hooked() -> nn.Module:
    module = with_statistics()
    next(module.children()).register_forward_hook(lambda _module, _inputs, output: 0.5 * output)
    return module


def patched() -> nn.Module:
    module = with_statistics()
    before = module.forward
    module.forward = lambda x: 0.5 * before(x)
    return module


def convolutional() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout2d(), nn.Flatten(),
        nn.Linear(24, DIM), nn.Tanh(),
    )  # fmt: skip


class Holder:
    """No module, but holds one."""

    def __init__(self, part: nn.Module) -> None:
        self.part = part


class ByMode(nn.Module):
    """Tells its mode by its answer alone: no batch, no chance."""

    def forward(self, x):
        return x * 0.5 if self.training else x


SHARED = {"norm": nn.BatchNorm1d(DIM), "mode": ByMode()}
HELD = Holder(ByMode())


def by_a_function(x):
    return SHARED["norm"](HELD.part(x))


class Around(nn.Module):
    """Calls modules that torch does not find."""

    kept = (ByMode(),)

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.linear, self.name = nn.Linear(DIM, DIM), name
        self.holder = Holder(nn.Sequential(ByMode(), nn.BatchNorm1d(DIM)))

    def in_an_object(self, x):
        return self.holder.part(x)

    def in_the_class(self, x):
        return self.kept[0](x)

    def in_a_global(self, x):
        return (lambda y: SHARED["mode"](y))(x)

    def by_a_function(self, x):
        return by_a_function(x)

    def forward(self, x):
        named = {"object": self.in_an_object, "class": self.in_the_class, "global": self.in_a_global}
        return torch.tanh(named.get(self.name, self.by_a_function)(self.linear(x)))


MODULES = {
    "a part in an object": lambda: Around("object"),
    "a part in the class": lambda: Around("class"),
    "a part in a global container": lambda: Around("global"),
    "a part by a function": lambda: Around("function"),
    "batch norm and dropout": with_statistics,
    "a convolution": convolutional,
    "spectral_norm": lambda: normed(parametrizations.spectral_norm),
    "the old spectral_norm": lambda: normed(spectral_norm),
    "the old weight_norm": lambda: normed(weight_norm),
    "an orthogonal layer": lambda: normed(parametrizations.orthogonal),
    "hidden parts": HiddenParts,
    "a closure": around_a_closure,
    "a hook": hooked,
    "a patched forward": patched,
    "a lock": Locked,
    "no copy": lambda: Uncopyable("token"),
    "gradients": Energy,
    "tracing": lambda: torch.jit.trace(normed(lambda layer: layer), torch.zeros(3, DIM)),
    "torch.fx": lambda: torch.fx.symbolic_trace(with_statistics()),
}


def warmed_up(name: str) -> nn.Module:
    """In training mode, after a step that left gradients."""
    module = MODULES[name]()
    for part in reached(module):
        part.train()
    module(torch.rand(7, DIM) - 0.5).square().sum().backward()
    return module


def state_of(module: nn.Module) -> tuple:
    """Everything that a run must leave alone, in a form that can be compared."""
    parts = reached(module)
    tensors = [t for part in parts for t in (*part.parameters(recurse=False), *part.buffers(recurse=False))]
    grads = [None if t.grad is None else t.grad.tolist() for t in tensors]
    hooks = [(list(part._forward_hooks), list(part._forward_pre_hooks)) for part in parts]
    return (
        [part.training for part in parts],
        [t.detach().double().tolist() for t in tensors],
        [(id(t), t.requires_grad) for t in tensors],
        grads,
        hooks,
        torch.get_rng_state().tolist(),
    )


def sample(module: nn.Module, n: int = 5, **options):
    defaults: dict[str, Any] = {"burn_in": 3, "dim": DIM, "data_range": RANGE, "device": "cpu", "tol": None}
    return fast_sample(module, n_chains=n, **defaults | options)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_sampled_as_in_evaluation_and_left_alone(name):
    torch.manual_seed(0)
    module = warmed_up(name)
    before = state_of(module)
    results = [sample(module, burn_in=0).final, sample(module, burn_in=0).final]
    assert state_of(module) == before, "the caller's module has changed"
    for part in reached(module):
        part.eval()
    with torch.no_grad():
        want = module(start_noise(0, torch.arange(5), DIM, "uniform", *RANGE))
    assert torch.equal(*results)
    assert_states_close(results[0], want, atol=1e-6, what=name)


def test_modules_are_found_wherever_a_forward_may_reach_them():
    module = Around("class")
    hidden = [*module.holder.part, *SHARED.values(), HELD.part, *Around.kept]
    assert set(map(id, hidden)) <= set(map(id, reached(module)))


@pytest.mark.parametrize("name", ["batch norm and dropout", "a closure", "no copy"])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_a_stopped_run_leaves_the_module_alone(name, stop):
    module = warmed_up(name)
    before = state_of(module)

    def interrupt(_progress):
        raise stop

    with pytest.raises(SamplingInterruptedError if stop is KeyboardInterrupt else stop):
        sample(module, burn_in=200, callback=interrupt)
    assert state_of(module) == before


def test_threads_may_sample_a_module_that_cannot_be_copied_at_once():
    """Each puts it into evaluation mode for a while: none may find it back in training."""
    module = warmed_up("no copy")
    before, found = state_of(module), []
    quiet = sample(module, 16, burn_in=30).final
    threads = [threading.Thread(target=lambda: found.append(sample(module, 16, burn_in=30).final)) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert [torch.equal(final, quiet) for final in found] == [True] * 4
    assert state_of(module) == before


def test_a_buffer_with_a_history_is_copied_and_not_shared():
    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(DIM, DIM)
            self.register_buffer("mean", torch.zeros(DIM))

        def forward(self, x):
            y = self.linear(x)
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * y.mean(0)
            return torch.tanh(y - self.mean)

    module = Running()
    module(torch.rand(7, DIM)).sum().backward()
    exact = sample(module, precision="fp64")
    assert module.mean.dtype == module.linear.weight.dtype == torch.float32
    assert module.mean.grad_fn is not None
    assert_states_close(exact.final, sample(module).final.double(), atol=1e-5, what="fp64")


def test_another_thread_may_train_the_module_meanwhile():
    module = warmed_up("batch norm and dropout")
    quiet = sample(module, burn_in=40).final
    modes = []

    def train(_progress):
        with torch.enable_grad():
            modes.append(module.training)
            module(torch.rand(7, DIM)).sum().backward()
            with torch.no_grad():
                next(module.parameters()).zero_()

    disturbed = sample(module, burn_in=40, callback=train).final
    assert modes, "nobody trained"
    assert all(modes), "the caller's module was in evaluation mode"
    assert torch.equal(quiet, disturbed)


def test_a_copy_shares_no_memory_and_keeps_ties():
    linear = nn.Linear(DIM, DIM)
    module = nn.Sequential(linear, nn.PReLU(), linear, nn.BatchNorm1d(DIM), nn.Tanh())
    form = Evaluated.of(module)
    assert form.borrowed == ()
    theirs = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    ours = {t.untyped_storage().data_ptr() for t in (*form.module.parameters(), *form.module.buffers())}
    assert not theirs & ours
    assert form.module[0] is form.module[2], "shared weights are no longer shared"
    assert not any(part.training for part in form.module.modules())
    assert Evaluated.of(Locked()).borrowed == (), "a lock is shared, the rest is copied"
    whole = Uncopyable("token")
    assert Evaluated.of(whole).borrowed == tuple(reached(whole))


def test_gradients_in_a_forward_work_in_inference_mode_too():
    module = Energy()
    plain = sample(module).draws
    with torch.inference_mode():
        assert torch.equal(sample(module).draws, plain)


def test_a_module_may_write_into_its_input_and_return_one_memory():
    memory = torch.zeros(5, DIM)
    want = sample(Mapped(lambda x: 0.5 * x)).draws
    assert torch.equal(sample(Mapped(lambda x: x.mul_(0.5))).draws, want)
    assert torch.equal(sample(Mapped(lambda x: memory.copy_(0.5 * x))).draws, want)


def test_what_torch_compiled_runs_as_it_is_written():
    inner = with_statistics()
    plain = sample(inner).draws
    assert torch.equal(sample(torch.compile(inner)).draws, plain)
    assert torch.equal(sample(nn.Sequential(torch.compile(inner), nn.Identity())).draws, plain)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-7), (torch.bfloat16, 0.0), (torch.float16, 0.0)])
def test_a_module_computes_in_the_type_of_its_weights(dtype, atol):
    module = normed(lambda layer: layer).to(dtype)
    start = start_noise(0, torch.arange(5), DIM, "uniform", *RANGE)
    with torch.no_grad():
        want = module(start.to(dtype)).double()
    assert_states_close(sample(module, burn_in=0).final, want, atol=atol, what=str(dtype))
    exact = sample(module, burn_in=0, precision="fp64")
    with torch.no_grad():
        want = module.double()(start.double())
    assert_states_close(exact.final, want, atol=1e-15, what=f"fp64 of {dtype}")


@pytest.mark.parametrize(
    ("module", "options", "text"),
    [
        (Mapped(lambda x: (x, x)), {}, "Mapped returned a tuple of 2"),
        (Mapped(lambda x: x[:, :1]), {}, r"float32 of shape \(5, 1\) on cpu for float32 of shape \(5, 6\)"),
        (Mapped(lambda x: x.view(-1, 1, 2, 3)), {}, r"append torch.nn.Flatten\(\)"),
        (Mapped(lambda x: x.int()), {}, "returned int32"),
        (Mapped(lambda x: x.to("meta")), {}, "on meta"),
        (Mapped(lambda x: x * torch.nan), {}, "NaN or infinite values alone"),
        (Mapped(lambda x: x * 3), {}, r"outside of data_range \(-1, 1\).*Hardtanh"),
        (Mapped(lambda x: 1.2 * x), {"z0": torch.full((5, DIM), 0.7)}, "outside of data_range"),
        (nn.Sequential(nn.Linear(7, 7), nn.PReLU(), nn.Tanh()), {}, "Sequential raised RuntimeError .*dim="),
        (Mapped(lambda x: F.dropout(x, 0.5) / 2), {}, "draws random numbers"),
        (Mapped(lambda x: torch.tanh(x - x.mean(0))), {}, "beside other chains"),
        (nn.Sequential(nn.BatchNorm1d(DIM, track_running_stats=False)), {}, "BatchNorm1d 0 of a Sequential keeps no"),
        (nn.Sequential(nn.LazyLinear(DIM), nn.PReLU(), nn.Tanh()), {}, "no values yet for 0.weight"),
        (nn.Tanh(), {"precision": "bf16"}, "computes in the type of its weights"),
        (nn.Tanh(), {"tile_chains": 0}, "tile_chains is 0"),
        (nn.Tanh(), {"dim": 0}, "dim is 0"),
        (nn.Tanh(), {"dim": 2.5}, "dim is 2.5"),
        (nn.Tanh(), {"data_range": (1, -1)}, r"data_range is \(1.0, -1.0\)"),
        (nn.Tanh(), {"data_range": (0, float("inf"))}, "two finite numbers"),
        (nn.Tanh(), {"data_range": (1.0, 1.0 + 1e-12)}, "two finite numbers"),
        (nn.Tanh(), {"data_range": 3}, "data_range is 3"),
        (nn.Tanh(), {"data_range": (0, 1, 2)}, "two finite numbers"),
    ],
)
def test_what_cannot_be_sampled_is_refused_in_one_line(module, options, text):
    random = torch.get_rng_state()
    with pytest.raises(InputError, match=text) as caught:
        sample(module, **options)
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), random)


def test_random_numbers_without_effect_leave_torch_alone():
    module = Mapped(lambda x: 0.5 * x + 0 * torch.randn(1))
    random = torch.get_rng_state()
    assert torch.equal(sample(module).draws, sample(Mapped(lambda x: 0.5 * x)).draws)
    assert torch.equal(torch.get_rng_state(), random)


def test_random_numbers_of_another_thread_are_not_taken_back():
    """Those of a training beside it: torch's generator is one for all threads."""
    module, numbers, over = convolutional(), [], threading.Event()

    def draw() -> None:
        while not over.is_set():
            numbers.append(tuple(torch.randn(4).tolist()))

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for seed in range(10):
            sample(module, 33, burn_in=5, seed=seed)
    finally:
        over.set()
        thread.join()
    assert len(numbers) == len(set(numbers)), f"{len(numbers) - len(set(numbers))} of {len(numbers)} came again"


def test_rounding_at_the_bound_is_put_inside():
    result = sample(Mapped(lambda x: torch.sign(x) * (1 + 2**-23)))
    assert set(result.draws.unique().tolist()) == {-1.0, 1.0}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10**7), st.integers(1, 200_000), st.sampled_from(["cpu", "cuda"]))
def test_tiles_waste_little_and_are_one_size_for_many_chains(n, dim, kind):
    rows, full = module_tile(n, dim, kind), full_module_tile(dim, kind)
    assert 1 <= rows <= full
    assert -(-n // rows) * rows < 1.25 * n + full / 7, "too many idle rows"
    assert n > 8 or rows == n
    assert n <= 7 * full or rows == full


def place_dependent(scale: float) -> nn.Module:
    """As a library that rounds by a row's place: the last bits of an answer tell it."""
    return Mapped(lambda x: (0.9 * x).roll(1, 1) + scale * torch.arange(len(x))[:, None])


@pytest.mark.parametrize("module", [with_statistics(), convolutional(), place_dependent(2.0**-24)])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_split_gives_the_same_bits(module, data):
    """Chains and steps in any parts and order; with one tile size the bits are those of any other run too."""
    n, tile = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([1, 4, 7]))
    request = SampleRequest(n_chains=n, burn_in=4, n_draws=2, jitter=0.3, seed=5)
    cpu = torch.device("cpu")
    engine = ModuleEngine(module, request, dim=DIM, data_range=(-2.0, 2.0), tile_rows=tile, device=cpu)
    chains, draws = torch.arange(n) + 3, torch.full((n, 2, DIM), torch.nan)
    whole = engine.advance(chains, None, 0, 6, draws, lambda _: None)
    order = torch.tensor(data.draw(st.permutations(range(n))))[: data.draw(st.integers(1, n))]
    cut = data.draw(st.integers(1, 5))
    pieces = torch.full((len(order), 2, DIM), torch.nan)
    part = engine.advance(chains[order], None, 0, cut, pieces, lambda _: None)
    last = engine.advance(chains[order], part.state, cut, 6, pieces, lambda _: None)
    assert torch.equal(last.state, whole.state[order])
    assert torch.equal(last.residual, whole.residual[order])
    assert torch.equal(pieces, draws[order])


@pytest.mark.parametrize("module", [with_statistics(), place_dependent(2.0**-24)])
def test_one_tile_size_gives_the_same_bits_in_any_run(module):
    """Frozen neighbours, other chains, other blocks, traces: none of them shows."""
    options = {"burn_in": 60, "tol": 1e-3, "tile_chains": 7, "data_range": (-2.0, 2.0)}
    many = sample(module, 100, **options)
    few = sample(module, 9, first_chain=41, **options)
    assert torch.equal(few.draws, many.draws[41:50])
    assert torch.equal(few.steps, many.steps[41:50])
    assert torch.equal(sample(module, 100, block_chains=5, **options).draws, many.draws)
    traced = sample(module, 100, trace=Trace((41, 99), (61,)), **options | {"tol": None})
    assert torch.equal(traced.trace[:, 0], traced.final[[41, 99]])


def test_the_choice_of_rows_is_a_part_of_the_request():
    assert sample(nn.Tanh(), 1).request.tile_chains == 1
    many = sample(nn.Tanh(), 5000)
    assert many.request.tile_chains == full_module_tile(DIM, "cpu") == many.plan.tile_rows
    assert fast_sample("digits", n_chains=2, burn_in=0).request.tile_chains is None
    with pytest.raises(InputError, match="tile_chains is for modules"):
        fast_sample("digits", n_chains=2, tile_chains=4)


def test_few_chains_do_not_pay_for_rows_that_nobody_asked_for():
    rows = []
    sample(Mapped(lambda x: rows.append(len(x)) or 0.5 * x), 3, burn_in=9)
    assert set(rows) == {3}
    assert len(rows) == 10 + 2, "two looks besides the steps"


def test_a_size_or_range_that_contradicts_the_model_is_refused():
    plain = nn.Sequential(nn.Linear(DIM, 8), nn.ReLU(), nn.Linear(8, DIM), nn.Tanh())
    assert torch.equal(sample(plain).draws, fast_sample(plain, n_chains=5, burn_in=3, tol=None, device="cpu").draws)
    for model, options in ((plain, {"dim": 7}), ("digits", {"dim": 65}), ("digits", {"data_range": (0, 1)})):
        with pytest.raises(InputError, match="leave"):
            fast_sample(model, n_chains=5, **options)
    with torch.no_grad():
        plain[0].weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="NaN or infinite values"):
        sample(plain)


def test_attractors_say_that_they_need_a_plain_mlp():
    result = sample(nn.Tanh(), burn_in=99, tol=1e-3)
    with pytest.raises(InputError, match="Tanh is neither a KaleidoMLP nor a Sequential"):
        attractors(result, nn.Tanh())


def test_too_little_memory_names_the_rows_at_once():
    class Greedy(nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(SamplingMemoryError, match="pass tile_chains=4, or block_chains="):
        sample(Greedy(), 8)


def test_stored_draws_are_those_of_memory_and_say_how_many_rows(tmp_path):
    options: dict[str, Any] = {"burn_in": 3, "dim": DIM, "data_range": RANGE, "device": "cpu", "tol": None}
    module = place_dependent(2.0**-24)
    whole = sample(module, 50, tile_chains=7, data_range=RANGE)
    path = tmp_path / "draws.npy"
    stored = sample_to(path, module, n_chains=50, tile_chains=7, chunk_chains=14, **options)
    assert torch.equal(torch.from_numpy(np.load(path)), whole.draws)
    assert stored is not None
    assert stored.stored["request"]["tile_chains"] == 7
    with pytest.raises(InputError, match="tile_chains"):
        sample_to(path, module, n_chains=50, tile_chains=14, **options)
