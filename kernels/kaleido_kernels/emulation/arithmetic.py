"""Instructions that make a value from values: integers, floating point, comparison, logic, conversion.

Each rule is a function from an instruction to (what is computed, types of the sources, type of the result). Results of
``.approx`` instructions are exact but for tanh, whose 11 bits matter; fma is rounded by way of fp64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kaleido_kernels.emulation.kinds import (
    F32,
    HELD,
    KINDS,
    U32,
    U64,
    Array,
    Kind,
    flushed,
    held,
    rounded_bf16,
    rounded_tf32,
)
from kaleido_kernels.emulation.ptx import Instruction, Pair
from kaleido_kernels.emulation.warps import Handler, Mask, Rule, Warps, kind_of

Compute = Callable[..., Array]
Form = tuple[Compute, tuple[Kind, ...], Kind]
"""What is computed, from what, giving what."""
INTEGER = "Integer Arithmetic Instructions"
FLOAT = "Floating Point Instructions"
LOGIC = "Logic and Shift Instructions"
COMPARE = "Comparison and Selection Instructions"
CONVERT = "Data Movement and Conversion Instructions: cvt"
PRED = KINDS["pred"]


def pure(section: str, form_of: Callable[[Instruction], Form]) -> Rule:
    """A rule for an instruction whose result depends on its sources alone."""

    def build(warps: Warps, instruction: Instruction) -> Handler:
        compute, kinds, result = form_of(instruction)
        operands = instruction.operands[1 : 1 + len(kinds)]
        sources = [warps.typed(operand, kind) for operand, kind in zip(operands, kinds, strict=True)]
        put = warps.target(instruction.operands[0])
        if len(sources) == 1:
            (a,) = sources
            return lambda mask: put(held(compute(a()), result), mask)
        if len(sources) == 2:
            a, b = sources
            return lambda mask: put(held(compute(a(), b()), result), mask)
        return lambda mask: put(held(compute(*[source() for source in sources]), result), mask)

    return Rule(section, build)


def same(compute_of: Callable[[Instruction, Kind], Compute], n_sources: int) -> Callable[[Instruction], Form]:
    """Sources and result of the type of the last modifier, with ``.ftz`` and ``.sat`` where they are asked for."""

    def form(instruction: Instruction) -> Form:
        kind = kind_of(instruction)
        return _modified(instruction, compute_of(instruction, kind)), (kind,) * n_sources, kind

    return form


def _modified(instruction: Instruction, compute: Compute) -> Compute:
    parts = instruction.parts
    if "ftz" in parts and kind_of(instruction).name == "f32":
        exact = compute

        def compute(*values: Array) -> Array:
            return flushed(exact(*[flushed(value) for value in values]))

    if "sat" in parts and kind_of(instruction).floating:
        unbounded = compute

        def compute(*values: Array) -> Array:
            return np.nan_to_num(unbounded(*values), nan=0.0).clip(0, 1)

    return compute


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
    assert mode == "hi" and not adds

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
    """min and max: of floats the number where the other is NaN, or NaN with ``.NaN``."""
    kind, parts = kind_of(instruction), instruction.parts
    smaller = parts[0] == "min"
    if not kind.floating:
        return np.minimum if smaller else np.maximum, (kind, kind), kind
    if "NaN" in parts:
        compute: Compute = np.minimum if smaller else np.maximum
    else:
        compute = np.fmin if smaller else np.fmax
    if "xorsign" in parts:
        size = compute

        def compute(a: Array, b: Array) -> Array:
            found = size(np.abs(a), np.abs(b))
            return np.where(np.signbit(a) ^ np.signbit(b), -found, found)

    return _modified(instruction, compute), (kind, kind), kind


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
    left, wrap = instruction.parts[1] == "l", instruction.parts[2] == "wrap"
    assert wrap

    def compute(low: Array, high: Array, amount: Array) -> Array:
        both, by = low.astype(U64) | high.astype(U64) << U64(32), (amount & U32(31)).astype(U64)
        return ((both << by) >> U64(32) if left else both >> by).astype(U32)

    return compute, (KINDS["b32"],) * 3, KINDS["b32"]


def permuted(instruction: Instruction) -> Form:
    """prmt: each byte of the result is one of eight, or its sign."""
    assert len(instruction.parts) == 2

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
    """bfe: ``length`` bits from ``position`` on, with their sign for signed types."""
    kind = kind_of(instruction)

    def compute(a: Array, position: Array, length: Array) -> Array:
        first, n = int(position[0]) & 0xFF, int(length[0]) & 0xFF
        assert (position == position[0]).all() and (length == length[0]).all() and first + n <= kind.bits and n
        up, down = a.dtype.type(kind.bits - first - n), a.dtype.type(kind.bits - n)
        return (a << up) >> down

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
    combine = COMBINED.get(parts[2]) if len(parts) > 3 else None
    a, b = (warps.typed(operand, kind) for operand in instruction.operands[1:3])
    third = warps.predicate(instruction.operands[3]) if combine else None
    result = instruction.operands[0]
    put = warps.target(result.value if isinstance(result, Pair) else result)
    put_other = warps.target(result.predicate) if isinstance(result, Pair) else None

    def setp(mask: Mask) -> None:
        found = compare(a(), b())
        if put_other is not None:
            put_other(combine(~found, third()) if combine and third else ~found, mask)
        put(combine(found, third()) if combine and third else found, mask)

    return setp


def selected(instruction: Instruction) -> Form:
    """selp."""
    kind = KINDS[f"b{kind_of(instruction).bits}"]

    def compute(a: Array, b: Array, choose: Array) -> Array:
        return np.where(choose, a, b)

    return compute, (kind, kind, PRED), kind


# ---- conversion


def converted(instruction: Instruction) -> Form:
    """cvt from one type to another; two fp32 into a packed pair, the first source above the second."""
    parts = instruction.parts
    result, source = KINDS[parts[-2]], KINDS[parts[-1]]
    relu = "relu" in parts
    if result.name in ("f16x2", "bf16x2"):
        assert source.name == "f32" and "rn" in parts

        def pack(high: Array, low: Array) -> Array:
            halves = [_short(value, result, relu).astype(U32) for value in (high, low)]
            return halves[0] << U32(16) | halves[1]

        return pack, (source, source), KINDS["b32"]
    if result.name == "tf32":
        assert "rna" in parts
        return lambda x: rounded_tf32(x), (source,), KINDS["b32"]
    if result.name in ("f16", "bf16") and source.name == "f32":
        assert "rn" in parts
        return lambda x: _short(x, result, relu), (source,), KINDS["b16"]
    if source.floating and not result.floating:
        return _to_integer(parts, result), (source,), result
    if not source.floating and not result.floating:
        return _resized(source, result), (source,), KINDS[f"b{result.bits}"]
    return lambda x: x.astype(result.seen), (source,), result


def _short(values: Array, kind: Kind, relu: bool) -> Array:
    """fp32 as bits of fp16 or bf16; with ``relu`` what is below zero is zero and NaN stays NaN."""
    if relu:
        values = np.where(np.isnan(values), values, np.maximum(values, F32(0)))
    return rounded_bf16(values) if kind.name.startswith("bf16") else values.astype(np.float16).view(np.uint16)


def _to_integer(parts: tuple[str, ...], result: Kind) -> Compute:
    rounding: dict[str, Compute] = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rni": np.rint}
    rounded = next(rounding[part] for part in parts if part in rounding)
    limits = np.iinfo(result.seen)

    def compute(x: Array) -> Array:
        inside = np.nan_to_num(rounded(x).astype(np.float64), nan=0.0).clip(float(limits.min), float(limits.max))
        return inside.astype(np.int64 if result.name[0] == "s" else U64).astype(result.seen)

    return compute


def _resized(source: Kind, result: Kind) -> Compute:
    """Integers of another size: signed ones keep their sign. An 8-bit source is the low byte of its register."""
    target = HELD[f"b{result.bits}"]

    def compute(x: Array) -> Array:
        if source.size == 1:
            x = (x & x.dtype.type(0xFF)).astype(np.uint8).view(np.int8 if source.name[0] == "s" else np.uint8)
        cut = x.astype(np.int64).view(U64) if x.dtype.kind == "i" else x
        cut = cut & cut.dtype.type(0xFF) if result.size == 1 else cut
        return cut.astype(target)

    return compute


def bits_only(compute: Compute) -> Callable[[Instruction], Form]:
    """A function of one source's bits, whatever they mean."""

    def form(instruction: Instruction) -> Form:
        kind = kind_of(instruction)
        return compute, (kind,), kind

    return form


def copied_sign(instruction: Instruction) -> Form:
    """copysign: the size of the second source with the sign of the first."""
    kind = kind_of(instruction)
    return lambda sign, size: np.copysign(size, sign), (kind, kind), kind


def negative(x: Array) -> Array:
    """-x; of unsigned bits, modulo their range."""
    return -x if x.dtype.kind != "u" else (~x + x.dtype.type(1))


RULES: dict[str, Rule] = {
    "add": pure(f"{INTEGER}: add; {FLOAT}: add", plain(np.add)),
    "sub": pure(f"{INTEGER}: sub; {FLOAT}: sub", plain(np.subtract)),
    "mul": pure(f"{INTEGER}: mul; {FLOAT}: mul", product),
    "mad": pure(f"{INTEGER}: mad", product),
    "fma": pure(f"{FLOAT}: fma", fused),
    "div": pure(f"{INTEGER}: div; {FLOAT}: div", divided),
    "rem": pure(f"{INTEGER}: rem", divided),
    "min": pure(f"{INTEGER}: min; {FLOAT}: min", extreme),
    "max": pure(f"{INTEGER}: max; {FLOAT}: max", extreme),
    "abs": pure(f"{INTEGER}: abs; {FLOAT}: abs", plain(np.abs, 1)),
    "neg": pure(f"{INTEGER}: neg; {FLOAT}: neg", plain(negative, 1)),
    "bfe": pure(f"{INTEGER}: bfe", extracted),
    "copysign": pure(f"{FLOAT}: copysign", copied_sign),
    "rcp": pure(f"{FLOAT}: rcp", plain(in_double(np.reciprocal), 1)),
    "sqrt": pure(f"{FLOAT}: sqrt", plain(in_double(np.sqrt), 1)),
    "rsqrt": pure(f"{FLOAT}: rsqrt", plain(in_double(lambda x: 1 / np.sqrt(x)), 1)),
    "sin": pure(f"{FLOAT}: sin", plain(in_double(np.sin), 1)),
    "cos": pure(f"{FLOAT}: cos", plain(in_double(np.cos), 1)),
    "lg2": pure(f"{FLOAT}: lg2", plain(in_double(np.log2), 1)),
    "ex2": pure(f"{FLOAT}: ex2", plain(in_double(np.exp2), 1)),
    "tanh": pure(f"{FLOAT}: tanh", plain(approximate_tanh, 1)),
    "setp": Rule(f"{COMPARE}: setp", build_setp),
    "selp": pure(f"{COMPARE}: selp", selected),
    "and": pure(f"{LOGIC}: and", plain(np.bitwise_and)),
    "or": pure(f"{LOGIC}: or", plain(np.bitwise_or)),
    "xor": pure(f"{LOGIC}: xor", plain(np.bitwise_xor)),
    "not": pure(f"{LOGIC}: not", bits_only(np.invert)),
    "lop3": pure(f"{LOGIC}: lop3", looked_up),
    "shl": pure(f"{LOGIC}: shl", shifted),
    "shr": pure(f"{LOGIC}: shr", shifted),
    "shf": pure(f"{LOGIC}: shf", funnel),
    "prmt": pure("Data Movement and Conversion Instructions: prmt", permuted),
    "cvt": pure(CONVERT, converted),
}
"""Instruction -> its rule."""
