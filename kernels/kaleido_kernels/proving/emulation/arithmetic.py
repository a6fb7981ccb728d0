"""Instructions that make a value from values: integers, floating point, comparison, logic, conversion.

Each rule has the forms that it covers, modifiers included, and a function from an instruction to (what is computed,
types of the sources, type of the result). Results of ``.approx`` instructions are exact but for tanh, whose 11 bits
matter; fma is rounded by way of fp64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kaleido_kernels.proving.emulation.conversion import Compute, Form, converted
from kaleido_kernels.proving.emulation.kinds import (
    F32,
    KINDS,
    U32,
    U64,
    Array,
    Kind,
    flushed,
    held,
)
from kaleido_kernels.proving.emulation.ptx import Immediate, Instruction, Pair
from kaleido_kernels.proving.emulation.threads import Mask
from kaleido_kernels.proving.emulation.warps import Handler, Rule, Warps, kind_of

INTEGER = "Integer Arithmetic Instructions"
FLOAT = "Floating Point Instructions"
LOGIC = "Logic and Shift Instructions"
COMPARE = "Comparison and Selection Instructions"
PRED = KINDS["pred"]
INT = r"[su](16|32|64)"
BITS = r"b(16|32|64)"


def pure(section: str, forms: str, form_of: Callable[[Instruction], Form]) -> Rule:
    """A rule for an instruction whose result depends on its sources alone."""

    def build(warps: Warps, instruction: Instruction) -> Handler:
        compute, kinds, result = form_of(instruction)
        to, *operands = instruction.operands
        sources = [warps.typed(operand, kind) for operand, kind in zip(operands, kinds, strict=True)]
        put = warps.target(to, result.width)
        if len(sources) == 1:
            (a,) = sources
            return lambda mask: put(held(compute(a()), result), mask)
        if len(sources) == 2:
            a, b = sources
            return lambda mask: put(held(compute(a(), b()), result), mask)
        return lambda mask: put(held(compute(*[source() for source in sources]), result), mask)

    return Rule(section, forms, build)


def same(compute_of: Callable[[Instruction, Kind], Compute], n_sources: int) -> Callable[[Instruction], Form]:
    """Sources and result of the type of the last modifier, with ``.ftz`` where it is asked for."""

    def form(instruction: Instruction) -> Form:
        kind = kind_of(instruction)
        return _modified(instruction, compute_of(instruction, kind)), (kind,) * n_sources, kind

    return form


def _modified(instruction: Instruction, compute: Compute) -> Compute:
    if "ftz" not in instruction.parts:
        return compute
    return lambda *values: flushed(compute(*[flushed(value) for value in values]))


def plain(compute: Compute, n_sources: int = 2) -> Callable[[Instruction], Form]:
    """`same` for what is computed alike for every type."""
    return same(lambda instruction, kind: compute, n_sources)


# ---- integer and floating-point arithmetic


def fused(instruction: Instruction) -> Form:
    """fma: the product is exact in fp64, the sum rounded twice (seldom otherwise than once)."""
    kind = kind_of(instruction)

    def compute(a: Array, b: Array, c: Array) -> Array:
        return (a.astype(np.float64) * b + c).astype(kind.seen)

    return _modified(instruction, compute), (kind,) * 3, kind


def product(instruction: Instruction) -> Form:
    """mul and mad of integers: the low half, the high half, or the whole."""
    kind, parts = kind_of(instruction), instruction.parts
    if kind.floating:
        return _modified(instruction, np.multiply), (kind,) * 2, kind
    mode = parts[1]
    adds = parts[0] == "mad"
    if mode == "lo":
        compute: Compute = (lambda a, b, c: a * b + c) if adds else np.multiply
        return compute, (kind,) * (3 if adds else 2), kind
    if mode == "wide":
        wide = KINDS[f"{kind.name[0]}{2 * kind.bits}"]

        def whole(a: Array, b: Array, *c: Array) -> Array:
            exact = a.astype(wide.seen) * b.astype(wide.seen)
            return exact + c[0] if c else exact

        return whole, (kind, kind, wide) if adds else (kind, kind), wide

    def high(a: Array, b: Array) -> Array:
        if kind.bits == 64:
            found = [(int(x) * int(y)) >> 64 & (2**64 - 1) for x, y in zip(a, b, strict=True)]
            return np.array(found, U64).view(kind.seen)
        wide = np.int64 if kind.name[0] == "s" else U64
        return ((a.astype(wide) * b.astype(wide)) >> wide(kind.bits)).astype(kind.seen)

    return high, (kind, kind), kind


def divided(instruction: Instruction) -> Form:
    """div and rem: integers are cut towards zero; what is divided by zero is unspecified, here by one."""
    kind, wants_rest = kind_of(instruction), instruction.name == "rem"
    if kind.floating:
        return _modified(instruction, np.divide), (kind, kind), kind

    def compute(a: Array, b: Array) -> Array:
        b = np.where(b == 0, b.dtype.type(1), b)
        rest = np.fmod(a, b)
        return rest if wants_rest else (a - rest) // b

    return compute, (kind, kind), kind


def extreme(instruction: Instruction) -> Form:
    """min and max: -0 is below +0; of floats the number where the other is NaN, or NaN with ``.NaN``."""
    kind, parts = kind_of(instruction), instruction.parts
    smaller = parts[0] == "min"
    if not kind.floating:
        return np.minimum if smaller else np.maximum, (kind, kind), kind
    if "NaN" in parts:
        choose: Compute = np.minimum if smaller else np.maximum
    else:
        choose = np.fmin if smaller else np.fmax

    def compute(a: Array, b: Array) -> Array:
        low_sign = np.signbit(a)
        equal = np.where(low_sign, a, b) if smaller else np.where(low_sign, b, a)
        return np.where(a == b, equal, choose(a, b))

    def by_size(a: Array, b: Array) -> Array:
        found = compute(np.abs(a), np.abs(b))
        return np.where(np.signbit(a) ^ np.signbit(b), -found, found)

    return _modified(instruction, by_size if "xorsign" in parts else compute), (kind, kind), kind


def approximate_tanh(values: Array) -> Array:
    """tanh.approx.f32: a relative error of up to 2^-11. Here the last bits are cut, which is as far off as allowed."""
    exact = np.ascontiguousarray(np.tanh(values.astype(np.float64)), dtype=F32)
    return np.where(np.isnan(exact), exact, (exact.view(U32) & U32(0xFFFFF000)).view(F32))


def in_double(function: Callable[[Array], Array]) -> Compute:
    """A function computed in fp64 and rounded."""
    return lambda values: function(values.astype(np.float64)).astype(values.dtype)


# ---- logic, shifts, pieces of words


def shifted(instruction: Instruction) -> Form:
    """shl and shr: amounts beyond the width give zeros, or the sign."""
    kind = kind_of(instruction)

    def compute(a: Array, amount: Array) -> Array:
        most = kind.bits - 1
        inside = np.minimum(amount, most).astype(a.dtype)
        if instruction.name == "shl":
            return np.where(amount > most, a.dtype.type(0), a << inside)
        found = a >> inside
        return found if kind.name[0] == "s" else np.where(amount > most, a.dtype.type(0), found)

    return compute, (kind, KINDS["u32"]), kind


def funnel(instruction: Instruction) -> Form:
    """shf: 32 bits out of 64, from some bit on."""
    left = instruction.parts[1] == "l"

    def compute(low: Array, high: Array, amount: Array) -> Array:
        both, by = low.astype(U64) | high.astype(U64) << U64(32), (amount & U32(31)).astype(U64)
        return ((both << by) >> U64(32) if left else both >> by).astype(U32)

    return compute, (KINDS["b32"],) * 3, KINDS["b32"]


def permuted(instruction: Instruction) -> Form:
    """prmt: each byte of the result is one of eight, or its sign."""

    def compute(low: Array, high: Array, selector: Array) -> Array:
        both, result = low.astype(U64) | high.astype(U64) << U64(32), np.zeros_like(low)
        for place in range(4):
            pick = (selector >> U32(4 * place)) & U32(15)
            byte = ((both >> (U64(8) * (pick & U32(7)).astype(U64))) & U64(0xFF)).astype(U32)
            signs = np.where(byte & U32(0x80), U32(0xFF), U32(0))
            result |= np.where(pick & U32(8), signs, byte) << U32(8 * place)
        return result

    return compute, (KINDS["b32"],) * 3, KINDS["b32"]


def looked_up(instruction: Instruction) -> Form:
    """lop3: any function of three bits, by its truth table."""

    def compute(a: Array, b: Array, c: Array, table: Array) -> Array:
        result = np.zeros_like(a)
        for row in range(8):
            if int(table[0]) >> row & 1:
                result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return result

    return compute, (KINDS["b32"],) * 4, KINDS["b32"]


def extracted(instruction: Instruction) -> Form:
    """bfe with a constant place: ``length`` bits from ``position`` on, with their sign for signed types."""
    kind = kind_of(instruction)
    position, length = instruction.operands[2:]
    assert isinstance(position, Immediate) and isinstance(length, Immediate)
    first, n = position.bits, length.bits
    assert 0 < n and first + n <= kind.bits, "a field that is empty or ends outside"

    def compute(a: Array, *constants: Array) -> Array:
        return (a << a.dtype.type(kind.bits - first - n)) >> a.dtype.type(kind.bits - n)

    return compute, (kind, KINDS["u32"], KINDS["u32"]), kind


# ---- comparison and selection

ORDERED: dict[str, Compute] = {
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
COMBINED: dict[str, Compute] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def comparison(name: str, floating: bool) -> Compute:
    """A comparison by PTX's name; those of floats that end in u are true for NaN."""
    if not floating:
        return np.not_equal if name == "ne" else ORDERED[name]
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name == "ne":
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    if name == "neu":
        return np.not_equal
    if name in ORDERED:
        return ORDERED[name]
    base = ORDERED[name.removesuffix("u")]
    return lambda a, b: base(a, b) | np.isnan(a) | np.isnan(b)


def build_setp(warps: Warps, instruction: Instruction) -> Handler:
    """setp: a comparison, combined with a third predicate where one is given, into one or two predicates."""
    kind, parts = kind_of(instruction), instruction.parts
    compare = comparison(parts[1], kind.floating)
    compare = _flushing(compare) if "ftz" in parts else compare
    combine = COMBINED.get(parts[2])
    result, *operands = instruction.operands
    assert len(operands) == (3 if combine else 2)
    a, b = (warps.typed(operand, kind) for operand in operands[:2])
    third = warps.predicate(operands[2]) if combine else None
    put = warps.target(result.value if isinstance(result, Pair) else result, "pred")
    put_other = warps.target(result.predicate, "pred") if isinstance(result, Pair) else None

    def setp(mask: Mask) -> None:
        found = compare(a(), b())
        both = [found, ~found]
        if combine is not None and third is not None:
            both = [combine(value, third()) for value in both]
        put(both[0], mask)
        if put_other is not None:
            put_other(both[1], mask)

    return setp


def _flushing(compare: Compute) -> Compute:
    return lambda a, b: compare(flushed(a), flushed(b))


def selected(instruction: Instruction) -> Form:
    """selp."""
    kind = KINDS[f"b{kind_of(instruction).bits}"]

    def compute(a: Array, b: Array, choose: Array) -> Array:
        return np.where(choose, a, b)

    return compute, (kind, kind, PRED), kind


def copied_sign(instruction: Instruction) -> Form:
    """copysign: the size of the second source with the sign of the first."""
    kind = kind_of(instruction)
    return lambda sign, size: np.copysign(size, sign), (kind, kind), kind


FTZ = r"(ftz\.)?"
COMPARISONS = "eq|ne|lt|le|gt|ge|lo|ls|hi|hs|equ|neu|ltu|leu|gtu|geu|num|nan"
RULES: dict[str, Rule] = {
    "add": pure(f"{INTEGER}: add; {FLOAT}: add", rf"add\.({INT}|(rn\.)?{FTZ}f32)", plain(np.add)),
    "sub": pure(f"{INTEGER}: sub; {FLOAT}: sub", rf"sub\.({INT}|(rn\.)?{FTZ}f32)", plain(np.subtract)),
    "mul": pure(
        f"{INTEGER}: mul; {FLOAT}: mul",
        rf"mul\.(lo\.{INT}|hi\.[su](32|64)|wide\.[su](16|32)|(rn\.)?{FTZ}f32)",
        product,
    ),
    "mad": pure(f"{INTEGER}: mad", rf"mad\.(lo\.{INT}|wide\.[su](16|32))", product),
    "fma": pure(f"{FLOAT}: fma", rf"fma\.rn\.{FTZ}f32", fused),
    "div": pure(f"{INTEGER}: div; {FLOAT}: div", rf"div\.({INT}|(rn|full)\.{FTZ}f32)", divided),
    "rem": pure(f"{INTEGER}: rem", rf"rem\.{INT}", divided),
    "min": pure(f"{INTEGER}: min; {FLOAT}: min", rf"min\.({INT}|{FTZ}(NaN\.)?(xorsign\.abs\.)?f32)", extreme),
    "max": pure(f"{INTEGER}: max; {FLOAT}: max", rf"max\.({INT}|{FTZ}(NaN\.)?(xorsign\.abs\.)?f32)", extreme),
    "abs": pure(f"{INTEGER}: abs; {FLOAT}: abs", rf"abs\.(s(16|32|64)|{FTZ}f32)", plain(np.abs, 1)),
    "neg": pure(f"{INTEGER}: neg; {FLOAT}: neg", rf"neg\.(s(16|32|64)|{FTZ}f32)", plain(np.negative, 1)),
    "bfe": pure(f"{INTEGER}: bfe", r"bfe\.[su](32|64)", extracted),
    "copysign": pure(f"{FLOAT}: copysign", r"copysign\.f32", copied_sign),
    "rcp": pure(f"{FLOAT}: rcp", rf"rcp\.(rn|approx)\.{FTZ}f32", plain(in_double(np.reciprocal), 1)),
    "sqrt": pure(f"{FLOAT}: sqrt", rf"sqrt\.(rn|approx)\.{FTZ}f32", plain(in_double(np.sqrt), 1)),
    "rsqrt": pure(f"{FLOAT}: rsqrt", rf"rsqrt\.approx\.{FTZ}f32", plain(in_double(lambda x: 1 / np.sqrt(x)), 1)),
    "sin": pure(f"{FLOAT}: sin", rf"sin\.approx\.{FTZ}f32", plain(in_double(np.sin), 1)),
    "cos": pure(f"{FLOAT}: cos", rf"cos\.approx\.{FTZ}f32", plain(in_double(np.cos), 1)),
    "lg2": pure(f"{FLOAT}: lg2", rf"lg2\.approx\.{FTZ}f32", plain(in_double(np.log2), 1)),
    "ex2": pure(f"{FLOAT}: ex2", rf"ex2\.approx\.{FTZ}f32", plain(in_double(np.exp2), 1)),
    "tanh": pure(f"{FLOAT}: tanh", r"tanh\.approx\.f32", plain(approximate_tanh, 1)),
    "setp": Rule(f"{COMPARE}: setp", rf"setp\.({COMPARISONS})\.((and|or|xor)\.)?({INT}|{BITS}|{FTZ}f32)", build_setp),
    "selp": pure(f"{COMPARE}: selp", r"selp\.([bsu](16|32|64)|f32)", selected),
    "and": pure(f"{LOGIC}: and", rf"and\.({BITS}|pred)", plain(np.bitwise_and)),
    "or": pure(f"{LOGIC}: or", rf"or\.({BITS}|pred)", plain(np.bitwise_or)),
    "xor": pure(f"{LOGIC}: xor", rf"xor\.({BITS}|pred)", plain(np.bitwise_xor)),
    "not": pure(f"{LOGIC}: not", rf"not\.({BITS}|pred)", plain(np.invert, 1)),
    "lop3": pure(f"{LOGIC}: lop3", r"lop3\.b32", looked_up),
    "shl": pure(f"{LOGIC}: shl", rf"shl\.{BITS}", shifted),
    "shr": pure(f"{LOGIC}: shr", r"shr\.[bsu](16|32|64)", shifted),
    "shf": pure(f"{LOGIC}: shf", r"shf\.[lr]\.wrap\.b32", funnel),
    "prmt": pure("Data Movement and Conversion Instructions: prmt", r"prmt\.b32", permuted),
    "cvt": pure(
        "Data Movement and Conversion Instructions: cvt",
        r"cvt\.(f32\.b?f16|rn\.(relu\.)?b?f16(x2)?\.f32|rna\.tf32\.f32|rn\.f32\.[su](32|64)|r[nzmp]i\.[su]32\.f32"
        rf"|{INT}\.{INT})",
        converted,
    ),
}
"""Instruction -> its rule."""
