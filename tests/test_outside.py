"""data/outside.py: what comes from outside is checked for its types and ranges."""

import json
import os

import pytest

from data.files import UserError
from data.outside import read_json
from data.shards import open_split
from data.text import read_text

SHAPE = {"name": str, "sizes": [range(1, 10)], "loss?": (float, None), "more?": {"on": bool}}
GOOD = {"name": "x", "sizes": [1, 9], "loss": 0.5, "more": {"on": True}, "unknown": {}}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"name": 3}, "name is 3, not a text"),
        ({"sizes": 3}, "sizes is 3, not a list"),
        ({"sizes": [1, 10]}, r"sizes\[1\] is 10, not a whole number from 1 to 9"),
        ({"sizes": [True]}, r"sizes\[0\] is True"),
        ({"sizes": [1.0]}, r"sizes\[0\] is 1.0"),
        ({"loss": "low"}, "loss is 'low', not a finite number"),
        ({"loss": float("inf")}, "loss is inf"),
        ({"more": {}}, "more.on is missing"),
        ({"more": None}, "more is None, not an object"),
    ],
)
def test_the_field_that_is_wrong_is_named_with_its_file(tmp_path, change, said):
    path = tmp_path / "file.json"
    path.write_text(json.dumps(GOOD), encoding="utf-8-sig")  # also with a byte order mark
    assert read_json(path, SHAPE) == GOOD
    path.write_text(json.dumps(GOOD | change), encoding="utf-8")
    with pytest.raises(UserError, match=f"file.json is corrupt: {said}.*: do that"):
        read_json(path, SHAPE, ": do that")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"null"]
)
def test_what_is_not_json_or_not_an_object_is_one_sentence(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="file.json is corrupt"):
        read_json(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="needs a pipe in a folder")
def test_a_pipe_is_not_waited_for(tmp_path):
    for name in ("file.json", "x_train_0.npy", "x_train_0.bin"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="file.json is corrupt: it is a pipe"):
        read_json(tmp_path / "file.json")
    with pytest.raises(UserError, match="no dataset in"):
        open_split(tmp_path, "train")
    assert read_text(tmp_path / "file.json") == ""
