"""
Instructions of whole warps: shuffles, matrices in shared memory, the tensor core.

wgmma runs at once, but its result may not be used before its group is waited for, nor may its operands in shared memory
change until then. Not checked: wgmma.fence, and the order in which registers reach it.

Source of the layouts: NVIDIA, "Parallel Thread Execution ISA", "Matrix Fragments for mma.m16n8k16" and "Asynchronous
warpgroup-level matrix instructions", https://docs.nvidia.com/cuda/parallel-thread-execution
"""

import re

import numpy as np

from kernels.emulator import arithmetic
from kernels.emulator.access import in_shared, load, shared_places, store
from kernels.emulator.memory import WARP
from kernels.emulator.ptx import DTYPES, Instruction, Register
from kernels.emulator.threads import Threads

LANES = np.arange(WARP)
SWIZZLE_BYTES = {1: 128, 2: 64, 3: 32}  # of a descriptor's mode: bytes per row


def _places() -> tuple:
    """Return the lane, register and half that hold an element of a (16 k, 16 m), a (16 k, 8 n) and a (16 m, 8 n)."""
    k, m = np.divmod(np.arange(256).reshape(16, 16), 16)
    row, column = np.divmod(np.arange(128).reshape(16, 8), 8)
    a = m % 8 * 4 + k % 8 // 2, m // 8 + k // 8 * 2, k % 2
    b = column * 4 + row % 8 // 2, row // 8, row % 2
    c = row % 8 * 4 + column // 2, row // 8 * 2 + column % 2
    return a, b, c


A_PLACE, B_PLACE, C_PLACE = _places()


def shfl(t: Threads, i: Instruction, mask) -> None:
    target, source, by, clamp, members = i.operands
    if members.text != "-1" or clamp.text != "31":
        t.refuse()
    threads = t.whole_warps(mask)
    by = np.broadcast_to(t.read(by, DTYPES["u32"]), t.n)[threads]
    lane = (LANES ^ by if "bfly" in i.modifiers else by) & 31
    values = t.read_words([source], threads)[..., 0]
    t.put_in(target, threads, np.take_along_axis(values, lane.astype(np.int64), axis=1), mask)


# ---------------------------------------------------------------------------- matrices


def ldmatrix(t: Threads, i: Instruction, mask) -> None:
    targets, address = i.operands
    threads = t.whole_warps(mask)
    givers = threads[:, : len(targets) * 8].ravel()  # of the addresses of rows of 16 bytes
    rows = load(t, t.shared, givers, shared_places(t, givers, address, 16), 2, 8)
    matrices = rows.reshape(-1, len(targets), 8, 8)
    matrices = matrices.swapaxes(2, 3) if "trans" in i.modifiers else matrices
    pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, len(targets), WARP)
    for n, target in enumerate(targets):
        t.put_in(target, threads, pairs[:, n], mask)


def stmatrix(t: Threads, i: Instruction, mask) -> None:
    address, sources = i.operands
    threads = t.whole_warps(mask)
    givers = threads[:, : len(sources) * 8].ravel()
    words = np.ascontiguousarray(t.read_words(sources, threads).swapaxes(1, 2))
    matrices = words.view(np.uint16).reshape(-1, len(sources), 8, 8)
    matrices = matrices.swapaxes(2, 3) if "trans" in i.modifiers else matrices
    store(t, t.shared, givers, shared_places(t, givers, address, 16), matrices.reshape(-1, 8))


def fragment(t: Threads, registers: list[Register], threads: np.ndarray, type: str) -> np.ndarray:
    """Return what warps hold of a matrix, float32 of (warps, 32, registers), 16-bit types (..., registers, 2)."""
    words = t.read_words(registers, threads)
    return words.view(np.float32) if type == "f32" else arithmetic.widen(words[..., None].view(np.uint16), type)


def mma(t: Threads, i: Instruction, mask) -> None:
    d, a, b, c = i.types
    if d != "f32" or c != "f32" or "m16n8k16" not in i.modifiers:
        t.refuse()
    threads = t.whole_warps(mask)
    a, b, c = (fragment(t, o, threads, type) for o, type in zip(i.operands[1:], (a, b, c), strict=True))
    a, b = (np.ascontiguousarray(m[:, *at].swapaxes(0, 1)) for m, at in ((a, A_PLACE), (b, B_PLACE)))
    result = arithmetic.multiply_add(a, b, c[:, *C_PLACE])
    for n, target in enumerate(i.operands[0]):
        t.put_in(target, threads, result[:, LANES // 4 + n // 2 * 8, LANES % 4 * 2 + n % 2], mask)


# ------------------------------------------------------------------------------- wgmma


def wgmma(t: Threads, i: Instruction, mask) -> None:
    if "commit_group" in i.modifiers:
        t.product_group[t.chosen(mask)] += 1
    elif "wait_group" in i.modifiers:
        finish_products(t, np.where(True if mask is None else mask, t.product_group - int(i.operands[0].text), 0))
    elif "mma_async" in i.modifiers:
        multiply_warpgroups(t, i, mask)


def matrix_in_shared(t: Threads, descriptor, groups: np.ndarray, rows: int, transposed: bool) -> tuple:
    """
    Return a matrix (16 k, warpgroups, rows) as bits, and what was read: the threads, places and their number of bytes.

    A row, of k or if `transposed` of the other dimension, is cut into pieces of at most `width` bytes; eight rows of
    such pieces lie together, their 16-byte chunks permuted by the address.
    """
    bits = np.broadcast_to(t.read(descriptor, DTYPES["u64"]), t.n)[groups].astype(np.int64)
    if (bits != bits[:, :1]).any():
        t.fault("the threads of a warpgroup give different descriptors")
    start, leading, stride = (((bits[:, 0] >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    modes = np.unique((bits[:, 0] >> 62) & 3)
    if len(modes) != 1 or modes[0] not in SWIZZLE_BYTES or ((bits[:, 0] >> 49) & 7).any():
        t.refuse()
    width = SWIZZLE_BYTES[int(modes[0])]
    if transposed:  # chunks of 8 rows, for each k
        k, chunk = np.divmod(np.arange(16 * (rows // 8)), rows // 8)
        piece, inside = np.divmod(chunk, width // 16)
        steps = piece * leading[:, None] + inside * 16 + k % 8 * width + k // 8 * stride[:, None]
    else:  # chunks of 8 k, for each row
        row, chunk = np.divmod(np.arange(rows * 2), 2)
        steps = row // 8 * stride[:, None] + row % 8 * width + chunk * 16
    found = start[:, None] + steps
    found ^= (found >> 7 & (width // 16 - 1)) << 4
    threads = np.repeat(groups[:, 0], found.shape[1])
    place = in_shared(t, threads, found.ravel(), 16)
    values = load(t, t.shared, threads, place, 2, 8)
    if t.shared.unfenced[place // t.shared.granule].any():
        t.fault("wgmma reads shared memory that was written with no fence.proxy.async since")
    if transposed:
        return values.reshape(len(groups), 16, rows).swapaxes(0, 1), (threads, place)
    return values.reshape(len(groups), rows, 16).transpose(2, 0, 1), (threads, place)


def multiply_warpgroups(t: Threads, i: Instruction, mask) -> None:
    rows = int(re.fullmatch(r"m64n(\d+)k16", i.modifiers[-1])[1])
    d, type, _ = i.types
    targets, a, b, scale, *more = i.operands
    from_registers = isinstance(a, list)
    numbers = [int(each.text) for each in more]  # signs of a and b, and which of them are transposed
    if d != "f32" or numbers[:2] != [1, 1]:
        t.refuse()
    groups = t.whole_warps(mask, 4 * WARP)
    warps = groups.reshape(-1, WARP)
    reads = []
    if from_registers:
        a = fragment(t, a, warps, type)[:, *A_PLACE].swapaxes(0, 1)
    else:
        a, read = matrix_in_shared(t, a, groups, 64, bool(numbers[2]))
        reads.append(read)
        a = arithmetic.widen(np.ascontiguousarray(a), type).reshape(16, -1, 16)
    b, read = matrix_in_shared(t, b, groups, rows, bool(numbers[-1]))
    reads.append(read)
    b = np.repeat(arithmetic.widen(np.ascontiguousarray(b), type), 4, axis=1)
    add = np.broadcast_to(t.read(scale, DTYPES["pred"]), t.n)[warps[:, :1]]
    for column in range(0, rows, 8):
        registers = targets[column // 2 : column // 2 + 4]
        c = np.zeros((len(warps), WARP, 4), np.float32)
        if add.any():
            c = np.where(add[..., None], fragment(t, registers, warps, "f32"), c)
        result = arithmetic.multiply_add(a, b[:, :, column : column + 8], c[:, *C_PLACE])
        for n, target in enumerate(registers):
            t.put_in(target, warps, result[:, LANES // 4 + n // 2 * 8, LANES % 4 * 2 + n % 2], mask)
    waiting = np.zeros(t.n, np.bool_)
    waiting[groups] = True
    for target in targets:
        t.pending[target.name] = t.pending.get(target.name, False) | waiting
    t.products.append((np.where(waiting, t.product_group, np.iinfo(np.int64).max), [r.name for r in targets], reads))


def finish_products(t: Threads, before: np.ndarray) -> None:
    """Finish each thread's products of groups before this one; until now they have read their operands."""
    left = []
    for group, names, reads in t.products:
        done = group < before
        for threads, place in reads:
            own = done[threads]
            if own.any():
                load(t, t.shared, threads[own], place[own], 2, 8)
        group = np.where(done, np.iinfo(np.int64).max, group)
        if (group < np.iinfo(np.int64).max).any():
            left.append((group, names, reads))
    t.products = left
    still = {}
    for group, names, _ in left:
        for name in names:
            still[name] = still.get(name, False) | (group < np.iinfo(np.int64).max)
    t.pending = still


ALIGNED = ("sync", "aligned")
MATRICES = (*ALIGNED, "m8n8", "x1", "x2", "x4", "trans", "shared")
INSTRUCTIONS = {  # head -> what executes it, and the modifiers that it may have
    "shfl": (shfl, ("sync", "bfly", "idx")),
    "ldmatrix": (ldmatrix, MATRICES),
    "stmatrix": (stmatrix, MATRICES),
    "mma": (mma, (*ALIGNED, "m16n8k16", "row", "col")),
    "wgmma": (
        wgmma,
        (*ALIGNED, "mma_async", "fence", "commit_group", "wait_group", *(f"m64n{8 * n}k16" for n in range(1, 33))),
    ),
}
