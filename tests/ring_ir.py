"""IR written by hand: a kernel of two partitions that multiply and one that copies into a ring, and plain loops."""

from __future__ import annotations

from kaleido_kernels.proving.ttgir.operations import Block, read_operations

BARRIER = "!ttg.memdesc<1xi64, #shared1, #smem, mutable>"
BARRIERS = "!ttg.memdesc<3x1xi64, #shared1, #smem, mutable>"
PIECE = "!ttg.memdesc<64x64xf16, #shared, #smem, mutable>"
SUM = "tensor<64x64xf32, #mma>"
NAMES = ("scratch_ptr", "act", "ring", "full", "empty", "ready", "w_desc", "x_desc", "rounds", "steps")
KINDS = (
    "!tt.ptr<f16>",
    "!ttg.memdesc<4x64x64xf16, #shared, #smem, mutable>",
    "!ttg.memdesc<3x64x64xf16, #shared, #smem, mutable>",
    BARRIERS,
    BARRIERS,
    "!ttg.memdesc<2x1xi64, #shared1, #smem, mutable>",
    *["!tt.tensordesc<tensor<64x64xf16, #shared>>"] * 2,
    *["i32"] * 2,
)
NUMBERS = (
    "".join(f"  %c{n} = arith.constant {n} : i32\n" for n in range(4))
    + f"""  %true = arith.constant true
  %zero = arith.constant dense<0.000000e+00> : {SUM}
"""
)


def multiplying(group: int) -> str:
    """A partition that stores its input in scratch memory, shows it, and multiplies tile by tile."""
    return (
        NUMBERS
        + f"""
  %last = scf.for %step = %c0 to %steps step %c1 iter_args(%it = %c0) -> (i32)  : i32 {{
    %place = tt.splat %scratch_ptr : !tt.ptr<f16> -> tensor<64x!tt.ptr<f16>, #mma>
    %x = tt.make_range {{end = 64 : i32, start = 0 : i32}} : tensor<64xi32, #mma>
    tt.store %place, %x : tensor<64x!tt.ptr<f16>, #mma>
    %f = tt.elementwise_inline_asm "fence.proxy.async.global; mov.b32 $0, 0;" {{constraints = "=r"}} -> i32
    ttg.barrier all
    %r = ttg.memdesc_index %ready[%c{group}] : {BARRIERS} -> {BARRIER}
    ttng.arrive_barrier %r, 1, %true : {BARRIER}
    %acc:2 = scf.for %k = %c0 to %rounds step %c1 iter_args(%i = %it, %sum = %zero) -> (i32, {SUM})  : i32 {{
      %slot = arith.remsi %i, %c3 : i32
      %b = ttg.memdesc_index %full[%slot] : {BARRIERS} -> {BARRIER}
      ttng.wait_barrier %b, %c0, %true : {BARRIER}
      %w = ttg.memdesc_index %ring[%slot] : !ttg.memdesc<3x64x64xf16, #shared, #smem, mutable> -> {PIECE}
      %t = ttg.memdesc_trans %w {{order = array<i32: 1, 0>}} : {PIECE} -> {PIECE}
      %a = ttg.memdesc_index %act[%c0] : !ttg.memdesc<4x64x64xf16, #shared, #smem, mutable> -> {PIECE}
      %d = ttng.warp_group_dot %a, %t, %sum, %true {{isAsync = true}} : {PIECE} * {PIECE} -> {SUM}
      %e = ttng.warp_group_dot_wait %d {{pendings = 1 : i32}} : {SUM}
      %before = arith.addi %i, %c2 : i32
      %old = arith.remsi %before, %c3 : i32
      %g = ttg.memdesc_index %empty[%old] : {BARRIERS} -> {BARRIER}
      %later = arith.cmpi sgt, %k, %c0 : i32
      ttng.arrive_barrier %g, 1, %later : {BARRIER}
      %next = arith.addi %i, %c1 : i32
      scf.yield %next, %e : i32, {SUM}
    }}
    %done = ttng.warp_group_dot_wait %acc#1 {{pendings = 0 : i32}} : {SUM}
    %before = arith.addi %acc#0, %c2 : i32
    %old = arith.remsi %before, %c3 : i32
    %g = ttg.memdesc_index %empty[%old] : {BARRIERS} -> {BARRIER}
    ttng.arrive_barrier %g, 1, %true : {BARRIER}
    scf.yield %acc#0 : i32
  }}
"""
    )


COPYING = (
    NUMBERS
    + f"""
  %last = scf.for %step = %c0 to %steps step %c1 iter_args(%it = %c0) -> (i32)  : i32 {{
    %first = ttg.memdesc_index %ready[%c0] : {BARRIERS} -> {BARRIER}
    ttng.wait_barrier %first, %c0, %true : {BARRIER}
    %second = ttg.memdesc_index %ready[%c1] : {BARRIERS} -> {BARRIER}
    ttng.wait_barrier %second, %c0, %true : {BARRIER}
    %end = scf.for %k = %c0 to %rounds step %c1 iter_args(%i = %it) -> (i32)  : i32 {{
      %slot = arith.remsi %i, %c3 : i32
      %g = ttg.memdesc_index %empty[%slot] : {BARRIERS} -> {BARRIER}
      ttng.wait_barrier %g, %c1, %true : {BARRIER}
      %b = ttg.memdesc_index %full[%slot] : {BARRIERS} -> {BARRIER}
      ttng.barrier_expect %b, 16384, %true : {BARRIER}
      %w = ttg.memdesc_index %ring[%slot] : !ttg.memdesc<3x64x64xf16, #shared, #smem, mutable> -> {PIECE}
      ttng.async_tma_copy_global_to_local %w_desc[%k, %c0] %w, %b, %true : {KINDS[6]}, {BARRIER} -> {PIECE}
      %a = ttg.memdesc_index %act[%k] : !ttg.memdesc<4x64x64xf16, #shared, #smem, mutable> -> {PIECE}
      ttng.async_tma_copy_global_to_local %x_desc[%k, %c0] %a, %b, %true : {KINDS[7]}, {BARRIER} -> {PIECE}
      %next = arith.addi %i, %c1 : i32
      scf.yield %next : i32
    }}
    scf.yield %end : i32
  }}
"""
)


def partition(number: int, warps: int, body: str) -> str:
    """A partition's text: what it captures has other names there."""
    for place, name in enumerate(NAMES):
        body = body.replace(f"%{name}", f"%arg{place}")
    arguments = ", ".join(f"%arg{place}: {kind} loc(unknown)" for place, kind in enumerate(KINDS))
    return f"partition{number}({arguments}) num_warps({warps}) {{\n{body}\n  ttg.warp_return\n}}\n"


def _allocated() -> str:
    lines = [f"  %{name} = ttg.local_alloc : () -> {kind}" for name, kind in zip(NAMES[1:6], KINDS[1:6], strict=True)]
    for name, slots, count in (("full", 3, 1), ("empty", 3, 2), ("ready", 2, 1)):
        for slot in range(slots):
            lines += [
                f"  %{name}_{slot} = ttg.memdesc_index %{name}[%c{slot}] : {BARRIERS} -> {BARRIER}",
                f"  ttng.init_barrier %{name}_{slot}, {count} : {BARRIER}",
            ]
    return "\n".join(lines)


_arguments = ", ".join(f"%{name}: {kind}" for name, kind in zip(NAMES, KINDS, strict=True) if name not in NAMES[1:6])
RING = f"""
#loc = loc(unknown)
module attributes {{"ttg.num-ctas" = 1 : i32, "ttg.num-warps" = 4 : i32, ttg.target = "cuda:90"}} {{
  tt.func public @k({_arguments}) attributes {{noinline = false}} {{
{NUMBERS}
{_allocated()}
  ttg.warp_specialize({", ".join("%" + name for name in NAMES)}) attributes {{requestedRegisters = array<i32: 240, 24>}}
  default {{
{multiplying(0)}
    ttg.warp_yield loc(#loc)
  }}
{partition(0, 4, multiplying(1))}
{partition(1, 1, COPYING)}
  : ({", ".join(KINDS)}) -> () loc(#loc)
  tt.return loc(#loc)
  }} loc(#loc)
}} loc(#loc)
"""


def edited(text: str, old: str, new: str, number: int | None = 0) -> str:
    """The text with one occurrence replaced, or all where ``number`` is None; it must be there."""
    parts = text.split(old)
    assert len(parts) > (number or 0) + 1, f"{old!r} is not there"
    if number is None:
        return new.join(parts)
    return old.join(parts[: number + 1]) + new + old.join(parts[number + 1 :])


def dropped(text: str, what: str, number: int = 0) -> str:
    """The text without one of the lines that hold ``what``."""
    lines = text.splitlines()
    (*_, place) = [n for n, line in enumerate(lines) if what in line][: number + 1]
    return "\n".join(lines[:place] + lines[place + 1 :])


def loop_by_threads(body: str, before: int) -> Block:
    """A loop that threads load: ``before`` copies in front of it; steps of a round by letter.

    w: wait for all copies, W: for all but one, p: product, d: wait for products, D: for all but one, c: copy.
    """
    steps = {
        "w": "%t = ttg.async_wait %k {num = 0 : i32}",
        "W": "%t = ttg.async_wait %k {num = 1 : i32}",
        "p": f"%p = ttng.warp_group_dot %a, %b, %sum {{isAsync = true}} : {PIECE} * {PIECE} -> {SUM}",
        "P": f"%p = tt.dot %a, %b, %sum : {PIECE} * {PIECE} -> {SUM}",
        "d": f"%d = ttng.warp_group_dot_wait %p {{pendings = 0 : i32}} : {SUM}",
        "D": f"%d = ttng.warp_group_dot_wait %p {{pendings = 1 : i32}} : {SUM}",
        "c": "%g = ttg.async_commit_group tokens %t",
    }
    return _loop([steps[letter] for letter in body], [steps["c"]] * before)


def loop_by_copy_engine(body: str, before: int) -> Block:
    """The same of a loop that the copy engine loads, each round announced at one barrier: w, p, d, D and c."""
    steps = {
        "w": f"ttng.wait_barrier %b, %c0 : {BARRIER}",
        "p": f"%p = ttng.warp_group_dot %a, %b, %sum {{isAsync = true}} : {PIECE} * {PIECE} -> {SUM}",
        "d": f"%d = ttng.warp_group_dot_wait %p {{pendings = 0 : i32}} : {SUM}",
        "D": f"%d = ttng.warp_group_dot_wait %p {{pendings = 1 : i32}} : {SUM}",
        "c": f"ttng.barrier_expect %b, 8192, %more : {BARRIER}",
    }
    return _loop([steps[letter] for letter in body], [steps["c"]] * before)


def _loop(body: list[str], before: list[str]) -> Block:
    lines = "\n".join(body)
    return read_operations(f"""
module {{
  tt.func public @k(%n: i32) {{
  {NUMBERS}
  %full = ttg.local_alloc : () -> {BARRIERS}
  {chr(10).join(before)}
  %last = scf.for %k = %c0 to %n step %c1 iter_args(%sum = %zero) -> ({SUM})  : i32 {{
    {lines}
    scf.yield %p : {SUM}
  }}
  tt.return
  }}
}}
""")
