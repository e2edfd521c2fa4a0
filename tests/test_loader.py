"""data/loader.py."""

import pytest
import torch
from test_shards import counting

from data.files import UserError
from data.loader import Loader, evaluation_windows, read_windows


@pytest.mark.parametrize("n_tokens, block_size", [(101, 10), (100, 10), (103, 10), (64, 1), (31, 30), (1000, 7)])
def test_in_order_every_window_of_the_text_comes_once_an_epoch(tmp_path, n_tokens, block_size):
    split = counting(tmp_path, n_tokens)
    windows = (n_tokens - 1) // block_size
    loader = Loader(split, block_size, 1, seed=0, shuffle=False)
    for epoch in range(2):
        batches = [loader.batch(epoch * windows + i) for i in range(windows)]
        inputs, targets = (torch.cat(tensors).flatten() for tensors in zip(*batches, strict=True))
        assert inputs.tolist() == [*range(windows * block_size)]
        assert targets.tolist() == [*range(1, windows * block_size + 1)]


@pytest.mark.parametrize("n_tokens, block_size", [(1000, 10), (999, 10), (1003, 7), (64, 1), (40, 20), (31, 30)])
def test_shuffled_every_token_is_used_once_an_epoch_but_for_the_ends(tmp_path, n_tokens, block_size):
    loader = Loader(counting(tmp_path, n_tokens), block_size, 1, seed=3)
    for epoch in range(3):
        batches = [loader.batch(epoch * loader.windows + i) for i in range(loader.windows)]
        used = torch.cat([inputs for inputs, _ in batches]).flatten().sort().values.tolist()
        assert used == [*range(used[0], used[0] + loader.windows * block_size)]
        assert used[0] < block_size and n_tokens - len(used) < 2 * block_size
        assert all(torch.equal(inputs + 1, targets) for inputs, targets in batches)


def test_each_epoch_has_its_own_order_and_its_own_offset(tmp_path):
    loader = Loader(counting(tmp_path, 3000), 10, 1, seed=0)
    steps = range(6 * loader.windows)
    starts = [int(loader.batch(step)[0][0, 0]) for step in steps]
    epochs = [starts[i : i + loader.windows] for i in steps[:: loader.windows]]
    assert len({starts[0] % 10 for starts in epochs}) > 2
    ranks = [[sorted(starts).index(start) for start in starts] for starts in epochs]
    assert len({tuple(order) for order in ranks}) == 6
    assert all(order != sorted(order) for order in ranks)
    short = Loader(counting(tmp_path / "short", 30), 5, 1, seed=0)  # in the end every offset is drawn
    assert {int(short.batch(epoch * short.windows)[0][0, 0]) % 5 for epoch in range(60)} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch_sequences", [3, 4, 10, 25])
def test_batches_run_on_across_the_ends_of_epochs(tmp_path, batch_sequences, shuffle):
    """Batches of any size are cut from the one list of sequences that batches of one give."""
    split = counting(tmp_path, 100)
    one = Loader(split, 9, 1, seed=5, shuffle=shuffle)
    many = Loader(split, 9, batch_sequences, seed=5, shuffle=shuffle)
    assert many.windows in (10, 11)
    sequences = torch.cat([one.batch(step)[0] for step in range(batch_sequences * 6)])
    assert torch.equal(torch.cat([many.batch(step)[0] for step in range(6)]), sequences)


@pytest.mark.parametrize("world_size", [2, 3, 4, 12])
def test_the_ranks_together_see_the_batch_of_one_process(tmp_path, world_size):
    split = counting(tmp_path, 200)
    whole = Loader(split, 8, 12, seed=1)
    ranks = [Loader(split, 8, 12, seed=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(5):
        shares = [rank.batch(step) for rank in ranks]
        assert all(inputs.shape == targets.shape == (12 // world_size, 8) for inputs, targets in shares)
        for together, alone in zip(zip(*shares, strict=True), whole.batch(step), strict=True):
            assert torch.equal(torch.cat(together), alone)


def test_a_batch_depends_on_seed_and_step_alone(tmp_path):
    split = counting(tmp_path, 300)
    expected = [Loader(split, 8, 4, seed=1).batch(step) for step in range(40)]
    loader = Loader(split, 8, 4, seed=1)
    for step in [0, 1, 2, 2, 30, 31, 3, 39, 0, 38, 39, 5, 6, 7, 7, 4]:
        assert all(torch.equal(a, b) for a, b in zip(loader.batch(step), expected[step], strict=True))
    assert not torch.equal(Loader(split, 8, 4, seed=2).batch(0)[0], expected[0][0])


def test_changing_a_batch_in_place_changes_no_other(tmp_path):
    split = counting(tmp_path, 300)
    loader, fresh = Loader(split, 8, 4, seed=1), Loader(split, 8, 4, seed=1)
    inputs, targets = loader.batch(0)
    inputs.zero_()
    assert torch.equal(targets, fresh.batch(0)[1])
    assert all(torch.equal(a, b) for a, b in zip(loader.batch(0), fresh.batch(0), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_are_those_of_the_cpu(tmp_path):
    split = counting(tmp_path, 300)
    cpu, gpu = Loader(split, 8, 4, seed=1), Loader(split, 8, 4, seed=1, device="cuda")
    for step in (0, 1, 2, 30):
        for a, b in zip(cpu.batch(step), gpu.batch(step), strict=True):
            assert b.device.type == "cuda" and torch.equal(a, b.cpu())


def test_a_split_of_a_single_window_and_one_too_short(tmp_path):
    split = counting(tmp_path, 9)
    for step in range(4):
        inputs, targets = Loader(split, 8, 2, seed=0).batch(step)
        assert inputs.tolist() == [[*range(8)]] * 2 and targets.tolist() == [[*range(1, 9)]] * 2
        for tensor in (inputs, targets):
            assert tensor.dtype == torch.int64 and tensor.is_contiguous() and tensor.device.type == "cpu"
    too_short = "holds 9 tokens, too few for --block-size 9, which needs 10: lower --block-size or give more"
    with pytest.raises(UserError, match=too_short):
        Loader(split, 9, 2, seed=0)
    with pytest.raises(UserError, match=too_short):
        evaluation_windows(split, 9, 100)


def test_impossible_batches_are_refused(tmp_path):
    split = counting(tmp_path, 50)
    with pytest.raises(UserError, match="a batch of 6 sequences cannot be divided among 4 ranks"):
        Loader(split, 8, 6, seed=0, world_size=4)
    with pytest.raises(UserError, match="a batch of 0 sequences"):
        Loader(split, 8, 0, seed=0)
    with pytest.raises(UserError, match="the seed is -1"):
        Loader(split, 8, 6, seed=-1)


@pytest.mark.parametrize(
    "n_tokens, asked, count", [(100, 40, 4), (100, 49, 4), (100, 50, 5), (100, 1, 1), (100, 10**9, 9), (101, 10**9, 10)]
)
def test_evaluation_sees_the_same_first_windows_every_time(tmp_path, n_tokens, asked, count):
    split = counting(tmp_path, n_tokens)
    starts = evaluation_windows(split, 10, asked)
    assert list(starts) == [10 * i for i in range(count)]
    inputs, targets = read_windows(split, starts, 10)
    assert inputs.flatten().tolist() == [*range(10 * count)] and torch.equal(targets, inputs + 1)
    assert inputs.dtype == targets.dtype == torch.int64
    assert read_windows(split, starts[:0], 10)[0].shape == (0, 10)
