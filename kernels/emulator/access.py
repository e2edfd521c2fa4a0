"""Instructions that access memory, each access checked, and barriers."""

from collections.abc import Iterator

import numpy as np

from kernels.emulator.memory import BARRIER, WARP, Memory, sectors, wavefronts
from kernels.emulator.ptx import DTYPES, SHARED_BASE, Address, Instruction, Register
from kernels.emulator.threads import Threads

# ------------------------------------------------------------------------------ places


def addresses(t: Threads, threads: np.ndarray, address: Address) -> np.ndarray:
    dtype = address.base.stored if type(address.base) is Register else DTYPES["u32"]
    return np.broadcast_to(t.read(address.base, dtype), t.n)[threads].astype(np.int64) + address.offset


def count_cost(t: Threads, space: str, threads: np.ndarray, found: np.ndarray, size: int) -> None:
    if t.launch.counting and len(threads):
        count, group = (sectors, WARP) if space == "global" else (wavefronts, min(WARP, 128 // size))
        opcode = ".".join((t.at.head, *t.at.modifiers, *t.at.types))
        t.launch.costs[t.at.source, space, opcode] += count(threads // group, found, size)


def in_shared(t: Threads, threads: np.ndarray, found: np.ndarray, size: int) -> np.ndarray:
    """Return the places in t.shared of accesses of `size` bytes at these addresses; faults go to the first bytes."""
    place = found - SHARED_BASE
    good = (place >= 0) & (place + size <= t.launch.shared_bytes)
    if not good.all():
        t.fault(f"byte {place[~good][0]} of a program's {t.launch.shared_bytes} bytes of shared memory is accessed")
    if (found % size).any():
        t.fault("a misaligned access to shared memory")
    return np.where(good, place, 0) // size * size + t.slot[threads] * t.stride


def shared_places(t: Threads, threads: np.ndarray, address: Address, size: int) -> np.ndarray:
    found = addresses(t, threads, address)
    count_cost(t, "shared", threads, found, size)
    return in_shared(t, threads, found, size)


def in_tensors(
    t: Threads, threads: np.ndarray, address: Address, size: int
) -> Iterator[tuple[Memory, np.ndarray, np.ndarray]]:
    """Yield (tensor, which of the threads, places in it) for every tensor that is accessed."""
    found = addresses(t, threads, address)
    count_cost(t, "global", threads, found, size)
    left = found % size == 0
    if not left.all():
        t.fault(f"a misaligned access of {size} bytes to global memory")
    for tensor in t.launch.tensors:
        which = np.flatnonzero(left & (found >= tensor.first) & (found + size <= tensor.end))
        if len(which):
            yield tensor, which, found[which] - tensor.start
            left[which] = False
            if not left.any():
                return
    if left.any():
        bad = found[left][0]
        near = min(t.launch.tensors, key=lambda tensor: max(tensor.first - bad, bad - tensor.end))
        nearest = f"byte {bad - near.first} of one of {near.end - near.first} bytes"
        t.fault(f"{left.sum()} threads access memory outside every tensor: {nearest}")


# ----------------------------------------------------------------------------- accesses


def granules(t: Threads, memory: Memory, threads: np.ndarray, place: np.ndarray, size: int) -> tuple:
    """Return the granules of accesses of `size` bytes, and the thread and time of each."""
    at = place[:, None] // memory.granule + np.arange(size // memory.granule)
    return at.ravel(), np.repeat(t.number[threads], at.shape[1]), np.repeat(t.time[threads], at.shape[1])


def report_race(t: Threads, verb: str, memory: Memory, bad: np.ndarray) -> None:
    if bad.any():
        t.fault(f"race in {'shared' if memory is t.shared else 'global'} memory at a {verb}")


def load(t: Threads, memory: Memory, threads: np.ndarray, place: np.ndarray, width: int, count: int) -> np.ndarray:
    """Return (threads, count) items of `width` bytes."""
    at, thread, time = granules(t, memory, threads, place, width * count)
    if memory is t.shared:
        if memory.in_flight[at].any():
            t.fault("shared memory is read that an asynchronous copy is still to fill")
        if (memory.history.writer[at] < 0).any():
            t.fault("shared memory is read that nobody wrote")
    report_race(t, "read", memory, memory.history.note_reads(at, thread, time))
    return memory.views[width][place[:, None] // width + np.arange(count)]


def note_writes(t: Threads, memory: Memory, threads: np.ndarray, place: np.ndarray, size: int) -> np.ndarray:
    """Record writes; return the granules."""
    at, thread, time = granules(t, memory, threads, place, size)
    if memory is t.shared:
        if memory.in_flight[at].any():
            t.fault("shared memory is written that an asynchronous copy is still to fill")
        memory.unfenced[at] = True
    report_race(t, "write", memory, memory.history.note_writes(at, thread, time))
    return at


def store(t: Threads, memory: Memory, threads: np.ndarray, place: np.ndarray, values: np.ndarray) -> None:
    """Write (threads, count) values. That several threads write the same value to one place is no fault."""
    width, count = values.dtype.itemsize, values.shape[1]
    note_writes(t, memory, threads, place, width * count)
    items = place[:, None] // width + np.arange(count)
    memory.views[width][items] = values
    if (memory.views[width][items] != values).any():
        t.fault("several threads write different values to one place")


def ld(t: Threads, i: Instruction, mask) -> None:
    targets = i.operands[0] if isinstance(i.operands[0], list) else [i.operands[0]]
    address, width, count = i.operands[1], i.dtype.itemsize, len(targets)
    if "param" in i.modifiers:
        value = np.asarray(t.launch.parameters[address.base]).view(i.dtype)
        return t.put(targets[0], value.astype(f"{i.dtype.kind}{targets[0].stored.itemsize}"), mask)
    threads = t.chosen(mask)
    values = np.zeros((t.n, count), f"u{width}")
    if "shared" in i.modifiers and len(threads):
        values[threads] = load(t, t.shared, threads, shared_places(t, threads, address, i.width), width, count)
    elif len(threads):
        for tensor, which, place in in_tensors(t, threads, address, i.width):
            values[threads[which]] = load(t, tensor, threads[which], place, width, count)
    for n, target in enumerate(targets):
        t.put(target, values[:, n].astype(target.stored), mask)


def st(t: Threads, i: Instruction, mask) -> None:
    address, sources = i.operands
    sources = sources if isinstance(sources, list) else [sources]
    bits, threads = np.dtype(f"u{i.dtype.itemsize}"), t.chosen(mask)
    values = np.stack([np.broadcast_to(t.read(source, bits), t.n)[threads] for source in sources], axis=1)
    if "shared" in i.modifiers and len(threads):
        store(t, t.shared, threads, shared_places(t, threads, address, i.width), values)
    elif len(threads):
        for tensor, which, place in in_tensors(t, threads, address, i.width):
            store(t, tensor, threads[which], place, values[which])


# ------------------------------------------------------------------- asynchronous copies


def cp(t: Threads, i: Instruction, mask) -> None:
    if "commit_group" in i.modifiers:
        t.copy_group[t.chosen(mask)] += 1
    elif "wait_group" in i.modifiers:
        finish_copies(t, np.where(True if mask is None else mask, t.copy_group - int(i.operands[0].text, 0), 0))
    else:
        start_copies(t, i, t.chosen(mask))


def start_copies(t: Threads, i: Instruction, threads: np.ndarray) -> None:
    """Read the bytes now; they appear when their group is waited for."""
    target, source, _, *wanted = i.operands
    bytes_read = np.broadcast_to(t.read(wanted[0], DTYPES["u32"]) if wanted else i.width, t.n)[threads]
    if not np.isin(bytes_read, (0, i.width)).all():
        t.refuse()
    place = shared_places(t, threads, target, i.width)
    data = np.zeros((len(threads), i.width), np.uint8)  # what is not read is zero
    reading = np.flatnonzero(bytes_read)
    if len(reading):
        for tensor, which, byte in in_tensors(t, threads[reading], source, i.width):
            data[reading[which]] = load(t, tensor, threads[reading[which]], byte, 1, i.width)
    if len(threads):
        t.shared.in_flight[note_writes(t, t.shared, threads, place, i.width)] = True
        t.copies.append((t.copy_group[threads], threads, place, data))


def finish_copies(t: Threads, before: np.ndarray) -> None:
    """Finish each thread's copies of groups before this one."""
    waiting = []
    for group, threads, place, data in t.copies:
        done = group < before[threads]
        if done.any():
            t.shared.in_flight[granules(t, t.shared, threads[done], place[done], data.shape[1])[0]] = False
            store(t, t.shared, threads[done], place[done], data[done])
        if not done.all():
            waiting.append((group[~done], threads[~done], place[~done], data[~done]))
    t.copies = waiting


# ----------------------------------------------------------------------------- barriers


def bar(t: Threads, i: Instruction, mask) -> None:
    if i.modifiers[0] == "warp":
        t.time[t.whole_warps(mask)] += 1
        return
    here = np.ones(t.n, np.bool_) if mask is None else mask
    programs = here.reshape(-1, t.kernel.threads)
    if (programs.any(axis=1) != programs.all(axis=1)).any():
        t.fault("not all threads reach a barrier")
    t.time[here] += BARRIER


def fence(t: Threads, i: Instruction, mask) -> None:
    """Let wgmma see what the programs of these threads have written to shared memory."""
    t.shared.unfenced.reshape(-1, t.stride // t.shared.granule)[t.slot[t.chosen(mask)]] = False


CACHE = ("L1", "L2", "evict_last", "evict_first", "cache_hint", "cs")  # hints: no effect on what is read or written
INSTRUCTIONS = {  # head -> what executes it, and the modifiers that it may have
    "ld": (ld, ("param", "global", "shared", "v2", "v4", *CACHE)),
    "st": (st, ("global", "shared", "v2", "v4", *CACHE)),
    "cp": (cp, ("async", "ca", "cg", "shared", "global", "commit_group", "wait_group")),
    "bar": (bar, ("sync", "warp")),
    "fence": (fence, ("proxy", "async", "shared", "cta")),
}
