"""
kernels/emulator: arithmetic to the bit, every fault, costs; and mistakes planted in compiled kernels, each caught.

The last part runs if EMULATE names a GPU: make machine.
"""

import os
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from accuracy import check_all

from kernels.attention import causal_attention, causal_attention_reference, causal_attention_torch
from kernels.emulator import arithmetic, driver, memory
from kernels.emulator.machine import Launch, load
from kernels.emulator.memory import Memory

# ----------------------------------------------------------------------------- by hand

HEAD = """
.visible .entry kernel(.param .u64 .ptr .global .align 1 kernel_param_0)
.reqntid {threads}
{{
ld.param.b64 %rd0, [kernel_param_0];
mov.u32 %r0, %tid.x;
shl.b32 %r1, %r0, 2;
cvt.u64.u32 %rd1, %r1;
add.s64 %rd2, %rd0, %rd1;
add.s32 %r2, %r1, 1024;
"""  # thread t: %rd2 is the address of word t of the tensor, %r2 that of word t of shared memory
NEIGHBOR = """
st.shared.b32 [%r2], %r0;
bar.sync 0;
xor.b32 %r3, %r1, 128;
add.s32 %r4, %r3, 1024;
ld.shared.b32 %r5, [%r4];
st.global.b32 [%rd2], %r5;
ret;
"""  # each thread reads what the other warp wrote
COPY = """
cp.async.ca.shared.global [%r2], [%rd2], 4, 4;
cp.async.commit_group;
cp.async.wait_group 0;
bar.sync 0;
xor.b32 %r3, %r1, 128;
add.s32 %r4, %r3, 1024;
ld.shared.b32 %r5, [%r4];
bar.sync 0;
st.global.b32 [%rd2], %r5;
ret;
"""


def run(body, threads=64, programs=1, words=64, shared_bytes=256, **settings):
    """Run PTX on a tensor of `words` zeros. Return the tensor, the launch and its faults as one string."""
    tensor = np.zeros(-(-words // 4) * 4, np.uint32)
    start = 2**40
    watched = [Memory(start, tensor.view(np.uint8), 4, end=start + 4 * words)]
    kernel = load(HEAD.format(threads=threads) + body + "}")
    launch = Launch(kernel, (programs, 1, 1), [np.uint64(start)], watched, shared_bytes, **settings)
    launch.run()
    return tensor[:words], launch, " ".join(launch.faults)


def test_threads_exchange_words_through_shared_memory():
    for body, expected in ((NEIGHBOR, np.arange(64) ^ 32), (COPY, np.zeros(64))):
        tensor, _, faults = run(body)
        assert faults == "" and (tensor == expected).all()


@pytest.mark.parametrize(
    ("body", "before", "after", "fault"),
    [
        (NEIGHBOR, "bar.sync 0;", "", "race in shared memory at a read"),
        (NEIGHBOR, "add.s32 %r4, %r3, 1024", "add.s32 %r4, %r3, 1028", "byte 256 of a program's 256 bytes"),
        (NEIGHBOR, "add.s32 %r4, %r3, 1024", "add.s32 %r4, %r3, 1020", "byte -4 of a program's 256 bytes"),
        (NEIGHBOR, "add.s32 %r4, %r3, 1024", "add.s32 %r4, %r3, 1026", "a misaligned access to shared memory"),
        (NEIGHBOR, "[%r2], %r0", "[%r2], 7", ""),
        (NEIGHBOR, "st.shared.b32 [%r2], %r0;", "", "shared memory is read that nobody wrote"),
        (NEIGHBOR, "st.global.b32 [%rd2]", "st.global.b32 [%rd2+4]", "1 threads access memory outside every tensor"),
        (NEIGHBOR, "st.global.b32 [%rd2]", "st.global.b32 [%rd2+2]", "a misaligned access of 4 bytes to global memory"),
        (NEIGHBOR, "st.global.b32 [%rd2]", "st.global.b32 [%rd0]", "several threads write different values"),
        (NEIGHBOR, "%r5;\nret", "%r6;\nret", "register %r6 was never set"),
        (NEIGHBOR, "bar.sync 0;", "setp.eq.s32 %p0, %r0, 5;\n@%p0 bar.sync 0;", "not all threads reach a barrier"),
        (COPY, "wait_group 0", "wait_group 1", "that an asynchronous copy is still to fill"),
        (COPY, "cp.async.wait_group 0;\nbar.sync 0;", "bar.sync 0;\ncp.async.wait_group 0;", "race in shared memory"),
        (COPY, "%r5, [%r4];\nbar.sync 0;", "%r5, [%r4];", ""),
        (COPY, "[%r2], [%rd2]", "[%r2], [%rd2+4]", "outside every tensor"),
    ],
)
def test_a_fault_is_named(body, before, after, fault):
    assert before in body
    found = run(body.replace(before, after))[2]
    assert fault in found if fault else found == ""


def test_a_barrier_of_a_warp_orders_its_threads_only():
    body = NEIGHBOR.replace("bar.sync 0;", "bar.warp.sync -1;")
    assert "race in shared memory at a read" in run(body)[2]
    within = body.replace("xor.b32 %r3, %r1, 128", "xor.b32 %r3, %r1, 64")  # 16 lanes away
    tensor, _, faults = run(within)
    assert faults == "" and (tensor == np.arange(64) ^ 16).all()
    assert "race in shared memory" in run(within.replace("bar.warp.sync -1;", ""))[2]


def test_programs_that_touch_the_same_bytes_of_a_tensor_race():
    own = "mov.u32 %r3, %ctaid.x;\nst.global.b32 [%rd2], %r3;\nret;"
    assert "several threads write different values to one place" in run(own, programs=2)[2]
    assert "race in global memory at a write" in run(own, programs=1 + 2048 // 64)[2]  # the last runs later
    assert run("ld.global.b32 %r3, [%rd2];\nret;", programs=40)[2] == ""
    reads_then_writes = "ld.global.b32 %r3, [%rd0];\nst.global.b32 [%rd2], %r0;\nret;"
    assert "race in global memory" in run(reads_then_writes)[2]


def test_threads_that_part_at_a_branch_meet_again():
    body = """
setp.lt.u32 %p0, %r0, 40;
mov.b32 %r3, 0;
@%p0 bra $L__BB0_2;
$L__BB0_1:
add.s32 %r3, %r3, 1;
setp.lt.u32 %p1, %r3, %r0;
@%p1 bra $L__BB0_1;
$L__BB0_2:
bar.sync 0;
st.global.b32 [%rd2], %r3;
ret;
"""
    tensor, _, faults = run(body)
    assert faults == "" and (tensor == np.where(np.arange(64) < 40, 0, np.arange(64))).all()


@pytest.mark.parametrize(("selector", "word"), [("0x3210", 0x44332211), ("0x7531", 0x80664422), ("0xF848", 0xFF005500)])
def test_bytes_of_two_words_are_permuted(selector, word):
    body = "mov.b32 %r3, 0x44332211;\nmov.b32 %r4, 0x80776655;\nprmt.b32 %r5, %r3, %r4, SELECTOR;\n"
    tensor, _, faults = run(body.replace("SELECTOR", selector) + "st.global.b32 [%rd2], %r5;\nret;")
    assert faults == "" and (tensor == word).all(), hex(tensor[0])


def test_a_warp_wide_instruction_needs_the_whole_warp():
    shuffle = "shfl.sync.bfly.b32 %r3, %r0, 1, 31, -1;\nst.global.b32 [%rd2], %r3;\nret;"
    tensor, _, faults = run(shuffle)
    assert faults == "" and (tensor == np.arange(64) ^ 1).all()
    assert "not all threads of a warp" in run("setp.lt.u32 %p0, %r0, 3;\n@%p0 " + shuffle)[2]


@pytest.mark.parametrize("line", ["sin.approx.f32 %r3, %r0;", "add.rz.f32 %r3, %r0, %r0;", "bar.arrive 0, 64;"])
def test_an_instruction_that_is_not_known_is_refused(line):
    with pytest.raises(ValueError, match=f"does not know 1 instructions of the PTX; line 11: {re.escape(line)}"):
        run(f"{line}\nret;")


# ---------------------------------------------------------------------------- arithmetic


def floats(count, seed, spread=30):
    generator = np.random.default_rng(seed)
    return (generator.standard_normal(count) * 2.0 ** generator.integers(-spread, spread, count)).astype(np.float32)


def nearest_float32(x: Fraction) -> np.float32:
    """The float32 nearest to a number, the even one of two."""
    near = np.float32(float(x))
    candidates = [np.nextafter(near, np.float32(side)) for side in (-np.inf, np.inf)] + [near]
    return min(candidates, key=lambda c: (abs(Fraction(float(c)) - x), int(c.view(np.uint32)) & 1))


def test_fma_rounds_once():
    a, b = floats(500, 0), floats(500, 1)
    c = np.concatenate([floats(200, 2, 60), -(a * b)[200:400], np.float32(2.0**-126) * floats(100, 3, 1)])
    a[400:] *= np.float32(2.0**-80)
    a[-50:], b[-50:], c[-50:] = 1 + np.float32(2.0**-12), 1 + np.float32(2.0**-12), floats(50, 4, 40)  # near halfway
    for x, y, z, found in zip(a, b, c, arithmetic.fma(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        assert found == nearest_float32(exact), (x, y, z)


@pytest.mark.parametrize(("type", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_16_bit_conversions_are_those_of_pytorch(type, dtype):
    x = np.concatenate([floats(10_000, 0, 20), np.array([np.inf, -np.inf, 0, -0.0, 1e-40, 65504, 65520], np.float32)])
    with np.errstate(over="ignore"):
        bits = arithmetic.round_to_16_bits(x, type)
    expected = torch.from_numpy(x).to(dtype)
    assert (bits == expected.view(torch.int16).numpy().view(np.uint16)).all()
    assert (arithmetic.widen(bits, type) == expected.float().numpy()).all()


@pytest.mark.parametrize(("type", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_16_bit_arithmetic_rounds_once(type, dtype):
    a, b, c = (torch.from_numpy(floats(3000, seed, 4)).to(dtype).double().numpy() for seed in range(3))
    c[1000:] = (torch.from_numpy(-a * b)[1000:] * 1.01).to(dtype).double()
    exact = [Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(a, b, c, strict=True)]
    found = torch.from_numpy(arithmetic.widen(arithmetic.fma_16_bits(type, a, b, c), type)).to(dtype)
    one_up, one_down = (torch.nextafter(found, torch.tensor(side, dtype=dtype)) for side in (torch.inf, -torch.inf))
    for x, near, up, down in zip(exact, found.tolist(), one_up.tolist(), one_down.tolist(), strict=True):
        assert abs(near - x) <= min(abs(up - x), abs(down - x))


@pytest.mark.parametrize("errors", arithmetic.ERRORS)
def test_approximate_instructions_err_by_what_the_mode_says(errors):
    x, y = np.abs(floats(4000, 0, 5)), floats(4000, 1, 5)
    limits = {"exact": 0.5, "uniform": 1.6, "worst": 2.7}  # in units of the last place, the rounding included
    for found, exact, smallest in (
        (arithmetic.ex2(y, errors), np.exp2(y.astype(np.float64)), 1.5),
        (arithmetic.div_full(x, y, errors), x.astype(np.float64) / y, 1.5),
        (arithmetic.rsqrt(x, errors), 1 / np.sqrt(x.astype(np.float64)), 0.1),
    ):
        normal = (exact > 2.0**-126) & (exact < 2.0**127) | (exact < -(2.0**-126))
        unit = np.spacing(np.maximum(np.abs(exact).astype(np.float32), np.abs(found)))
        units = (np.abs(found - exact) / unit)[normal]
        assert units.max() <= limits[errors]
        assert errors != "uniform" or 0.2 < units.mean() < 0.8
        assert errors != "worst" or units.min() >= smallest - 0.1


def test_infinities_and_nan_pass_through_approximate_instructions():
    x = np.array([200.0, -200.0, np.inf, -np.inf, np.nan], np.float32)
    expected = [np.inf, 0, np.inf, 0, np.nan]
    with np.errstate(all="ignore"):
        assert np.array_equal(arithmetic.ex2(x, "worst"), np.array(expected, np.float32), equal_nan=True)
        assert np.array_equal(arithmetic.div_full(np.float32([1, 0]), np.float32([0, np.inf]), "worst"), [np.inf, 0])


def test_the_tensor_core_multiplies_exactly_and_cuts_sums_off():
    a, b = (np.random.default_rng(seed).integers(-8, 8, (16, 3, n)).astype(np.float32) for seed, n in ((0, 16), (1, 8)))
    c = np.ones((3, 16, 8), np.float32)
    assert (arithmetic.multiply_add(a, b, c) == np.einsum("kwm,kwn->wmn", a, b) + 1).all()
    a[:], b[:] = 0, 0
    a[0], b[0] = 1, -(2.0**-26)
    assert (arithmetic.multiply_add(a, b, c) == 1).all()  # not 1 - 2^-24: what lies below the last bit is cut off


# --------------------------------------------------------------------------------- costs


def test_wavefronts_and_sectors_of_known_patterns():
    lane, one = np.arange(32), np.zeros(32, np.int64)
    assert memory.wavefronts(one, lane * 4, 4) == (1, 1)
    assert memory.wavefronts(one, lane * 8, 4) == (2, 1)  # every second bank, twice
    assert memory.wavefronts(one, lane * 128, 4) == (32, 1)  # one bank
    assert memory.wavefronts(one, lane * 0, 4) == (1, 1)  # one word for all
    assert memory.wavefronts(lane // 8, lane * 16, 16) == (4, 4)
    assert memory.sectors(one, lane * 4, 4) == (4, 4)
    assert memory.sectors(one, lane * 32, 16) == (32, 16)
    assert memory.sectors(one, lane * 0, 4) == (1, 1)


def test_a_launch_counts_its_accesses():
    _, launch, _ = run(NEIGHBOR, counting=True)
    costs = {opcode: tuple(cost) for (_, _, opcode), cost in launch.costs.items()}
    assert costs == {"st.shared.b32": (2, 2), "ld.shared.b32": (2, 2), "st.global.b32": (8, 8)}


# ---------------------------------------------------------------------- planted mistakes

MISTAKES = {  # what -> T, a pattern of PTX lines and what replaces it
    "a barrier is removed": (256, r"bar\.sync\s+0;", ""),
    "a wait is loosened": (256, r"cp\.async\.wait_group\s+(2|0);", "cp.async.wait_group 4;"),
    "a copy is not committed": (256, r"cp\.async\.commit_group;", ""),
    "ldmatrix reads the row 16 bytes on": (256, r"(ldmatrix.*?\[\s*%r\d+)(?: \+ 0|)(?:\+\d+)?\s*\];", r"\1+16];"),
    "a store to shared memory lands 16 bytes on": (256, r"(st\.shared.*?\[\s*%r\d+)(?: \+ 0)?\s*\]", r"\1+16]"),
    "a mask of a store is dropped": (100, r"@%p\d+ (st\.global)", r"\1"),
    "a mask of a copy is dropped": (100, r"(cp\.async.*), 0x10, %r\d+;", r"\1, 0x10, 0x10;"),
    "a score is not masked": (256, r"selp\.f32\s+(%r\d+), (%r\d+), 0f[0-9A-F]+, (%p\d+)", r"selp.f32 \1, \2, \2, \3"),
    "two halves of a matrix are swapped": (256, r"(mma.*?\}, \{ %r\d+), (%r\d+), (%r\d+)", r"\1, \3, \2"),
    "a sum misses a lane": (256, r"(shfl\.sync\.bfly.*), 2, 31", r"\1, 1, 31"),
    "wgmma is not waited for": (256, r"wgmma\.wait_group\.sync\.aligned\s+\d;", ""),
    "a fence before wgmma is removed": (256, r"fence\.proxy\.async\.shared::cta;", ""),
    "wgmma reads the chunk 16 bytes on": (256, r"(or\.b64\s+%rd\d+, %rd\d+, 46116862933052948)48;", r"\g<1>49;"),
}


def emulated_attention(architecture, T, change=None):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, T, 3 * 64, generator=generator).bfloat16().requires_grad_()
    dy = torch.randn(1, T, 64, generator=generator).bfloat16()
    versions = (causal_attention, causal_attention_torch, causal_attention_reference)
    with driver.emulated(architecture, change=change):
        check_all(*versions, {"qkv": qkv}, (dy,), n_head=1, dropout_p=0.0)


@pytest.mark.skipif("EMULATE" not in os.environ, reason="kernels are interpreted in this process: use make machine")
@pytest.mark.parametrize("kernel", ["forward", "backward_dq", "backward_dkdv"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_planted_in_a_kernel_is_caught(mistake, kernel):
    """By a fault or a wrong result, at the last, middle or first place: some masks only keep what is in bounds."""
    T, pattern, replacement = MISTAKES[mistake]
    architecture = "sm_90" if "wgmma" in mistake else "sm_80"
    places = []

    def plant(name, text):
        found = list(re.finditer(pattern, text)) if name == f"attention.{kernel}" else []
        if not found:
            return text
        at = found[(len(found) - 1) * (2 - len(places)) // 2]
        places.append(at.start())
        return text[: at.start()] + at.expand(replacement) + text[at.end() :]

    for _ in range(3):
        before = len(places)
        try:
            emulated_attention(architecture, T, plant)
        except (RuntimeError, AssertionError):
            return
        if len(places) == before:
            pytest.skip("no such line")
    pytest.fail(f"not caught at characters {places}")


@pytest.mark.skipif("EMULATE" not in os.environ, reason="kernels are interpreted in this process: use make machine")
@pytest.mark.parametrize(("architecture", "T"), [("sm_80", 100), ("sm_80", 256), ("sm_90", 256)])
def test_without_a_mistake_attention_passes(architecture, T):
    emulated_attention(architecture, T)
