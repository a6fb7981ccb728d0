"""The onchip kernel in the emulator: the same bits in every order of its warps, and every fault that is planted shows.

Its partitions work together through barriers in shared memory. A wait, an arrival or a fence that is missing may do no
harm for a thousand runs on a GPU; here it shows in one order or another.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("triton")

from kernel_oracle import (
    OPERANDS,
    assert_agree,
    empty_outputs,
    filled,
    halted_by_hand,
    random_net,
    sample,
    single_steps,
)

from kaleido_kernels.launch import LaunchRequest, Outputs
from kaleido_kernels.onchip.pack import allocate_scratch, pack_onchip
from kaleido_kernels.onchip.plan import OnchipTile, onchip_layout
from kaleido_kernels.proving.emulation.block import ORDERS
from kaleido_kernels.proving.emulation.driver import Emulator, emulated
from kaleido_kernels.proving.emulation.errors import EmulatorError
from kaleido_kernels.proving.emulation.faults import planted
from kaleido_kernels.schedule import Checks, Schedule
from kaleido_kernels.shapes import NetShape

pytestmark = pytest.mark.emulated

TWO_STEPS = Schedule(burn_in=1)


@dataclass(frozen=True)
class Form:
    """A tile with a small network that takes it, what is asked of it, and how many programs share the chains."""

    tile: OnchipTile
    shape: NetShape
    schedule: Schedule = TWO_STEPS
    precision: str = "fp16"
    n_chains: int = 150
    programs: int = 2

    @property
    def request(self) -> LaunchRequest:
        """Chain ids cross 2**32: their upper halves must be carried too."""
        return LaunchRequest(self.n_chains, self.schedule, seed=2**63 + 5, first_chain=2**32 - 40)


JITTER = Schedule(burn_in=1, n_draws=2, thin=1, settle=0, jitter=0.3, noise="normal")
FLOW = Schedule.flow(2, 2, 0.9, 0.2)
FORMS = {
    "one chunk": Form(OnchipTile(3), NetShape((7, 37, 17, 7)), Schedule(n_draws=2), n_chains=300),
    "in place": Form(OnchipTile(3), NetShape((7, 133, 70, 133, 7))),
    "in turns of several slots": Form(OnchipTile(4, 64, True), NetShape((100, 256, 200, 100))),
    "two chunks, normal jitter": Form(OnchipTile(3), NetShape((100, 133, 100), "silu"), JITTER),
    "128 chains a group": Form(OnchipTile(3, 128), NetShape((20, 100, 90, 20)), n_chains=300, programs=1),
    "groups in turns": Form(OnchipTile(3, 128, True), NetShape((20, 100, 90, 20)), n_chains=300, programs=1),
    "through memory": Form(OnchipTile(3), NetShape((150, 130, 150)), n_chains=270),
    "two halves": Form(OnchipTile(3), NetShape((20, 300, 270, 20))),
    "two halves through memory": Form(OnchipTile(2), NetShape((150, 300, 150))),
    "split fp32": Form(OnchipTile(3), NetShape((7, 37, 17, 7)), Schedule(burn_in=2), "fp32"),
    "a flow in place": Form(OnchipTile(3), NetShape((7, 133, 70, 133, 7)), FLOW),
    "a flow in registers": Form(OnchipTile(3, 128, True), NetShape((70, 100, 70)), FLOW, n_chains=270),
    "a flow through memory": Form(OnchipTile(3), NetShape((150, 130, 150)), FLOW),
}
TOLERANCES = {"fp32": (6e-6, 1e-5), "fp16": (8e-3, 0.0)}
"""After two or three steps of networks of `random_net`."""


def launched(form: Form, request: LaunchRequest) -> Outputs:
    """A launch whose outputs and scratch begin as NaN: a value that is read before it is written shows."""
    from kaleido_kernels.onchip.kernel import launch_onchip

    packed = pack_onchip(random_net(form.shape), form.shape, form.tile, form.precision)
    scratch = allocate_scratch(packed, form.programs)
    scratch.inputs.fill_(float("nan"))
    scratch.state.fill_(float("nan"))
    outputs = empty_outputs(request, form.shape)
    launch_onchip(packed, request, outputs, scratch)
    return outputs


def run(form: Form, emulator: Emulator, request: LaunchRequest | None = None) -> Outputs:
    with emulated(emulator):
        return launched(form, request or form.request)


def bits(outputs: Outputs) -> list[torch.Tensor]:
    """Everything that a launch writes, so that NaN equals NaN."""
    return [tensor.view(torch.int32) for tensor in filled(outputs) if tensor is not None]


def are_same(got: Outputs, want: Outputs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bits(got), bits(want), strict=True))


def orders_that_differ(form: Form, orders: list[str], request: LaunchRequest, want: Outputs) -> list[str]:
    return [how for how in orders if not are_same(run(form, Emulator(ORDERS[how]), request), want)]


# ---- orders


QUICK_ORDERS = ["producer last, copies late", "producer between, second group first, copies at once", "by chance 1"]
QUICK = ["one chunk", "in turns of several slots", "through memory", "split fp32"]


def check_orders(name: str, orders: list[str]) -> None:
    form = FORMS[name]
    first, *others = orders
    got = run(form, Emulator(ORDERS[first]))
    want = sample(random_net(form.shape), form.shape, form.request, OPERANDS[form.precision])
    assert_agree(got, want, *TOLERANCES[form.precision], name)
    print(f"error {float((got.final - want.final).abs().max()):.1e}", end=" ")
    assert not orders_that_differ(form, others, form.request, got)


@pytest.mark.parametrize("name", QUICK)
def test_some_orders_give_the_same_right_states(name):
    check_orders(name, QUICK_ORDERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_every_order_gives_the_same_right_states(name):
    check_orders(name, list(ORDERS))


def test_numbers_of_the_first_launch_decide_no_type():
    """Later launches take the kernel that the first one compiled: where 32 bits did for a number then, 64 must now."""
    form = FORMS["one chunk"]
    want = sample(random_net(form.shape), form.shape, form.request, OPERANDS[form.precision])
    with emulated(Emulator()):
        launched(form, replace(form.request, seed=1, first_chain=0))
        assert_agree(launched(form, form.request), want, *TOLERANCES[form.precision], "the second launch")


# ---- checks


LEAVING = {
    "in registers": Form(OnchipTile(3), NetShape((7, 37, 17, 7)), n_chains=270),
    "in place": Form(OnchipTile(3), NetShape((7, 133, 70, 133, 7)), n_chains=270),
    "128 chains a group": Form(OnchipTile(3, 128), NetShape((20, 100, 20)), n_chains=530),
    "groups in turns": Form(OnchipTile(3, 128, True), NetShape((20, 100, 20)), n_chains=530),
    "through memory": Form(OnchipTile(3), NetShape((150, 130, 150)), n_chains=270),
}


@functools.cache
def leaving(name: str) -> tuple[LaunchRequest, Outputs]:
    """A request whose tiles end at different steps, and its result by definition.

    Six steps, with a check after the second, the fourth and the last. The first tile's chains halt at the second check,
    the third tile's, which fill less than one group, at the first one, and so do the second tile's, all but one in its
    second group. With two programs one of them goes on after a tile that it left early.
    """
    form = LEAVING[name]
    tile = form.tile.chains
    request = LaunchRequest(form.n_chains, Schedule(burn_in=39, thin=3), seed=1, run_steps=6)
    steps = single_steps(lambda *asked: run(form, Emulator(), asked[2]), random_net(form.shape), form.shape, request)
    saved = steps[2].final.clone()
    saved[2 * tile - 1] = float("inf")
    saved[:tile] = steps[4].final[:tile]
    checks = Checks(1e-6, 2, 2, torch.zeros(form.n_chains, dtype=torch.int32), saved)
    want = halted_by_hand(steps, checks)
    assert want.halt is not None
    halts = [set(part.tolist()) for part in want.halt.split(tile)]
    assert halts == [{-4}, {-2, 0}, {-2}], "each tile ends at a step of its own"
    return replace(request, checks=checks), want


def check_leaving(name: str, orders: list[str]) -> None:
    request, want = leaving(name)
    assert not orders_that_differ(LEAVING[name], orders, request, want)


@pytest.mark.parametrize("name", ["in registers", "in place"])
def test_tiles_that_end_apart_give_the_defined_states_in_some_orders(name):
    check_leaving(name, QUICK_ORDERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", LEAVING)
def test_tiles_that_end_apart_give_the_defined_states_in_every_order(name):
    check_leaving(name, list(ORDERS))


def test_tiles_whose_chains_have_halted_are_left():
    """Three tiles take 4, 6 and 2 of 6 steps."""
    request, _ = leaving("in place")
    assert request.checks is not None and request.checks.saved is not None
    nothing_saved = replace(request.checks, saved=torch.full_like(request.checks.saved, float("inf")))
    emulator = Emulator()
    for asked in (request, replace(request, checks=nothing_saved)):
        run(LEAVING["in place"], emulator, asked)
    early, late = (each.n_instructions for each in emulator.launches)
    assert 0.6 < early / late < 0.75, (early, late)


# ---- faults


FAULTY: dict[str, Callable[[], tuple[Form, LaunchRequest]]] = {
    "in registers": lambda: of_two_tiles(NetShape((70, 133, 133, 70))),
    "in turns": lambda: of_two_tiles(NetShape((70, 133, 133, 70)), in_turns=True),
    "in place": lambda: of_two_tiles(NetShape((70, 133, 70, 133, 70))),
    "through memory": lambda: of_two_tiles(NetShape((150, 130, 150))),
    "leaving early": lambda: (replace(LEAVING["in place"], programs=1), leaving("in place")[0]),
    "leaving early, in registers": lambda: (replace(LEAVING["in registers"], programs=1), leaving("in registers")[0]),
}
"""Small, and with all there is to go wrong: several tiles one after the other, sums over several slots."""
MBARRIERS = {"order": (7, 9), "ready": (8, 10), "agreed": (11,)}
"""Numbers of barriers among the eleven that `onchip_kernel` sets up; before these are two for each of three slots."""
UNUSED = {
    "in registers": ("order", "ready", "agreed"),
    "in turns": ("ready", "agreed"),
    "in place": ("order", "ready", "agreed"),
    "through memory": ("order", "agreed"),
    "leaving early": ("order", "ready"),
    "leaving early, in registers": ("order", "ready"),
}
RELEASES = re.compile(r"wgmma\.wait_group(?:(?!wgmma\.)[\s\S])*?mbarrier\.arrive\.(?!expect_tx)")
"""A wait for products, and an arrival that follows it before any other product."""
MOST_INSTRUCTIONS = 100_000
"""Of a block; without a fault it takes less than a third."""


def of_two_tiles(shape: NetShape, in_turns: bool = False) -> tuple[Form, LaunchRequest]:
    form = Form(OnchipTile(3, in_turns=in_turns), shape, n_chains=130, programs=1)
    return form, form.request


def lines_of(function: str) -> set[str]:
    """Lines of a function of `kaleido_kernels.onchip.products`, as names of faults have them."""
    from kaleido_kernels.onchip import products

    lines, first = inspect.getsourcelines(getattr(products, function).fn)
    return {f"products.py:{number}" for number in range(first, first + len(lines))}


def harmless_in_turns(text: str) -> set[str]:
    """What rightly does not show where groups take turns, the first group always with a slot before the second.

    To hand a turn over early is right and only slower. The first group need not wait for its turn where it needs slots
    that the second still has to give back; the second would hand over twice at a time. The second need not wait for a
    slot that the first one had; and a slot that the first one gives back early waits for the second.
    """
    named = [re.match(r"(wait.*) \((\S+)\)", fault) for fault, _ in planted(text)]
    waits = {each[1]: each[2] for each in named if each is not None}
    slots, turns = (
        [name for name, line in waits.items() if line in lines_of(f"await_{what}")] for what in ("full", "turn")
    )
    keeps = [int(found[1]) for found in re.finditer(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", text)]
    early = [f"wait for products {number} of {len(keeps)}" for number, keep in enumerate(keeps, 1) if keep > 0]
    handed = {name for name, line in waits.items() if line in lines_of("hand_turn")}
    return handed | {*turns[: len(turns) // 2], *slots[len(slots) // 2 :], *early[: len(early) // 2]}


def harmless(name: str, form: Form, text: str) -> set[str]:
    """Faults that rightly do not show, as their names begin.

    - A count is wrong of a barrier at which nobody waits in this form.
    - A sum's first wait for products, which has nothing to wait for, waits for one less: the first round of the loop of
      products releases no slot, and is made by the same function as the others.
    - With activations in registers nothing that threads stored is read by products or other threads: neither fences nor
      barriers matter but those before arrivals.
    - Where groups take turns, see `harmless_in_turns`.
    """
    unused = [number for each in UNUSED[name] for number in MBARRIERS[each]]
    waits = [found.start() for found in re.finditer(r"wgmma\.wait_group", text)]
    first = [number for number, start in enumerate(waits, 1) if not RELEASES.match(text, start)]
    found = {f"count of an mbarrier {number} of 11" for number in unused}
    found |= {f"wait for products {number} of {len(waits)}" for number in first}
    if onchip_layout(form.shape, form.tile, form.precision).held:
        found |= {"every barrier that is not for an arrival is left out"}
        found |= {"every fence.proxy.async.shared::cta is left out"}
    if form.tile.in_turns:
        found |= harmless_in_turns(text)
    return found


def first_shown(form: Form, request: LaunchRequest, text: str, want: Outputs, orders: Iterable[str]) -> str:
    """What shows when this PTX runs in place of the kernel's own, in the first order that shows it; nothing if all is
    right."""
    for how in orders:
        conditions = replace(ORDERS[how], most_instructions=MOST_INSTRUCTIONS)
        try:
            got = run(form, Emulator(conditions, change=lambda _: text), request)
        except EmulatorError as problem:
            return f"{how}: {type(problem).__name__}: {problem}"
        if not are_same(got, want):
            return f"{how}: wrong states"
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTY)
def test_every_planted_fault_shows_in_some_order(name):
    """One to two minutes for each form on a free core. What need not show is not tried in every order."""
    form, request = FAULTY[name]()
    texts: list[str] = []
    want = run(form, Emulator(change=lambda text: texts.append(text) or text), request)
    rightly = harmless(name, form, texts[0])
    found: dict[str, str] = {}
    hidden: set[str] = set()
    for fault, text in planted(texts[0]):
        begins = fault.split(" (")[0]
        found[fault] = first_shown(form, request, text, want, QUICK_ORDERS if begins in rightly else ORDERS)
        if not found[fault]:
            hidden.add(begins)
    late = [fault for fault, what in found.items() if what and not what.startswith(next(iter(ORDERS)))]
    print(f"{len(found)} faults, {len(late)} not in the first order, {len(hidden)} rightly never:", *late, sep="\n")
    assert len(found) > 80
    assert hidden == rightly
