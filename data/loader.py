"""Batches of token ids: a pure function of (split, seed, step).

The training text is cut into windows of block_size tokens. An epoch is every window once, in an order drawn from
(seed, epoch), and step s takes batch_sequences of them from index s * batch_sequences on, for any number of ranks. So
a resumed run sees the batches that the uninterrupted run would have seen.
"""

import functools
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from data.files import UserError
from data.shards import Split

IGNORED = -100  # a target that does not count in the loss, as in PyTorch


class Loader:
    """Batches of (inputs, targets) as a pure function of (seed, step): no state affects a batch.

    An epoch is the windows that start at offset, offset + block_size, ...: no token is the input of two of them, and
    they cross shard borders. With shuffle, epoch e draws the offset from [0, block_size) and the order of the windows
    from the seed [seed, e], so that fewer than 2 * block_size tokens at the two ends are skipped, others each time.
    Without it, the offset is 0 and the windows keep the order of the text.

    Rank r takes the sequences step * batch_sequences + j with j in [r * b, (r + 1) * b), b = batch_sequences /
    world_size. Raise UserError if that does not divide, or if the split is shorter than one window.
    """

    def __init__(
        self,
        split: Split,
        block_size: int,
        batch_sequences: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        shuffle: bool = True,
    ):
        _check_length(split, block_size)
        if batch_sequences < 1 or batch_sequences % world_size:
            raise UserError(f"a batch of {batch_sequences} sequences cannot be divided among {world_size} ranks")
        if seed < 0:
            raise UserError(f"the seed is {seed}: it must be 0 or more")
        self.split, self.block_size, self.batch_sequences = split, block_size, batch_sequences
        self.seed, self.shuffle, self.device = seed, shuffle, torch.device(device)
        if self.device == torch.device("cuda"):  # fix the index: the prefetch thread would take GPU 0
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.sequences = batch_sequences // world_size
        self.first = rank * self.sequences
        # The offset leaves room for one window in a short split, and every epoch has the same number of windows.
        self.largest_offset = min(block_size - 1, split.n_tokens - block_size - 1) if shuffle else 0
        self.windows = (split.n_tokens - 1 - self.largest_offset) // block_size
        # Two epochs, since one batch can end an epoch and begin the next.
        self._epoch_starts = functools.lru_cache(maxsize=2)(self._draw_epoch)
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._ahead = None  # (step, future): the batch being prefetched

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's (inputs, targets) of a step: each (batch_sequences // world_size, block_size) int64."""
        ahead, self._ahead = self._ahead, None
        rows = ahead[1].result() if ahead and ahead[0] == step else self._read(step)
        self._ahead = step + 1, self._thread.submit(self._read, step + 1)
        return _inputs_and_targets(rows.to(self.device, non_blocking=True), self.split)

    def _read(self, step: int) -> torch.Tensor:
        """Return (batch_sequences // world_size, block_size + 1) int64, in pinned memory if the device is a GPU."""
        first = step * self.batch_sequences + self.first
        places = (divmod(i, self.windows) for i in range(first, first + self.sequences))
        rows = _read_rows(self.split, [self._epoch_starts(epoch)[k] for epoch, k in places], self.block_size)
        if self.device.type != "cuda":
            return rows
        with torch.cuda.device(self.device):
            return rows.pin_memory()

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        """Return the starts of an epoch's windows, in reading order: (windows,) int64."""
        starts = np.arange(self.windows) * self.block_size
        if not self.shuffle:
            return starts
        random = np.random.default_rng([self.seed, epoch])
        return random.integers(self.largest_offset, endpoint=True) + random.permutation(starts)


def evaluation_windows(split: Split, block_size: int, n_tokens: int) -> np.ndarray:
    """Return the starts, (k,) int64, of the first n_tokens // block_size windows: at least one, at most all."""
    _check_length(split, block_size)
    count = min(max(n_tokens // block_size, 1), (split.n_tokens - 1) // block_size)
    return np.arange(count) * block_size


def read_windows(split: Split, starts: Iterable[int], block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (inputs, targets), each (len(starts), block_size) int64 on the CPU; targets are shifted by one."""
    return _inputs_and_targets(_read_rows(split, starts, block_size), split)


def count_scored(targets: torch.Tensor) -> torch.Tensor:
    """Count the targets that are not IGNORED."""
    return (targets != IGNORED).sum()


def _read_rows(split: Split, starts: Iterable[int], block_size: int) -> torch.Tensor:
    rows = [split.read(int(start), block_size + 1) for start in starts]
    return torch.from_numpy(np.stack(rows) if rows else np.empty((0, block_size + 1), np.int64))


def _inputs_and_targets(rows: torch.Tensor, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift by one. rows: (n, block_size + 1) int64. Targets that do not count in the loss become IGNORED."""
    inputs, targets = rows[:, :-1], rows[:, 1:]
    if split.partly_scored:
        inputs, targets = torch.where(inputs < 0, ~inputs, inputs), targets.masked_fill(targets < 0, IGNORED)
    return inputs.contiguous(), targets.contiguous()


def _check_length(split: Split, block_size: int) -> None:
    if split.n_tokens < block_size + 1:
        raise UserError(
            f"{split.label} holds {split.n_tokens} tokens, too few for --block-size {block_size}, which needs "
            f"{block_size + 1}: lower --block-size or give more text"
        )
