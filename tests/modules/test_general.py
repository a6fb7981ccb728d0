"""Modules that are no plain MLP: sampled as in evaluation, and left as they were."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from conftest import assert_states_close
from odd_modules import DIM, HELD, MODULES, RANGE, SHARED, Around, Energy, Locked, Uncopyable, sample, with_statistics
from torch import nn

from kaleido_fast import InputError, SamplingInterruptedError, fast_sample
from kaleido_fast.modules.general import Evaluated, reached
from kaleido_fast.noise import start_noise

pytestmark = [  # torch would rather have others used, but they are
    pytest.mark.filterwarnings("ignore:.*(weight_norm|torch.jit).*deprecated")
]


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


def test_what_torch_compiled_runs_as_it_is_written():
    inner = with_statistics()
    plain = sample(inner).draws
    assert torch.equal(sample(torch.compile(inner)).draws, plain)
    assert torch.equal(sample(nn.Sequential(torch.compile(inner), nn.Identity())).draws, plain)


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
