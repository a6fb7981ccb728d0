"""Machine code written by hand, and changed to plant faults."""

from __future__ import annotations

from kaleido_kernels.proving.sass.program import parse_program


def program(*lines: str):
    """Instructions as text, one address each; a line that ends with a colon is a label."""
    text, address = [], 0
    for line in lines:
        if line.endswith(":"):
            text.append(f".{line}")
        else:
            text.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    return parse_program("\n".join(text))


HIDDEN_LOOP = (
    "L_x_0:",
    "WARPGROUP.ARRIVE",
    "HGMMA.64x64x16.F32 R24, R56, gdesc[UR8], R24, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "F2FP.F16.F32.PACK_AB R56, R25, R24",
    "MUFU.EX2 R3, R24",
    "ISETP.NE.AND P0, PT, R2, RZ, PT",
    "@P0 BRA `(.L_x_0)",
    "STG.E.128 desc[UR4][R2.64], R24",
    "EXIT",
)
LAYER_LOOP = (  # loop over layers > loop over output tiles > loop of products, then fence and barrier
    "L_x_9:",
    "LDG.E R88, desc[UR4][R86.64]",
    "L_x_1:",
    "MOV R90, R88",
    "L_x_2:",
    "UTMALDG.2D [UR8], [UR6]",
    "HGMMA.64x64x16.F32 R24, gdesc[UR4], R24, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "@P0 BRA `(.L_x_2)",
    "STG.E.128 desc[UR4][R2.64], R24",
    "@P1 BRA `(.L_x_1)",
    "FENCE.VIEW.ASYNC.G",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "@P2 BRA `(.L_x_9)",
    "EXIT",
)
FLAT_LOOP = (  # the stream kernel's: operands stored and copied by threads, fenced, multiplied
    "L_x_0:",
    "STSM.16.M88.4 [R104+0x10000], R88",
    "DEPBAR.LE SB0, 0x0",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "FENCE.VIEW.ASYNC.S",
    "HGMMA.64x128x16.F32 R24, gdesc[UR40].tnspB, R24, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "LDGSTS.E.BYPASS.128 [R93], desc[UR50][R22.64], !P0",
    "LDGDEPBAR",
    "@P0 BRA `(.L_x_0)",
    "STG.E.128 desc[UR4][R2.64], R24",
    "EXIT",
)


def without(lines: tuple[str, ...], text: str) -> tuple[str, ...]:
    return tuple(line for line in lines if text not in line)


def instead(lines: tuple[str, ...], text: str, new: str) -> tuple[str, ...]:
    assert any(text in line for line in lines)
    return tuple(new if text in line else line for line in lines)


def before(lines: tuple[str, ...], text: str, new: str) -> tuple[str, ...]:
    place = next(number for number, line in enumerate(lines) if text in line)
    return (*lines[:place], new, *lines[place:])


PRODUCT = "HGMMA.64x64x16.F32 R24, R56, gdesc[UR8], R24, gsb0"
SPECIALISED = (  # a dispatch over two partitions: one with a loop of products, one that copies; the first warps stay
    "@!P0 BRA `(.L_x_7)",
    "L_x_1:",
    "USETMAXREG.DEALLOC.CTAPOOL 0x78",
    'BRX R6 -0x240 (*"BRANCH_TARGETS .L_x_2,.L_x_4,.L_x_6"*)',
    "L_x_2:",
    "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0",
    "@!P0 BRA `(.L_x_2)",
    "L_x_12:",
    "NOP",
    "L_x_3:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR12], R170",
    "HGMMA.64x64x16.F32 R24, gdesc[UR8], R24, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "@P0 BRA `(.L_x_3)",
    "STSM.16.M88.4 [R104], R88",
    "FENCE.VIEW.ASYNC.S",
    "BAR.SYNC.DEFER_BLOCKING 0x2, 0x80",
    "@P1 BRA `(.L_x_12)",
    "USETMAXREG.DEALLOC.CTAPOOL 0x78",
    "BRA `(.L_x_1)",
    "L_x_4:",
    "USETMAXREG.DEALLOC.CTAPOOL 0x18",
    "L_x_5:",
    "UTMALDG.2D [UR12], [UR10]",
    "@P0 BRA `(.L_x_5)",
    "L_x_9:",
    "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0x78",
    "@!P0 BRA `(.L_x_9)",
    "BRA `(.L_x_1)",
    "L_x_7:",
    "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0x100",
    "@!P0 BRA `(.L_x_7)",
    "USETMAXREG.DEALLOC.CTAPOOL 0xf0",
    "L_x_8:",
    "HGMMA.64x64x16.F32 R24, gdesc[UR8], R24, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "@P0 BRA `(.L_x_8)",
    "L_x_10:",
    "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0x100",
    "@!P0 BRA `(.L_x_10)",
    "L_x_6:",
    "EXIT",
    "L_x_11:",
    "BRA `(.L_x_11)",
)
