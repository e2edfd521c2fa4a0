"""loss.png and the figures beside a run's losses: counted from its text, or published for that very text."""

import math

import numpy as np
import pytest

from data.shards import open_split, write_meta, write_shard
from data.tokenizer import CharTokenizer, gpt2
from training import curves
from training.curves import GPT2_124M, reference_losses

TOKENS = np.tile(np.arange(5), 40).astype("<u2")


def dataset_like_fineweb(folder, tokenizer):
    """The validation split of a dataset whose shards have the names that data/fineweb.py gives."""
    folder.mkdir()
    names = {"train": "train_00000_001.npy", "val": "val_00000_000.npy"}
    write_meta(folder, tokenizer, {split: [write_shard(folder / name, TOKENS)] for split, name in names.items()})
    return open_split(folder, "val")


@pytest.mark.parametrize(
    "name, published",
    [("fineweb-edu-10B", 3.2924), ("fineweb-edu-100B", None), ("my-fineweb-notes", None), ("mine", None)],
)
def test_references_are_what_the_text_gives_and_what_is_published_for_it(tmp_path, name, published):
    found = reference_losses(dataset_like_fineweb(tmp_path / name, gpt2()))
    assert found["guessing at random"] == pytest.approx(math.log(50257))
    assert found["token frequencies"] < found["guessing at random"]
    assert found.get(GPT2_124M) == published


@pytest.mark.parametrize("name, published", [("fineweb", 3.425), ("finewebedu", 3.2924), ("fineweb_notes", None)])
def test_ready_made_shards_are_known_by_their_file(tmp_path, name, published):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(TOKENS)
    (tmp_path / f"{name}_val_000000.bin").write_bytes(header.tobytes() + TOKENS.astype("<u2").tobytes())
    assert reference_losses(open_split(tmp_path, "val")).get(GPT2_124M) == published


def test_characters_are_compared_with_no_tokens_of_gpt2(tmp_path):
    split = dataset_like_fineweb(tmp_path / "fineweb-edu-10B", CharTokenizer("abcde", documents=False))
    assert GPT2_124M not in reference_losses(split)


def test_the_smoothed_loss_starts_at_the_first_one_and_is_the_mean_around_a_step():
    losses = [9.0] + [float(i % 2) for i in range(299)]
    smooth = curves.smoothed(losses)
    assert smooth[0] == 9.0 and len(smooth) == 300
    assert smooth[150] == pytest.approx(np.mean(losses[144:157])) and smooth[-1] == pytest.approx(np.mean(losses[-7:]))


def test_the_picture_shows_what_was_measured(tmp_path):
    def drawn(**more):
        record = {"step": 1, "tokens": 10, "loss": 3.0}
        curves.draw([record, record | {"tokens": 20} | more], tmp_path / "loss.png", "run", {"random": 4.2}, {"x": 0.3})
        return (tmp_path / "loss.png").read_bytes()

    pictures = {drawn(), drawn(val_loss=1.0), drawn(hellaswag_acc_norm=0.3)}
    assert len(pictures) == 3 and all(picture.startswith(b"\x89PNG") for picture in pictures)
