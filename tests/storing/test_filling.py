"""A store takes draws of one model alone, and notices one that changes while it is written."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from conftest import random_mlp
from stored_blocks import act_after, stop_after
from told_modules import RUN, Net, net
from torch import nn

from kaleido_fast import InputError, fast_sample, open_draws, sample_to
from kaleido_fast.errors import StreamInterruptedError
from kaleido_fast.modules.identity import identify


@pytest.mark.parametrize("name", ["a.zarr", "a.npy"])
@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("module", "change", "text"),
    [
        (net(seed=1), {}, "model_hash was"),
        (net(scale=2.0), {}, "model_hash was"),
        (net(), {"data_range": (-1.0, 0.5)}, r"data_range was \[-1.0, 1.0\], is now \[-1.0, 0.5\]"),
        (nn.Tanh(), {"dim": 4}, r"dim was 3, is now 4"),
        (random_mlp(3, 5, 3), {"dim": None, "data_range": None}, r"data_range was \[-1.0, 1.0\], is now None"),
    ],
    ids=["weights", "setting", "range", "dim", "mlp"],
)
def test_a_store_takes_draws_of_one_model_alone(tmp_path, name, finished, module, change, text):
    pytest.importorskip("zarr")
    path, run = tmp_path / name, {**RUN, "device": "cpu", "engine": "reference"}
    with contextlib.nullcontext() if finished else pytest.raises(StreamInterruptedError):
        sample_to(path, net(), **run, callback=None if finished else stop_after(4096))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(InputError, match=text):
        sample_to(path, module, **{**run, **change})
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    sample_to(path, net(), **run)
    want = fast_sample(net(), **{key: value for key, value in run.items() if key != "chunk_chains"})
    assert open_draws(path).record["model_hash"] == want.model_hash == identify(net()).digest


def through_a_closure(part: nn.Module) -> nn.Module:
    """A module that calls another one which no copy of it can reach."""
    module = nn.Identity()
    module.register_forward_hook(lambda _, inputs, output: part(output))
    return module


def test_weights_that_change_while_a_store_is_written_are_noticed(tmp_path):
    pytest.importorskip("zarr")
    part = net()
    change = act_after(8192, lambda: part.inner[0].weight.data.mul_(2))
    with pytest.raises(InputError, match=r"inner\.0\.weight of the model changed while it was sampled") as caught:
        sample_to(tmp_path / "a.zarr", through_a_closure(part), **RUN, device="cpu", callback=change)
    assert "\n" not in str(caught.value)
    result = sample_to(tmp_path / "a.zarr", through_a_closure(net()), **RUN, device="cpu")
    assert 0 < result.stats.new_chains < RUN["n_chains"], "blocks from before the change are kept"
    sample_to(tmp_path / "b.zarr", through_a_closure(net()), **RUN, device="cpu")
    assert torch.equal(open_draws(tmp_path / "a.zarr")[:], open_draws(tmp_path / "b.zarr")[:])


class TrainedMeanwhile(Net):
    """Changes between the moment when it is named and that when it is copied, as by a training beside."""

    def __deepcopy__(self, memo):
        with torch.no_grad():
            self.inner[0].weight.mul_(2)
        new = self.__class__.__new__(self.__class__)
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new


def test_a_store_never_names_another_model_than_that_which_was_copied(tmp_path):
    pytest.importorskip("zarr")
    module = net()
    module.__class__ = TrainedMeanwhile
    with pytest.raises(InputError, match="the model changed while the output was prepared"):
        sample_to(tmp_path / "a.zarr", module, **RUN, device="cpu")
    sample_to(tmp_path / "a.zarr", net(), **RUN, device="cpu", overwrite=True)


def test_a_module_that_is_trained_while_its_store_is_written_changes_nothing(tmp_path):
    pytest.importorskip("zarr")
    module = net()
    change = act_after(8192, lambda: module.inner[0].weight.data.mul_(2))
    sample_to(tmp_path / "a.zarr", module, **RUN, device="cpu", callback=change)
    sample_to(tmp_path / "b.zarr", net(), **RUN, device="cpu")
    assert not torch.equal(module.inner[0].weight, net().inner[0].weight)
    assert torch.equal(open_draws(tmp_path / "a.zarr")[:], open_draws(tmp_path / "b.zarr")[:])
