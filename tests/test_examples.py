"""The example programs do what they say."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_mlp
from PIL import Image

from kaleido_fast import (
    KaleidoMLP,
    ModelCard,
    ModelSpec,
    SamplingMemoryError,
    fast_sample,
    load_checkpoint,
    save_checkpoint,
)

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and annotations look it up
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested_and_explained():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"augment", "find_attractors", "same_start", "serve"}
    page = (EXAMPLES.parent / "docs" / "embedding.md").read_text()
    for name in names:
        assert f"examples/{name}.py" in page


# The loader.


def test_variations_keep_the_shape_and_range_and_can_be_repeated():
    augment = load("augment")
    model = load_checkpoint("digits").model
    vary = augment.Vary(model)
    images = fast_sample(model, n_chains=20, burn_in=9).final
    torch.manual_seed(1)
    first = vary(images, 3)
    torch.manual_seed(1)
    assert torch.equal(vary(images, 3), first)
    assert first.shape == images.shape and first.abs().max() <= 1
    assert not torch.equal(first, images)
    torch.manual_seed(1)
    compiled = torch.compile(vary, fullgraph=True, backend="aot_eager")(images, 3)
    assert torch.equal(compiled, first)


def test_the_loader_doubles_every_batch(capsys, monkeypatch):
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    augment = load("augment")
    data = torch.utils.data.TensorDataset(torch.rand(10, 64), torch.arange(10))
    loader = augment.AugmentedLoader(
        torch.utils.data.DataLoader(data, batch_size=4), augment.Vary(random_mlp(64, 8, 64))
    )
    sizes = [(len(images), labels.tolist()) for images, labels in loader]
    assert sizes == [(8, [0, 1, 2, 3] * 2), (8, [4, 5, 6, 7] * 2), (4, [8, 9] * 2)]
    monkeypatch.setattr(sys, "argv", ["augment.py", "--epochs", "3", "--splits", "1"])
    augment.main()
    assert re.findall(r"(\w+) variations: [\d.]+% right", capsys.readouterr().out) == ["without", "with"]


# The search.


def two_wells() -> KaleidoMLP:
    """tanh(3 x) in each of two dimensions: four attractors."""
    model = KaleidoMLP(ModelSpec((2, 2), bias=(False,)))
    with torch.no_grad():
        model.linears[0].weight.copy_(3 * torch.eye(2))
    return model.eval()


def test_the_search_finds_every_attractor_once_and_stops():
    search = load("find_attractors").Search(two_wells())
    assert search.unseen == 1.0
    new = [search.round(40) for _ in range(3)]
    assert new == [4, 0, 0]
    assert search.chains == 120 == int(search.counts.sum())
    assert search.unseen == 0.0
    whole = load("find_attractors").Search(two_wells())
    whole.round(120)
    assert sorted(whole.counts.tolist()) == sorted(search.counts.tolist()), "rounds are parts of one long run"


def test_the_search_runs_from_the_command_line(tmp_path, capsys, monkeypatch):
    out = tmp_path / "found.json"
    command = ["find_attractors.py", "--round", "100", "--rounds", "2", "--unseen", "0", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    load("find_attractors").main()
    assert capsys.readouterr().out.count("unseen") == 2
    found = json.loads(out.read_text())
    assert found["chains"] == 200
    assert len(found["counts"]) == len(found["states"]) and found["counts"] == sorted(found["counts"], reverse=True)


# One start.


@pytest.fixture
def trained(tmp_path):
    """Three models of one kind of picture, by the option that takes each."""
    paths = {}
    for seed, name in enumerate(("published", "attractors", "flow")):
        paths[name] = tmp_path / f"{name}.safetensors"
        card = ModelCard(name, sampling={"sampler": "flow"} if name == "flow" else {})
        save_checkpoint(paths[name], random_mlp(20, 9, 20, sample_shape=(4, 5), seed=seed), card)
    return paths


def test_rows_of_one_start_are_the_samplers_states(trained):
    same_start = load("same_start")
    models = same_start.load(trained)
    shown, states = same_start.follow(models, n_starts=3, steps=5, seed=5)
    assert (shown[0], shown[-1], states.shape) == (0, 5, (3, 4, len(shown), 20))
    start = states[:, 2, 0]
    flow = fast_sample(models["flow"], n_chains=3, seed=5, sampler="flow", steps=5)
    assert torch.equal(states[:, 2, -1], flow.final)
    for row, name in enumerate(("published", "attractors")):
        assert torch.equal(states[:, row, 0], start.clamp(-1, 1)), "the same noise, inside the range"
        with torch.no_grad():
            want = start.clamp(-1, 1)
            for _ in range(5):
                want = models[name].model(want)
            assert torch.allclose(states[:, row, -1], want, atol=1e-4), name
            assert torch.allclose(states[:, 3, 1], models["flow"].model(states[:, 2, 1]), atol=1e-6)


def test_the_picture_of_one_start_is_written_once(trained, tmp_path, monkeypatch, capsys):
    out = tmp_path / "same.png"
    options = [part for name, path in trained.items() for part in (f"--{name}", str(path))]
    command = ["same_start.py", *options, "--starts", "2", "--steps", "6", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    load("same_start").main()
    once = Image.open(out).size
    monkeypatch.setattr(sys, "argv", [*command[:-1], str(tmp_path / "three.png"), "--starts", "3"])
    load("same_start").main()
    assert Image.open(tmp_path / "three.png").height > 1.4 * once[1], "a group of rows for each start"
    other = tmp_path / "other.safetensors"
    save_checkpoint(other, random_mlp(16, 9, 16, sample_shape=(4, 4)), ModelCard("other"))
    for more, text in (
        (command[1:], "is there already"),
        ([*command[1:-1], "b.png", "--flow", str(other)], "same data"),
    ):
        monkeypatch.setattr(sys, "argv", ["same_start.py", *more])
        with pytest.raises(SystemExit) as ended:
            load("same_start").main()
        assert ended.value.code == 2
        assert text in capsys.readouterr().err


# The service.


@pytest.fixture(scope="module")
def service():
    serve = load("serve")
    sampler = serve.Sampler(load_checkpoint("digits"), most=64 * 500)
    with serve.Server(("127.0.0.1", 0), sampler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as response:
        return response.read()


def test_requests_at_once_have_the_answers_of_fast_sample(service):
    queries = {seed: f"{service}/sample?n_chains={seed + 1}&seed={seed}&n_draws=2" for seed in range(8)}
    answers: dict[int, np.ndarray] = {}

    def ask(seed: int) -> None:
        answers[seed] = np.load(io.BytesIO(get(queries[seed])))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in queries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in queries:
        want = fast_sample("digits", n_chains=seed + 1, seed=seed, n_draws=2).draws.numpy()
        assert np.array_equal(answers[seed], want)


def test_the_service_draws_pictures_and_says_that_it_lives(service):
    assert get(f"{service}/picture?n_chains=9").startswith(b"\x89PNG")
    assert json.loads(get(f"{service}/health"))["model"] == load_checkpoint("digits").card.name


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/sample?n_chains=0", 400, "n_chains is 0"),
        ("/sample?n_chains=many", 400, "n_chains is 'many'"),
        ("/sample?moon=1", 400, "unknown option 'moon'"),
        ("/sample?n_chains=501", 400, "at most 32,000"),
        ("/sample?n_chains=1&steps=0", 400, "steps is 0"),
        ("/sample?n_chains=1&jitter=0.5", 400, "jitter 0.5 with sampler 'flow'"),
        ("/sample?n_chains=1&sampler=kaleidoscope&jitter=nan", 400, "jitter is nan"),
        ("/elsewhere", 404, "known are"),
    ],
)
def test_bad_requests_are_answered_in_one_line(service, path, status, text):
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(service + path)
    body = caught.value.read().decode()
    assert (caught.value.code, body.count("\n")) == (status, 1)
    assert text in body


def test_the_service_tries_smaller_blocks_where_memory_runs_out(monkeypatch):
    serve = load("serve")
    blocks = []

    def starved(_model, *, block_chains, **_options):
        blocks.append(block_chains)
        if block_chains != 1:
            raise SamplingMemoryError("out of memory", block_chains=1 if block_chains else 4)
        return "answer"

    monkeypatch.setattr(serve, "fast_sample", starved)
    sampler = serve.Sampler(load_checkpoint("digits"))
    assert sampler.sample({"n_chains": "8"}) == "answer"
    assert blocks == [None, 4, 1]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
def test_the_service_runs_from_the_command_line_until_ctrl_c():
    command = [sys.executable, str(EXAMPLES / "serve.py"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert np.load(io.BytesIO(get(url))).shape == (16, 1, 64)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "stopped\n", "")
