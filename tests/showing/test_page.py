"""The page of chains, in a real browser."""

from __future__ import annotations

import json
import re

import pytest
import torch
from browser import browser_page, find_browser
from PIL import Image

from kaleido_fast import InputError, ModelSpec, Scaling
from kaleido_fast.showing.animation import places
from kaleido_fast.showing.page import page_html, write_page
from kaleido_fast.showing.states import Shown

PROGRAM = find_browser()
needs_browser = pytest.mark.skipif(PROGRAM is None, reason="no Chromium on the path")


def shown(shape: tuple[int, ...], chains: int = 6, steps: tuple[int, ...] = (0, 1, 2, 5), seed: int = 0) -> Shown:
    dim = int(torch.tensor(shape).prod())
    states = torch.rand(chains, len(steps), dim, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return Shown(states, steps, ModelSpec((dim, dim), sample_shape=shape), Scaling(), 40, "test")


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    """One browser for all tests."""
    with browser_page(PROGRAM, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def opened(tab, tmp_path):
    """Opens what is shown, and checks at the end that nothing was loaded and nothing went wrong."""

    def open_page(what: Shown, title: str = "Chains"):
        tab.requests.clear()
        tab.problems.clear()
        write_page(what, tmp_path / "page.html", title)
        tab.open(tmp_path / "page.html")
        return tab

    yield open_page
    loaded = [url for url in tab.requests if not url.startswith("data:")]
    assert loaded == [(tmp_path / "page.html").resolve().as_uri()], "the page loads something else"
    assert not tab.problems


def pixel(tab, canvas: str, x: int, y: int) -> tuple[int, int, int]:
    """Colour of a pixel of a canvas."""
    found = tab.run(
        f"Array.from(document.querySelector('{canvas}').getContext('2d').getImageData({x}, {y}, 1, 1).data)"
    )
    return tuple(found[:3])


def step_of(tab) -> int:
    return int(tab.run("document.body.dataset.step"))


@needs_browser
def test_the_slider_moves_over_the_steps(opened):
    tab = opened(shown((4, 4)))
    assert (step_of(tab), tab.run("document.querySelector('#label').textContent")) == (0, "start noise")
    tab.click_on("#slider", 0.999)
    assert (step_of(tab), tab.run("document.querySelector('#label').textContent")) == (5, "step 5")
    tab.run("document.querySelector('#slider').blur()")
    tab.press("ArrowLeft", 37)
    assert step_of(tab) == 2


@needs_browser
def test_play_runs_to_the_end_and_pause_stops(opened):
    tab = opened(shown((4, 4), steps=tuple(range(30))))
    tab.click_on("#play")
    assert tab.run("document.querySelector('#play').textContent") == "Pause"
    tab.wait("Number(document.body.dataset.step) >= 2")
    tab.click_on("#play")
    here = step_of(tab)
    assert here < 29
    tab.run("show(27)")
    tab.click_on("#play")
    tab.wait("document.body.dataset.step === '29'")
    tab.wait("document.querySelector('#play').textContent === 'Play'")


@needs_browser
@pytest.mark.parametrize("shape", [(4, 4), (5, 3, 3)])
def test_every_chain_stands_in_its_cell_with_its_colours(opened, shape):
    what = shown(shape)
    tab = opened(what)
    gap, scale, columns = (tab.run(name) for name in ("GAP", "scale", "columns"))
    width, height = tab.run("[cellWidth, cellHeight]")
    for frame in (0, 3):
        tab.run(f"show({frame})")
        for chain in range(6):
            x, y = chain % columns * width + gap, chain // columns * height + gap
            raw = ((what.states[chain, frame].reshape(shape)[0, 0] + 1) / 2 * 255).round().int().flatten().tolist()
            want = raw * 3 if len(raw) == 1 else raw
            got = pixel(tab, "#sheet", x + scale // 2, y + scale // 2)
            assert max(abs(a - b) for a, b in zip(got, want, strict=True)) <= 1, f"chain {chain}, frame {frame}"


@needs_browser
def test_a_click_follows_a_chain_and_another_lets_it_go(opened):
    tab = opened(shown((4, 4)))
    columns, rows = tab.run("columns"), 2
    tab.click_on("#sheet", 1.5 / columns, 0.5 / rows)
    assert tab.run("document.body.dataset.followed") == "41", "ids are absolute"
    assert not tab.run("document.querySelector('#now').hidden")
    assert "Chain 41" in tab.run("document.querySelector('#who').textContent")
    tab.click_on("#path", 0.95, 0.5)  # the row of its states: to the last step
    assert step_of(tab) == 5
    tab.click_on("#sheet", 1.5 / columns, 0.5 / rows)
    assert tab.run("document.body.dataset.followed === undefined")
    assert tab.run("document.querySelector('#now').hidden")


@needs_browser
@pytest.mark.parametrize("dim", [1, 2])
def test_points_are_followed_by_a_click_on_their_dot(opened, dim):
    what = shown((dim,))
    tab = opened(what)
    tab.run("show(2)")
    x, y = places(what)[4, 2].tolist()
    edge, side = tab.run("[EDGE, SIDE]")
    tab.click_on("#sheet", (edge + x * (side - 2 * edge)) / side, 1 - (edge + y * (side - 2 * edge)) / side)
    assert tab.run("document.body.dataset.followed") == "44"
    values = [float(part) for part in tab.run("document.querySelector('#where').textContent").split(",")]
    assert values == pytest.approx(what.states[4, 2].tolist(), abs=1e-3)


@needs_browser
def test_a_title_is_text_and_a_page_shows_in_a_screenshot(opened, tmp_path):
    tab = opened(shown((4, 4)), "<script>alert(1)</script> & {{facts}}")
    assert tab.run("document.querySelector('h1').textContent") == "<script>alert(1)</script> & {{facts}}"
    tab.screenshot(tmp_path / "page.png")
    assert len(Image.open(tmp_path / "page.png").convert("RGB").getcolors(1 << 20)) > 10


def test_a_page_is_one_file_that_names_no_other():
    text = page_html(shown((4, 4)), "Chains")
    assert not re.search(r"href|<link|<img|url\(|import|fetch|script src", text)
    assert "http" not in text
    facts = json.loads(re.search(r'<script id="facts" type="application/json">(.*?)</script>', text, re.DOTALL)[1])
    assert (facts["chains"], facts["steps"], facts["first"]) == (6, [0, 1, 2, 5], 40)


def test_the_same_states_make_the_same_page():
    assert page_html(shown((4, 4)), "a") == page_html(shown((4, 4)), "a")


def test_what_a_page_cannot_show_is_named():
    with pytest.raises(InputError, match="--shape"):
        page_html(shown((7,)), "Chains")
    many = Shown(torch.zeros(9000, 2, 4), (0, 1), ModelSpec((4, 4), sample_shape=(2, 2)), Scaling())
    with pytest.raises(InputError, match="at most 8000 chains"):
        page_html(many, "Chains")
