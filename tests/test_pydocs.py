"""data/pydocs.py, on the topics of the Python that runs the tests."""

import subprocess
import sys

import numpy as np
import pytest

from data.files import UserError
from data.pydocs import prepare, read_topics, validation_topics
from data.shards import open_split
from data.tokenizer import from_spec


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pydocs")
    return folder, prepare(folder)


def documents(folder, split):
    opened = open_split(folder, split)
    opened.verify()
    tokenizer = from_spec(opened.tokenizer_spec)
    ids = opened.read(0, opened.n_tokens)
    assert ids[0] == tokenizer.eot
    return [tokenizer.decode(document) for document in np.split(ids, np.flatnonzero(ids == tokenizer.eot))[1:]]


def test_every_topic_is_one_document_behind_an_end_of_text_token(dataset):
    found = documents(dataset[0], "train") + documents(dataset[0], "val")
    assert sorted(found) == sorted("\n" + text for text in read_topics().values())


def test_validation_is_about_a_tenth_and_shares_no_paragraph_with_training(dataset):
    folder, line = dataset
    train, val = documents(folder, "train"), documents(folder, "val")
    assert 0.05 < len("".join(val)) / len("".join(train + val)) < 0.2
    seen = " ".join("".join(train).split())
    for document in val:
        for paragraph in document.split("\n\n"):
            even = " ".join(paragraph.split())
            assert len(even) < 40 or even not in seen
    assert line.startswith(f"{folder}: char tokenizer, vocabulary ") and " train, " in line


def test_topics_that_share_a_paragraph_are_never_held_out():
    shared = "A paragraph of more than forty characters that two of them have."
    topics = {f"t{i}": f"This is the only text of topic number {i}, which none shares." for i in range(13)}
    topics |= {"a": f"{shared}\n\nOne.", "b": f"Two.\n\n   {shared.replace(' of', chr(10) + '   of')}\n\nTwo."}
    assert validation_topics(dict(sorted(topics.items()))) == ["t0", "t3", "t9"]
    assert validation_topics({"a": shared, "b": shared}) == []


@pytest.mark.parametrize("module", ["no_such_module", "no_such_package.topics", "string"])
def test_a_python_without_the_topics_is_a_data_error(module):
    with pytest.raises(UserError, match=f"lacks {module}.*python -m data.text FILES"):
        read_topics(module)


def test_the_command_prints_one_line_and_makes_the_same_dataset_again(dataset, tmp_path):
    command = [sys.executable, "-m", "data.pydocs", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    for split in ("train", "val"):
        assert open_split(dataset[0], split).fingerprint == open_split(tmp_path, split).fingerprint
