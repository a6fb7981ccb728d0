"""Fixtures and markers shared by all tests."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from kaleido_fast.checkpoint import ModelCard, save_checkpoint
from kaleido_fast.cli import main
from kaleido_fast.model import KaleidoMLP, ModelSpec

# A busy machine is no failure: no test asserts a time.
settings.register_profile("kaleido", deadline=None)
settings.load_profile("kaleido")

# Small networks: a second thread gains nothing, and its spin locks cost minutes where cores are shared.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulate", action="store_true", help="run compiled kernels in the emulator, and only the tests of kernels"
    )
    parser.addoption(  # an option of its own: a value that may be left out takes the path of a test that follows
        "--emulate-how",
        choices=("late", "early", "apart"),
        help="with --emulate: asynchronous copies as late as allowed (late, the default) or at once (early), or late "
        "with groups of warps that run apart (apart)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Kernels run on a GPU if there is one, in the emulator if it is asked for, else in Triton's interpreter.

    Triton reads the variable when kernels are decorated. Tests that need compiled kernels without a GPU start processes
    of their own without it.
    """
    if config.getoption("--emulate"):
        os.environ["TRITON_INTERPRET"] = "0"
    elif config.getoption("--emulate-how"):
        raise pytest.UsageError("--emulate-how says how kernels are emulated: pass --emulate too")
    elif not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def emulator(pytestconfig: pytest.Config) -> Iterator[object]:
    """With ``--emulate``, what runs the launches of the whole session; else None."""
    if not pytestconfig.getoption("--emulate"):
        yield None
        return
    from kaleido_kernels.proving.emulation.block import Conditions
    from kaleido_kernels.proving.emulation.driver import Emulator, emulated

    how = pytestconfig.getoption("--emulate-how")
    with emulated(Emulator(Conditions(early_copies=how == "early", apart=how == "apart"))) as found:
        yield found


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped, with the reason, where there is no CUDA device.

    Where there is one, the kernels' tests run on it, so ``-m gpu`` takes them all, and those of the interpreter are
    skipped. In the emulator only the kernels' tests run, and those marked ``emulated``, which run nowhere else.
    """
    emulate = config.getoption("--emulate")
    if emulate:
        others = [item for item in items if not (_is_of_kernels(item) or item.get_closest_marker("emulated"))]
        items[:] = [item for item in items if item not in set(others)]
        config.hook.pytest_deselected(items=others)
    for item in items:
        if emulate:
            if item.get_closest_marker("interpreter"):
                item.add_marker(pytest.mark.skip(reason="for Triton's interpreter: kernels are compiled here"))
        elif item.get_closest_marker("emulated"):
            item.add_marker(pytest.mark.skip(reason="runs compiled kernels without a GPU: pass --emulate"))
        if torch.cuda.is_available():
            if item.get_closest_marker("interpreter"):
                item.add_marker(pytest.mark.skip(reason="for Triton's interpreter: kernels are compiled here"))
            elif _is_of_kernels(item):
                item.add_marker(pytest.mark.gpu)
        elif item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, this machine has none"))


def _is_of_kernels(item: pytest.Item) -> bool:
    return item.path.parent.name == "kernels"


def needs(engine: str) -> None:
    """Skip where an engine's library is missing, and the interpreter where there is a GPU."""
    if engine == "triton":
        pytest.importorskip("triton", reason="needs Triton")
        if torch.cuda.is_available():
            pytest.skip("kernels are compiled here, for the GPU")
    if engine == "cpu":
        pytest.importorskip("numba", reason="needs numba")


def assert_same(got, want) -> None:
    """Draws and what is known of each chain, of two runs of one length, bit for bit."""
    for name in ("draws", "residual", "steps", "period", "outcome"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


def random_mlp(*widths: int, seed: int = 0, scale: float = 1.5, **options) -> KaleidoMLP:
    """A network with seeded random weights, large enough that the recursion moves."""
    generator = torch.Generator().manual_seed(seed)
    model = KaleidoMLP(ModelSpec(widths, **options))
    with torch.no_grad():
        for layer in model.linears:
            layer.weight.normal_(0, scale / layer.in_features**0.5, generator=generator)
            if layer.bias is not None:
                layer.bias.normal_(0, 0.3, generator=generator)
    return model.eval()


@pytest.fixture
def small_model() -> KaleidoMLP:
    """A 6-11-13-6 network: no width is a multiple of a vector."""
    return random_mlp(6, 11, 13, 6, sample_shape=(2, 3))


@pytest.fixture
def small_checkpoint(small_model, tmp_path):
    """The small model in a file with recommended settings."""
    path = tmp_path / "small.safetensors"
    save_checkpoint(path, small_model, ModelCard(name="small", sampling={"burn_in": 4, "jitter": 0.25, "settle": 1}))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with a model, its data and a file of draws."""
    model = random_mlp(6, 9, 6, sample_shape=(2, 3))
    save_checkpoint(tmp_path / "m.safetensors", model, ModelCard("m"))
    np.save(tmp_path / "data.npy", np.linspace(-1, 1, 240, dtype=np.float32).reshape(40, 2, 3))
    record = {"request": {}, "model": json.loads(model.spec.to_json())}
    np.savez(tmp_path / "draws.npz", draws=np.zeros((4, 1, 6), np.float32), record=np.array(json.dumps(record)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def gpu_report(tmp_path_factory):
    """A whole report of a GPU, made once by the interpreter in this process; one kernel and one peer fail."""
    from gpu_reports import make_faulty_report  # needs Triton

    return make_faulty_report(tmp_path_factory.mktemp("report"))


@pytest.fixture
def ordered_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter sum each row of a product by itself, as the device does: see `order_products`."""
    order_products(monkeypatch.setattr)


def order_products(replace: Callable[..., None] = setattr) -> None:
    """The interpreter's own products are numpy's BLAS, which with AVX2 rounds a row by its place in the matrix."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def ordered_dot(self, a, b, acc, *rest):
        kind = acc.data.dtype
        product = np.einsum("ik,kn->in", a.data.astype(kind), b.data.astype(kind))
        return TensorHandle(product + acc.data, acc.dtype.scalar)

    replace(InterpreterBuilder, "create_dot", ordered_dot)


def assert_states_close(got: torch.Tensor, want: torch.Tensor, atol: float, rtol: float = 0.0, what: str = "") -> None:
    """Equal within atol + rtol * |want|; the failure names the worst element, its position and both values."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if not got.numel():
        return
    got64, want64 = got.double().cpu(), want.double().cpu()
    assert torch.equal(got64.isnan(), want64.isnan()), f"{what}: NaN in different places"
    error = (got64 - want64).abs().nan_to_num(0)
    excess = error - (atol + rtol * want64.abs().nan_to_num(0))
    worst = int(excess.argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    assert excess.flatten()[worst] <= 0, (
        f"{what}: {int((excess > 0).sum())} of {error.numel()} elements differ; worst at {place}: "
        f"got {got64[place]:.9g}, want {want64[place]:.9g}, error {error[place]:.3g} (atol {atol:g}, rtol {rtol:g})"
    )


def call(monkeypatch, capsys, *args: object) -> tuple[int, str, str]:
    """Run the program in this process, which spares the start of torch: (exit status, output, errors)."""
    monkeypatch.setattr(sys, "argv", ["kaleido-fast", *map(str, args)])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err
