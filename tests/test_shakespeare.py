"""data/shakespeare.py. The real text is not part of the repository: tests of it skip where it is absent."""

import http.server
import sys
import threading
from pathlib import Path

import pytest
from test_text import decoded

from data.files import UserError
from data.shakespeare import main, prepare
from data.shards import open_split
from data.tokenizer import gpt2

REAL = Path(__file__).parents[1].parent / "shared" / "data" / "tinyshakespeare.txt"
real = pytest.mark.skipif(not REAL.exists(), reason="needs the real tiny shakespeare")


@real
@pytest.mark.parametrize(
    "tokenizer, counts",
    [
        ("char", "char tokenizer, vocabulary 65, tokens: 1,003,854 train, 111,540 val"),
        ("gpt2", "gpt2 tokenizer, vocabulary 50,257, tokens: 301,966 train, 36,059 val"),
    ],
)
def test_a_file_and_a_download_of_it_have_the_known_counts(tmp_path, capsys, tokenizer, counts):
    for source in ({"input": REAL}, {"url": REAL.as_uri()}):
        assert prepare(tmp_path, tokenizer=tokenizer, **source).endswith(counts)
        assert capsys.readouterr().err == ""
        assert decoded(tmp_path, "train") + decoded(tmp_path, "val") == REAL.read_text()


def test_another_text_of_your_own_is_used_with_a_note(tmp_path, capsys):
    path = tmp_path / "mine.txt"
    path.write_text("ROMEO: What, ho!\n" * 10)
    prepare(tmp_path / "out", path, tokenizer="gpt2")
    assert "mine.txt is not the original tiny Shakespeare; continuing with it" in capsys.readouterr().err
    assert decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val") == path.read_text()
    assert len(decoded(tmp_path / "out", "train")) == 153
    assert gpt2().eot not in open_split(tmp_path / "out", "train").read(0, 10)


def test_a_download_of_another_text_is_an_error(tmp_path):
    path = tmp_path / "input.txt"
    path.write_text("an apology from a proxy")
    with pytest.raises(UserError, match="sent 23 bytes with sha256 .* not tiny Shakespeare .*--input FILE"):
        prepare(tmp_path / "out", url=path.as_uri())
    assert not (tmp_path / "out").exists()


def test_a_download_that_breaks_off_is_an_error(tmp_path):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 1115394\r\n\r\nFirst Citizen:")

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(UserError, match="cannot download .*IncompleteRead.*--input FILE"):
            prepare(tmp_path, url=f"http://127.0.0.1:{server.server_port}/input.txt")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/in.txt", "file:///no/such/file", "http://no-such-host.invalid/"])
def test_without_network_the_error_names_the_way_out_and_an_older_dataset_stays(tmp_path, url):
    path = tmp_path / "mine.txt"
    path.write_text("To be, or not to be")
    prepare(tmp_path / "out", path)
    with pytest.raises(UserError, match="cannot download .*: give a copy of it with python -m .* --input FILE"):
        prepare(tmp_path / "out", url=url)
    assert decoded(tmp_path / "out", "val") == "be"


def test_a_bad_input_file_is_named(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b" \n" * 9)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, complaint in {"empty": "empty.txt is empty", "latin": "0xe9 at offset 3", "none": "No such file"}.items():
        with pytest.raises(UserError, match=complaint):
            prepare(tmp_path / "out", tmp_path / f"{name}.txt")
    (tmp_path / "fine.txt").write_text("fine")
    with pytest.raises(UserError, match="no tokenizer 'word'"):
        prepare(tmp_path / "out", tmp_path / "fine.txt", tokenizer="word")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_beside_where_it_stands(tmp_path, monkeypatch, capsys):
    (tmp_path / "in.txt").write_text("To be, or not to be")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data.shakespeare", "--input", "in.txt"])
    main()
    line = "datasets/shakespeare-char: char tokenizer, vocabulary 9, tokens: 17 train, 2 val\n"
    assert capsys.readouterr().out == line
    assert decoded(tmp_path / "datasets" / "shakespeare-char", "train") == "To be, or not to "
