"""
Memory that watches its accesses: bounds, alignment, races, asynchronous copies; and what each access costs.

Two accesses to the same bytes race if they come from different threads, one of them writes, and no barrier of their
program, or of their warp if they share one, lies between them. Between programs there is never a barrier. So unless a
race is reported, what threads see when they run in step is what they see in any order.
"""

import numpy as np

BANKS, SECTOR_BYTES, WARP = 32, 32, 32
BARRIER, PROGRAM = 2**20, 2**40  # a time is program * PROGRAM + barriers passed * BARRIER + warp barriers passed


class History:
    """Per granule: which thread wrote last and when, and which threads have read since the last barrier."""

    def __init__(self, granules: int):
        self.writer, self.first, self.last = np.full((3, granules), -1, np.int32)  # threads of the grid
        self.written, self.read = np.full((2, granules), -1, np.int64)  # times
        self.lowest, self.highest = np.full(granules, 2**30, np.int32), np.full(granules, -1, np.int32)  # programs

    def unordered_writes(self, at: np.ndarray, thread: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Return which granules another thread has written with no barrier since."""
        written, writer = self.written[at], self.writer[at]
        ordered = (written // BARRIER < time // BARRIER) & (written // PROGRAM == time // PROGRAM)
        ordered |= (writer // WARP == thread // WARP) & (written < time)
        return (writer >= 0) & (writer != thread) & ~ordered

    def has_readers(self, at: np.ndarray, thread: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Return which granules `first` to `last` have read with no barrier since."""
        read, warp = self.read[at], thread // WARP
        alone = (self.first[at] // WARP == warp) & (self.last[at] // WARP == warp)
        return (read // BARRIER == time // BARRIER) & ~(alone & (read < time))

    def note_reads(self, at: np.ndarray, thread: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Record reads, in order of threads; return which are races."""
        others = self.has_readers(at, thread, time)
        first = np.where(others, np.minimum(self.first[at], thread), thread)
        last = np.where(others, np.maximum(self.last[at], thread), thread)
        self.first[at[::-1]], self.last[at], self.read[at] = first[::-1], last, time  # of equal places the last stays
        program = time // PROGRAM
        self.lowest[at[::-1]] = np.minimum(self.lowest[at], program)[::-1]
        self.highest[at] = np.maximum(self.highest[at], program)
        return self.unordered_writes(at, thread, time)

    def note_writes(self, at: np.ndarray, thread: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Record writes; return which are races."""
        program = time // PROGRAM
        bad = self.has_readers(at, thread, time) & ((self.first[at] != thread) | (self.last[at] != thread))
        bad |= (self.highest[at] > program) | (self.lowest[at] < program)
        bad |= self.unordered_writes(at, thread, time)
        self.writer[at], self.written[at] = thread, time
        return bad


class Memory:
    """
    The bytes of a tensor, or of the shared memories of several programs.

    start:      address of data[0], a multiple of 16
    data:       bytes as a view that kernels read and write, of a length that is a multiple of 16
    granule:    the bytes that History keeps apart
    first, end: the addresses that may be accessed; all if not given
    """

    def __init__(self, start: int, data: np.ndarray, granule: int, first: int = 0, end: int = 2**62):
        self.start, self.granule, self.first, self.end = start, granule, max(first, start), min(end, start + len(data))
        self.views = {width: data.view(f"u{width}") for width in (1, 2, 4, 8)}
        self.history = History(len(data) // granule)
        self.in_flight, self.unfenced = np.zeros((2, len(data) // granule), np.bool_)  # of shared memory: a copy is to
        # fill it; written, and no fence.proxy.async since


def wavefronts(group: np.ndarray, address: np.ndarray, size: int) -> tuple[int, int]:
    """
    Return the wavefronts of accesses to shared memory and the least that as many distinct words need.

    A warp is served 128 bytes at a time: `group` says which accesses go together. In a wavefront each of 32 banks gives
    one word of 4 bytes.
    """
    words = (address[:, None] // 4 + np.arange(max(1, size // 4))).ravel()
    distinct = np.unique(np.repeat(group, max(1, size // 4)) << 32 | words)
    _, index = np.unique(distinct >> 32, return_inverse=True)
    per_bank = np.bincount(index * BANKS + distinct % BANKS, minlength=(index.max() + 1) * BANKS).reshape(-1, BANKS)
    return int(per_bank.max(axis=1).sum()), int((-(-per_bank.sum(axis=1) // BANKS)).sum())


def sectors(warp: np.ndarray, address: np.ndarray, size: int) -> tuple[int, int]:
    """Return the 32-byte sectors that each warp's accesses to global memory touch, and the least for the same bytes."""
    touched = len(np.unique(warp << 47 | address // SECTOR_BYTES))
    _, distinct = np.unique(np.unique(warp << 47 | address // size) >> 47, return_counts=True)
    return touched, int((-(-distinct * size // SECTOR_BYTES)).sum())
