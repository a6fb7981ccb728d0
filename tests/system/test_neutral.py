"""Settings that a program makes in torch change no bit of an answer, and are as they were afterwards."""

from __future__ import annotations

import contextlib
import copy
import pickle
import random
import threading
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_mlp
from torch import nn

from kaleido_fast import (
    InputError,
    ModelCard,
    Trace,
    attractors,
    fast_sample,
    forget_packed,
    load_checkpoint,
    load_dataset,
    sample_op,
    sample_to,
    save_checkpoint,
    train,
)
from kaleido_fast.evaluating.evaluation import evaluate
from kaleido_fast.evaluating.reference import Reference
from kaleido_fast.model import ModelSpec
from kaleido_fast.presets import TrainingRecipe
from kaleido_fast.reading.datasets import Dataset
from kaleido_fast.system.neutral import neutral
from kaleido_fast.training.trainer import UnstableModelWarning
from kaleido_kernels.exact import exact_products


@contextlib.contextmanager
def switched(switch, on, off):
    """A setting made for a while."""
    switch(on)
    try:
        yield
    finally:
        switch(off)


MKLDNN: Any = torch.backends.mkldnn


def permit(value: str) -> None:
    for backend in (MKLDNN.matmul, MKLDNN.conv, MKLDNN.rnn):
        backend.fp32_precision = value


STATES = {
    "bfloat16": partial(switched, torch.set_default_dtype, torch.bfloat16, torch.float32),
    "float64": partial(switched, torch.set_default_dtype, torch.float64, torch.float32),
    "default meta": partial(switched, torch.set_default_device, "meta", None),
    "with meta": partial(torch.device, "meta"),
    "default cpu": partial(switched, torch.set_default_device, "cpu", None),
    "autocast": partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    "autocast half": partial(torch.autocast, "cpu", dtype=torch.float16),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "medium products": partial(switched, torch.set_float32_matmul_precision, "medium", "highest"),
    "bf16 everywhere": partial(switched, permit, "bf16", "none"),
    "flushed denormals": partial(switched, torch.set_flush_denormal, True, False),
    "deterministic": partial(switched, torch.use_deterministic_algorithms, True, False),
}


class Convolutions(nn.Module):
    """A module that makes tensors as it runs, of the default type and on the default device."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.mix = nn.Conv1d(1, 8, 3, padding=1), nn.Conv1d(8, 1, 3, padding=1), nn.Linear(6, 6)

    def forward(self, x):
        inner = self.down(torch.tanh(self.up(x[:, None])))[:, 0]
        return torch.tanh(self.mix(inner) + torch.linspace(0, 1, 6)) * torch.tensor(0.9)


with torch.random.fork_rng():
    torch.manual_seed(0)
    MODULE = Convolutions().eval()
MODEL = random_mlp(6, 300, 300, 6)
POINTS = Dataset("points", torch.rand((30, 6), generator=torch.Generator().manual_seed(3)) * 1.6 - 0.8)
REFERENCE = Reference(POINTS.take(torch.arange(20)), POINTS.take(torch.arange(20, 30)))
RECIPE = TrainingRecipe(steps=6, batch_size=8, noise=0.3, pair_mix=0.2, held_out=5, warmup=2)
SMALL = ModelSpec((6, 40, 40, 6))
MILD = random_mlp(6, 40, 40, 6, scale=1.0)


class Shrinking(nn.Module):
    """Its chains become denormal."""

    def forward(self, x):
        return x * 0.01


def draw(model, **options) -> list:
    result = fast_sample(model, n_chains=9, device="cpu", **{"burn_in": 5, "n_draws": 2, **options})
    return [result.draws, result.residual, result.steps, result.outcome, result.trace, result.model_hash]


def draw_module(module=MODULE, **options) -> list:
    return draw(module, dim=6, data_range=(-1.0, 1.0), **options)


def trained(tmp_path) -> list:
    result = train(POINTS, spec=SMALL, recipe=RECIPE, device="cpu")
    save_checkpoint(tmp_path / "trained.safetensors", result.model, ModelCard())
    return [*result.model.state_dict().values(), result.history, result.card]


def written(tmp_path) -> list:
    sample_to(tmp_path / "a.npy", MODULE, n_chains=9, dim=6, data_range=(-1.0, 1.0), device="cpu", overwrite=True)
    return [(tmp_path / "a.npy").read_bytes(), (tmp_path / "a.json").read_bytes()]


def catalogued(_) -> list:
    found = attractors(fast_sample(MILD, n_chains=20, burn_in=80, device="cpu"), MILD)
    return [found.states, found.counts, found.radii]


def evaluated(tmp_path) -> list:
    save_checkpoint(tmp_path / "mild.safetensors", MILD, ModelCard())
    options: dict[str, Any] = {"engine": "reference", "device": "cpu", "sigmas": (0.3,)}
    found = evaluate(load_checkpoint(tmp_path / "mild.safetensors"), REFERENCE, n_chains=20, k=3, **options)
    return [str(found.to_dict()), found.samples]


WORK = {
    "cpu": lambda _: draw(MODEL, engine="cpu", jitter=0.2),
    "reference": lambda _: draw(MODEL, engine="reference", init="normal", tol=1e-3),
    "upstream noise": lambda _: draw(MODEL, engine="reference", jitter=0.1, noise="upstream"),
    "polished": lambda _: draw(MODEL, precision="fp16", polish=2, engine="reference"),
    "fp64": lambda _: draw(MODEL, precision="fp64", jitter=0.1),
    "by name": lambda _: draw("attractors", engine="cpu"),
    "module": lambda _: draw_module(jitter=0.1, trace=Trace((0, 3), (0, 4))),
    "module fp64": lambda _: draw_module(precision="fp64"),
    "denormals": lambda _: draw_module(Shrinking(), burn_in=19, tol=None),
    "operator": lambda _: [*sample_op(MODEL, n_chains=9, burn_in=4, engine="reference")],
    "store": written,
    "train": trained,
    "load": lambda _: [*load_checkpoint("digits").model.state_dict().values()],
    "data": lambda _: [load_dataset("digits").data, load_dataset("points2d").data],
    "attractors": catalogued,
    "evaluate": evaluated,
}


def assert_same(got: list, want: list) -> None:
    assert len(got) == len(want)
    for i, (value, expected) in enumerate(zip(got, want, strict=True)):
        if not isinstance(expected, torch.Tensor):
            assert value == expected, f"part {i} is {value}, not {expected}"
            continue
        assert not value.is_inference(), f"part {i} can be used in inference mode alone"
        assert (value.dtype, value.device) == (expected.dtype, expected.device), f"part {i}"
        if not torch.equal(value.nan_to_num(9.0), expected.nan_to_num(9.0)):
            error = (value.double() - expected.double()).abs()
            raise AssertionError(f"part {i} differs by {float(error.max())} at {int(error.argmax())}")


def settings() -> tuple:
    """Everything that `STATES` changes, as torch tells it."""
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_float32_matmul_precision() if MKLDNN.matmul.fp32_precision != "bf16" else "",
        [backend.fp32_precision for backend in (MKLDNN.matmul, MKLDNN.conv, MKLDNN.rnn)],
        torch.are_deterministic_algorithms_enabled(),
        np.float64(5e-324) * 1 == 0,
        torch.get_num_threads(),
    )


def random_states() -> tuple:
    return torch.get_rng_state().tolist(), pickle.dumps(np.random.get_state(legacy=False)), random.getstate()


@pytest.mark.parametrize("work", WORK)
@pytest.mark.filterwarnings("ignore::kaleido_fast.training.trainer.UnstableModelWarning")
def test_no_setting_of_torch_changes_a_bit(work, tmp_path):
    do = WORK[work]
    want, before = do(tmp_path), random_states()  # scikit-learn takes a number as it is imported
    for name, state in STATES.items():
        forget_packed()
        with state():
            outside = settings()
            got = do(tmp_path)
            assert settings() == outside, name
        try:
            assert_same(got, want)
        except AssertionError as problem:
            raise AssertionError(f"with {name}: {problem}") from problem
    assert random_states() == before, "the program's random numbers are its own"


@pytest.mark.parametrize("state", STATES)
def test_settings_are_put_back_on_any_exit(state):
    class Stop(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    with STATES[state]():
        outside = settings()
        with pytest.raises(KeyboardInterrupt):
            draw_module(Stop())
        with pytest.raises(InputError):
            load_checkpoint("nothing")
        with pytest.raises(InputError):
            train(POINTS, spec=ModelSpec((5, 5)))
        assert settings() == outside


def test_the_neutral_state_is_that_of_a_new_program():
    plain = settings()
    with contextlib.ExitStack() as stack:
        for name, state in STATES.items():
            if not name.startswith("default"):  # torch takes one default device only below none
                stack.enter_context(state())
        assert settings() != plain
        with neutral(), exact_products(torch.device("cpu")):
            inside = settings()
    assert inside[:5] == plain[:5] and inside[8] == plain[8]
    assert set(inside[6]) <= {"none", "ieee"}


def test_threads_may_leave_in_any_order_and_the_last_puts_the_type_back():
    first, second, inside = threading.Event(), threading.Event(), []

    def work(leave: threading.Event) -> None:
        with neutral():
            inside.append(torch.get_default_dtype())
            entered.release()
            leave.wait()
        left.release()

    entered, left = threading.Semaphore(0), threading.Semaphore(0)
    with STATES["float64"]():
        threads = [threading.Thread(target=work, args=(leave,)) for leave in (first, second)]
        for thread in threads:
            thread.start()
            entered.acquire()
        first.set()
        left.acquire()
        assert torch.get_default_dtype() is torch.float32, "the second is at work"
        second.set()
        left.acquire()
        for thread in threads:
            thread.join()
        assert torch.get_default_dtype() is torch.float64
    assert inside == [torch.float32] * 2


def test_what_is_set_while_the_library_works_stays():
    def callback(_) -> None:
        torch.set_default_dtype(torch.float64)

    with STATES["bfloat16"]():
        draw(MODEL, callback=callback)
        assert torch.get_default_dtype() is torch.float64


def test_warnings_name_the_callers_line():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(POINTS, spec=SMALL, recipe=RECIPE, device="cpu")
    (warning,) = [one for one in caught if one.category is UnstableModelWarning]
    assert warning.filename == __file__


def test_the_module_keeps_its_own_type():
    """A module in half precision runs in it, whatever autocast and the default type say."""
    module = nn.Sequential(copy.deepcopy(MODULE).mix, nn.Tanh()).to(torch.bfloat16)
    seen = []
    module.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    *want, _ = draw_module(module)  # what the hook holds belongs to the identity
    for name in ("autocast half", "float64"):
        with STATES[name]():
            assert_same(draw_module(module)[:-1], want)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
