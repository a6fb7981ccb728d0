"""The values that loops carry, before and after Triton's GPU passes. Plain Python, no Triton.

A pass that takes a carried value for dead puts its first value in its place. Every round then computes with what held
before the first one. No check of Triton's own sees that, and the interpreter runs none of these passes.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

NAME = re.compile(r"%[\w.$-]+(?:#\d+)?")
RESULT = r"%[\w.$-]+(?::\d+)?"
Value = int
"""A value's number: names are used again in sibling regions."""


@dataclass(frozen=True)
class Carried:
    """A carried value: what a round sees, what the first one gets, what a round hands on, what is left; its type."""

    seen: Value
    first: Value
    after: Value
    left: Value
    kind: str


@dataclass
class Loop:
    """A loop: its place in the source, what it carries, and what decides on its rounds (bounds or condition)."""

    place: str = ""
    carried: list[Carried] = field(default_factory=list)
    controls: list[Value] = field(default_factory=list)


@dataclass
class Dataflow:
    """What the values of a function are made from.

    Args:
        sources: for each value those that it is computed from; () for arguments and constants.
        loops: in the order in which they end.
        branches: (place, condition) of each ``scf.if``.
        effects: operands of what acts on memory or on other threads, and what decides on its happening: conditions
            and bounds of the branches and loops around it.
        constants: the integers among the values.
    """

    sources: list[tuple[Value, ...]] = field(default_factory=list)
    loops: list[Loop] = field(default_factory=list)
    branches: list[tuple[str, Value]] = field(default_factory=list)
    effects: list[Value] = field(default_factory=list)
    constants: dict[Value, int] = field(default_factory=dict)

    def rounds(self, loop: Loop) -> int | None:
        """How often a loop runs; None where that is not known before it does."""
        bounds = [self.constants.get(value) for value in loop.controls]
        if len(bounds) != 3 or bounds[0] is None or bounds[1] is None or not bounds[2]:
            return None
        return len(range(bounds[0], bounds[1], bounds[2]))

    def reach(self, values: Iterable[Value]) -> set[Value]:
        """All that ``values`` are made from, earlier rounds of loops included."""
        seen: set[Value] = set()
        waiting = list(values)
        while waiting:
            value = waiting.pop()
            if value not in seen:
                seen.add(value)
                waiting += self.sources[value]
        return seen

    def carried_by(self, values: Iterable[Value]) -> Counter[tuple[str, str]]:
        """How many carried scalars ``values`` are made from, by (place of the loop, type)."""
        reached = self.reach(values)
        found = [(loop.place, item.kind) for loop in self.loops for item in loop.carried if item.seen in reached]
        return Counter(key for key in found if "<" not in key[1])

    def live(self) -> set[Value]:
        """What an effect, or whether and how often it happens, is made from."""
        return self.reach(self.effects)


@dataclass
class _Region:
    """An operation with regions that is being read."""

    name: str
    operands: list[Value]
    results: list[Value]
    firsts: list[Value] = field(default_factory=list)
    seen: list[Value] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    forwarded: list[Value] = field(default_factory=list)
    yields: list[list[Value]] = field(default_factory=list)
    acts: bool = False


class _Reader:
    """Reads a module's text line by line: one operation a line, braces at the ends of lines."""

    def __init__(self, text: str) -> None:
        self.flow = Dataflow()
        self.scopes: list[dict[str, Value]] = [{}]
        self.regions: list[_Region] = []
        self.places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.MULTILINE))
        for line in text.splitlines():
            self._read(line.strip())

    def _read(self, line: str) -> None:
        if line.startswith("}"):
            self._leave(line)
        elif line.startswith("^"):
            self._enter_block(line)
        elif line.endswith("{"):
            self._open(line)
        elif not line.startswith(("#", "module", "//")) and line:
            self._operate(line.partition(" loc(")[0])

    def _open(self, line: str) -> None:
        """A line that ends with the opening of an operation's first region."""
        head = line.partition(" = ")[2] if line.startswith("%") else line
        name = head.split(" ", 1)[0].split("(")[0].strip('"')
        region = _Region(name, [], self._define_results(line))
        self.scopes.append({})
        self.regions.append(region)
        if name == "tt.func" or name.startswith("partition"):  # a partition's arguments are what it was given
            for argument in re.findall(r"(%[\w.$-]+): ", line):
                self._define(argument)
        elif name in ("scf.for", "scf.while"):
            self._open_loop(region, line)
        else:
            region.operands = self._values(head)

    def _open_loop(self, region: _Region, line: str) -> None:
        inside = line.partition("iter_args" if region.name == "scf.for" else "scf.while")[2]
        pairs = re.findall(r"(%[\w.$-]+) = (%[\w.$#-]+)", inside.partition(")")[0])
        region.firsts = self._values(" ".join(first for _, first in pairs))
        types = re.search(r"-> \((.*)\) +: \w+ \{$" if region.name == "scf.for" else r"\) : \((.*)\) -> ", inside)
        region.kinds = [_without_layout(kind) for kind in _split(types[1])] if types else []
        if region.name == "scf.for":
            bounds = re.search(r"scf\.for (?:unsigned )?(\S+) = (\S+) to (\S+) step (\S+)", line)
            assert bounds, line
            region.operands = self._values(" ".join(bounds.groups()[1:]))
            self._define(bounds[1], region.operands)
        region.seen = [self._define(name) for name, _ in pairs]

    def _enter_block(self, line: str) -> None:
        """Arguments of a block: behind a ``scf.while``'s condition what it forwards, else made from the operands."""
        region = self.regions[-1]
        for place, argument in enumerate(re.findall(r"(%[\w.$-]+): ", line)):
            forwarded = region.name == "scf.while" and place < len(region.forwarded)
            self._define(argument, [region.forwarded[place]] if forwarded else region.operands)

    def _operate(self, code: str) -> None:
        """An operation without regions."""
        named, _, rest = code.partition(" = ") if code.startswith("%") else ("", "", code)
        operands = self._values(rest)
        if rest.startswith("scf.condition"):
            self.regions[-1].operands, self.regions[-1].forwarded = operands[:1], operands[1:]
        elif re.match(r"[\w.]*\.(yield|return)\b", rest) and not rest.startswith("tt.return"):
            self.regions[-1].yields.append(operands)
        else:
            number = re.match(r"arith\.constant (-?\d+) : i\d+$", rest)
            for result in self._define_results(code) if named else []:
                self.flow.sources[result] = tuple(operands)
                if number:
                    self.flow.constants[result] = int(number[1])
                elif rest.startswith("arith.bitcast") and operands[0] in self.flow.constants:
                    self.flow.constants[result] = self.flow.constants[operands[0]]
            if not named or any(word in rest for word in ("atomic", "async", "pure = false")):
                self.flow.effects += operands
                for region in self.regions:
                    region.acts = True

    def _leave(self, line: str) -> None:
        """The end of a region, and of its operation unless another region follows."""
        self.scopes.pop()
        if line.endswith("{"):
            self.scopes.append({})
            return
        if not self.regions:  # of the module
            return
        region = self.regions.pop()
        place = self._place(line.rpartition(" loc(")[2].removesuffix(")"))
        sources = self.flow.sources
        self.flow.effects += region.operands if region.acts else []
        if region.name in ("scf.for", "scf.while"):
            after = region.yields[-1] if region.yields else []
            values = (region.seen, region.firsts, after, region.results, region.kinds)
            loop = Loop(place, [Carried(*item) for item in zip(*values, strict=True)], region.operands)
            for number, item in enumerate(loop.carried):
                sources[item.seen] = (item.first, item.after)
                last = (item.first, item.after) if region.name == "scf.for" else (region.forwarded[number],)
                sources[item.left] = (*last, *region.operands)
            self.flow.loops.append(loop)
            return
        if region.name == "scf.if":
            self.flow.branches.append((place, region.operands[0]))
        for number, result in enumerate(region.results):
            sources[result] = (*region.operands, *(given[number] for given in region.yields if number < len(given)))

    def _define(self, name: str, sources: Iterable[Value] = ()) -> Value:
        self.flow.sources.append(tuple(sources))
        self.scopes[-1][name] = len(self.flow.sources) - 1
        return self.scopes[-1][name]

    def _define_results(self, line: str) -> list[Value]:
        """Values that a line defines: one name, one for several (``%x:2``), or several (``%low, %high``)."""
        found = re.match(rf"({RESULT}(?:, {RESULT})*) = ", line)
        names: list[str] = []
        for name in found[1].split(", ") if found else []:
            base, _, several = name.partition(":")
            names += [f"{base}#{number}" for number in range(int(several))] if several else [base]
        return [self._define(name) for name in names]

    def _values(self, text: str) -> list[Value]:
        found = []
        for name in NAME.findall(text):
            scope = next((scope for scope in reversed(self.scopes) if name in scope), None)
            if scope is not None:  # else no value but a register's name in inline assembly
                found.append(scope[name])
        return found

    def _place(self, location: str) -> str:
        """File, line and column of a location, those of its callers behind it; the names given to values left out."""
        if location in self.places:
            return self._place(self.places[location])
        named = re.fullmatch(r'"[^"]*"\((.*)\)', location)
        call = re.fullmatch(r"callsite\((.*) at (.*)\)", location)
        if named:
            return self._place(named[1])
        if call:
            return f"{self._place(call[1])} from {self._place(call[2])}"
        return location.rpartition("/")[2].replace('"', "")


def read_dataflow(text: str) -> Dataflow:
    """The dataflow of a module, as Triton prints it; several functions are parts that nothing leads into."""
    return _Reader(text).flow


def lost_values(before: str, after: str) -> list[str]:
    """What loops carried before the GPU passes and no longer carry after them, one line each.

    Args:
        before: Triton IR (``ttir``). Of a Gluon kernel its own IR, whose functions the passes inline: loops are then
            matched by their own place, whoever calls them, and every copy of a loop must carry what it did.
        after: the same kernel after the GPU passes (``ttgir``).
    """
    old, new = read_dataflow(before), read_dataflow(after)
    inlined = "tt.call " in before
    if inlined:
        for flow in (old, new):
            flow.loops = [replace(loop, place=_own(loop.place)) for loop in flow.loops]
            flow.branches = [(_own(place), value) for place, value in flow.branches]
    return [*_lost_from_loops(old, new, inlined), *_lost_from_controls(old, new)]


def _own(place: str) -> str:
    return place.partition(" from ")[0]


def _lost_from_loops(old: Dataflow, new: Dataflow, inlined: bool = False) -> list[str]:
    """Loops that carry fewer values of a type than before, of those that a round reads or that are used afterwards."""
    found = []
    live, now = old.live(), new.live()
    kept: dict[str, list[Counter[str]]] = defaultdict(list)
    asked: dict[str, list[Counter[str]]] = defaultdict(list)
    for loop in new.loops:
        kept[loop.place].append(Counter(use for item in loop.carried for use in _uses(item, now)))
    for loop in old.loops:
        changing = {(item.first, use) for item in loop.carried for use in _uses(item, live) if _changes(item)}
        wanted = Counter(use for _, use in changing)
        asked[loop.place].append(wanted)
        if wanted and loop.place not in kept:
            short = inlined and (old.rounds(loop) or 0) <= 1 and old.rounds(loop) is not None
            found += [] if short else [f"{loop.place}: the loop has gone"]
        elif missing := min((wanted - carried for carried in kept[loop.place]), key=Counter.total, default=Counter()):
            found.append(f"{loop.place}: carries no more: {_listed(missing)}")
    if inlined and not found:
        # One function may have become several, and be inlined often: no copy may carry less than all of them did.
        for place, copies in kept.items():
            least = [
                min((wanted - each for wanted in asked[place]), key=Counter.total, default=Counter()) for each in copies
            ]
            found += [f"{place}: a copy carries no more: {_listed(missing)}" for missing in least if missing]
    return found


def _changes(item: Carried) -> bool:
    return item.after not in (item.seen, item.first)


def _uses(item: Carried, live: set[Value]) -> list[str]:
    """The type of a carried value once for each use: by a round, and after the loop."""
    uses = ((item.seen, f"{item.kind} read by a round"), (item.left, f"{item.kind} used afterwards"))
    return [use for value, use in uses if value in live]


def _lost_from_controls(old: Dataflow, new: Dataflow) -> list[str]:
    """Bounds and conditions that are made from fewer carried scalars than before."""
    found = []
    now: dict[str, list[Counter[tuple[str, str]]]] = defaultdict(list)
    live = old.live()
    for place, values in _controls(new):
        now[place].append(new.carried_by(values))
    for place, values in _controls(old):
        if not live.issuperset(values):
            continue
        wanted = old.carried_by(values)
        lost = min((wanted - kept for kept in now[place]), key=Counter.total, default=Counter())
        if lost:
            found.append(f"{place}: no longer made from {_listed(Counter({kind: n for (_, kind), n in lost.items()}))}")
    return found


def _controls(flow: Dataflow) -> list[tuple[str, list[Value]]]:
    loops = [(loop.place, loop.controls) for loop in flow.loops]
    return loops + [(place, [value]) for place, value in flow.branches]


def _listed(values: Counter[str]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in sorted(values.items()))


def _without_layout(kind: str) -> str:
    """A type without the layout of its elements, which the GPU passes choose."""
    return kind.partition(", #")[0] + ">" if ", #" in kind else kind


def _split(types: str) -> list[str]:
    """Types that commas part, but not those within <>."""
    parts, depth = [""], 0
    for letter in types:
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]
