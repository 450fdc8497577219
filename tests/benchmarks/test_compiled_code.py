"""What is read from compiled code, on short texts written by hand. tests/compiled has real kernels."""

import pytest

from benchmarks.compiled_code import async_copies, loads_before_store, longest_loop
from benchmarks.in_flight import in_flight


def sass(*instructions: str) -> str:
    return "\n".join(f"        /*{16 * i:04x}*/                   {text} ;" for i, text in enumerate(instructions))


FIRST = "@!P0 LDG.E.128 R4, desc[UR4][R2.64]"  # fills R4 to R7
SECOND = "LDG.E.64 R8, desc[UR4][R12.64]"


@pytest.mark.parametrize(
    ("instructions", "loads", "most_bytes", "waits"),
    [
        ((FIRST, SECOND, "FADD R20, R7, R9"), 2, 24, 1),
        ((FIRST, SECOND, "FADD R20, R7, R7", "FADD R21, R8, R8"), 2, 24, 1),  # the second one comes at the same time
        ((FIRST, "FADD R20, R7, R7", SECOND, "FADD R21, R8, R8"), 1, 16, 2),
        ((FIRST, "FADD R20, R8, R12", SECOND), 2, 24, 0),
        ((FIRST, "LDG.E R8, desc[UR4][R4.64]"), 1, 16, 1),  # the address is what the first one loads
        (("LDG.E.U16 R4, desc[UR4][R2.64]", "STG.E.128 desc[UR4][R2.64], R12", SECOND), 2, 10, 0),
        (("LDG.E.ENL2.256 R8, R4, desc[UR4][R2.64]", "FADD R20, R11, R1", FIRST), 1, 32, 1),
    ],
    ids=[
        "both",
        "in turn",
        "one after the other",
        "other registers",
        "an address",
        "narrow",
        "two times four registers",
    ],
)
def test_a_load_is_in_flight_until_its_registers_are_named(instructions, loads, most_bytes, waits):
    found = in_flight(sass(*instructions))
    assert (found.loads, found.bytes, found.waits) == (loads, most_bytes, waits)


COPY = "LDGSTS.E.BYPASS.128 [R7], desc[UR6][R8.64], !P3"


@pytest.mark.parametrize(("may_go_on", "most"), [(0, 2), (1, 2), (2, 3)])
def test_a_copy_is_in_flight_until_its_group_is_waited_for(may_go_on, most):
    """Two groups of one copy each, then a wait for all but `may_go_on` of them, then a third copy."""
    text = sass(COPY, "LDGDEPBAR", COPY, "LDGDEPBAR", f"DEPBAR.LE SB0, {may_go_on:#x}", COPY)
    found = in_flight(text)
    assert (found.loads, found.bytes, found.ahead) == (most, 16 * most, 16 * most)


LOOP = """
    bra.uni $L__BB0_2;
$L__BB0_1:
    ld.global.b32 { %r1 }, [ %rd1 + 0 ];
    @%p1 bra $L__BB0_1;
$L__BB0_2:
    bar.sync 0;
    @%p3 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    st.shared.b32 [ %r77 + 0 ], %r78;
    @%p3 st.global.v4.b32 [ %rd2 + 0 ], { %r1, %r2, %r3, %r4 };
    cp.async.cg.shared.global [ %r31 + 0 ], [ %rd11 + 0 ], 0x10, %r33;
    @%p2 bra $L__BB0_2;
    ld.global.b32 { %r5 }, [ %rd1 + 0 ];
    bra.uni $L__BB0_3;
    bar.sync 0;
    bar.sync 0;
    bar.sync 0;
    bar.sync 0;
$L__BB0_3:
    ret;
"""


def test_the_loop_is_the_longest_one():
    assert longest_loop(LOOP).count("bar.sync") == 1
    assert async_copies(longest_loop(LOOP)) == {16: 1}
    assert longest_loop(".L_x_1:\n LDG R1 ;\n .L_x_2:\n @P0 BRA `(.L_x_1) ;").strip() == "LDG R1 ;\n .L_x_2:\n @P0"
    assert longest_loop(LOOP.replace("@%p1 bra", "//").replace("@%p2 bra", "//")) == ""


def test_loads_before_the_first_store():
    """The copy after the store is for a later turn. A load there isn't."""
    assert loads_before_store(longest_loop(LOOP))
    assert not loads_before_store(longest_loop(LOOP.replace("cp.async", "ld.global.b32 %r9, [%rd3]; cp.async")))
    assert not loads_before_store(LOOP)


POINTERS = {0x210: "x", 0x218: "gamma"}
VECTOR_FIRST = sass(
    "ULDC.64 UR4, c[0x0][0x208]",
    "ULDC.64 UR6, c[0x0][0x218]",
    "IMAD.WIDE R2, R0, 0x2, UR6",
    "SHF.L.U64.HI R1, R0, 0x1, R0",
    "LDG.E R8, desc[UR4][R2.64]",
    "LEA R12, P0, R0, c[0x0][0x210], 0x1",
    "FADD R20, R8, R8",
    "LDG.E.128 R4, desc[UR4][R12.64]",
    "LEA R2, P0, R4, c[0x0][0x210], 0x1",
    "LDG.E.128 R8, desc[UR4][R2.64]",
    "FADD R20, R8, R8",
)
"""Waits for γ, then for a load of x, then for another one in the register that held γ's address. A shift of 64 bits
writes one register."""


def test_loads_of_cached_arguments_do_not_count():
    found = in_flight(VECTOR_FIRST, pointers=POINTERS)
    assert (found.loaded, found.waits) == (4 + 16 + 16, 3)
    found = in_flight(VECTOR_FIRST, pointers=POINTERS, cached={"gamma"})
    assert (found.loaded, found.waits) == (16 + 16, 2)


def test_waits_of_a_part():
    part = VECTOR_FIRST[VECTOR_FIRST.index("LEA R2, P0") - 40 :]
    found = in_flight(VECTOR_FIRST, part, POINTERS, {"gamma"})
    assert (found.loaded, found.waits) == (16, 2)
