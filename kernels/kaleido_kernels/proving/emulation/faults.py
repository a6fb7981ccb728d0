"""Faults planted in the PTX of a warp-specialised kernel, each of which a sound check must see.

A kernel whose partitions work together in shared memory is right only if every wait, arrival, fence and count is there,
and registers are given back. `planted` takes them away one by one. A test runs each fault in the emulator under every
order of `block.ORDERS` and asserts that something shows: a refusal, or a wrong result. A fault may show in one order
only; some do not matter, since something else does the same, and a test lists those by name and says why.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

Found = re.Match[str]
WAIT = r"(?P<rest>mbarrier\.try_wait\.\S+\s+(?P<done>[%\w]+),\s*\[[^\]]*\],\s*)(?P<parity>[%\w]+)\s*;"
ARRIVAL = r"(?P<guard>@!?%\w+\s+)?(?P<rest>mbarrier\.arrive\.(?!expect_tx)[^;]*;)"
EXPECTED = r"(?P<rest>mbarrier\.arrive\.expect_tx[^;]*,\s*)(?P<n_bytes>\d+)\s*;"
COUNT = r"(?P<rest>mbarrier\.init\.[^;]*,\s*)(?P<count>\d+)\s*;"
COPY = r"(?P<guard>@!?%\w+\s+)?(?P<rest>cp\.async\.bulk\.tensor[^;]*;)"
PRODUCTS = r"(?P<rest>wgmma\.wait_group\.sync\.aligned\s+)(?P<keep>\d+)\s*;"
RELEASE = r"setmaxnreg\.dec\.sync\.aligned\.u32\s+\d+\s*;"
FENCE = r"fence\.proxy\.async(?P<where>\.[\w:.]+)?\s*;"
BARRIER = r"bar\.sync\s+\d+\s*,\s*\d+\s*;"
"""Of some of a block's threads: the barriers of a partition."""
NEXT = re.compile(r"(?<![.\w])(bar\.sync|bra|ld|st|stmatrix|fence|wgmma|mbarrier)\.\w*\.?")
"""What an instruction between a barrier and an arrival would show that the barrier is for something else."""
LINE = re.compile(r"^\s*\.loc\b[^\n]*//\s*(\S+?:\d+)", re.M)


def planted(text: str) -> Iterator[tuple[str, str]]:
    """Name and changed PTX of each fault, in an order that depends on ``text`` alone.

    A name says what is wrong, the instruction's number among its like, and the line of the kernel's source. Fences and
    barriers of partitions are left out all at once, since compilers put some that others double; see `left_out_singly`.
    """
    yield from _each(text, WAIT, "passes at once", lambda found: f"setp.eq.u32 {found['done']}, 0, 0;")
    yield from _each(text, WAIT, "is for the other phase", _other_phase)
    yield from _each(text, ARRIVAL, "is left out", _nothing)
    yield from _each(text, ARRIVAL, "is by every thread", lambda found: found["rest"])
    yield from _each(text, COPY, "is left out", _nothing)
    yield from _each(text, COPY, "is by every thread", lambda found: found["rest"])
    yield from _each(text, EXPECTED, "is half of it", lambda found: f"{found['rest']}{int(found['n_bytes']) // 2};")
    yield from _each(text, EXPECTED, "is twice that", lambda found: f"{found['rest']}{int(found['n_bytes']) * 2};")
    yield from _each(text, COUNT, "is one less", _one_arrival_less)
    yield from _each(text, COUNT, "is one more", lambda found: f"{found['rest']}{int(found['count']) + 1};")
    yield from _each(
        text, PRODUCTS, "is for one product less", lambda found: f"{found['rest']}{int(found['keep']) + 1};"
    )
    yield from _each(text, RELEASE, "is left out", _nothing_unless_repeated)
    for where in sorted({found["where"] or "" for found in re.finditer(FENCE, text)}):
        yield f"every fence.proxy.async{where} is left out", re.sub(FENCE, _nothing_if(where), text)
    if re.search(BARRIER, text):
        yield "every barrier of a partition is left out", re.sub(BARRIER, "", text)
        yield "every barrier that is not for an arrival is left out", re.sub(BARRIER, _nothing_before_others, text)


def left_out_singly(text: str) -> Iterator[tuple[str, str]]:
    """Name and changed PTX for each proxy fence and each barrier of a partition that is left out alone.

    Not all of them can be seen: what another one doubles is not missed.
    """
    yield from _each(text, FENCE, "is left out", _nothing)
    yield from _each(text, BARRIER, "is left out", _nothing)


WHAT = {
    WAIT: "wait",
    ARRIVAL: "arrival",
    COPY: "copy",
    EXPECTED: "number of expected bytes",
    COUNT: "count of an mbarrier",
    PRODUCTS: "wait for products",
    RELEASE: "release of registers",
    FENCE: "fence",
    BARRIER: "barrier",
}
"""Pattern -> how a name calls what it finds."""


def _each(text: str, pattern: str, how: str, change: Callable[[Found], str | None]) -> Iterator[tuple[str, str]]:
    """One fault for each place that the pattern is found at, unless ``change`` has none for it."""
    places = list(re.finditer(pattern, text))
    for number, found in enumerate(places, 1):
        changed = change(found)
        if changed is not None and changed != found[0]:
            lines = LINE.findall(text, 0, found.start())
            at = f" ({lines[-1]})" if lines else ""
            name = f"{WHAT[pattern]} {number} of {len(places)}{at} {how}"
            yield name, text[: found.start()] + changed + text[found.end() :]


def _nothing(found: Found) -> str:
    return ""


def _nothing_if(where: str) -> Callable[[Found], str]:
    return lambda found: "" if (found["where"] or "") == where else found[0]


def _nothing_before_others(found: Found) -> str:
    after = NEXT.search(found.string, found.end())
    return found[0] if after and after[0] == "mbarrier.arrive." else ""


def _nothing_unless_repeated(found: Found) -> str | None:
    """A release that the first instruction after it repeats, where a branch leads, changes nothing: Triton's partitions
    end so."""
    branch = re.match(r"\s*bra(?:\.uni)?\s+([$\w]+)\s*;", found.string[found.end() :])
    label = re.search(rf"^{re.escape(branch[1])}:", found.string, re.M) if branch else None
    if label and re.match(rf"(?:\s|//.*|\.loc.*)*{re.escape(found[0])}", found.string[label.end() :]):
        return None
    return ""


def _other_phase(found: Found) -> str:
    return "{\n.reg .b32 other;\n" + f"xor.b32 other, {found['parity']}, 1;\n{found['rest']}other;" + "\n}"


def _one_arrival_less(found: Found) -> str | None:
    count = int(found["count"]) - 1
    return f"{found['rest']}{count};" if count else None
