"""data/fineweb.py: nothing lost, nothing twice, whatever interrupts it. The Hub is one on this machine."""

import csv
import gzip
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import local_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import files as data_files
from data.corpora import DATASETS, dataset_dir
from data.documents import local_files, read_rows
from data.files import UserError
from data.fineweb import PRETOKENIZED, prepare
from data.shards import open_split
from data.tokenizer import CharTokenizer, byte_pairs, gpt2
from training.curves import PUBLISHED_LOSSES

ROOT = Path(__file__).parents[1]
WORDS = re.findall(
    r"\w+", "the of and to in a is that for it as was with be by on not he his but at are this have from"
)


def documents(count, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(5, 200))) + f" {seed} {i}." for i in range(count)]


def write_parquet(path, texts):
    table = pa.table({"id": list(range(len(texts))), "text": pa.array(texts, pa.string())})
    pq.write_table(table, path, row_group_size=40)
    return path


def write_jsonl(path, texts):
    rows = [{"text": text} if i % 2 else {"other": i, "text": text} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def ids_of(texts):
    texts = [text for text in texts if text and text.strip()]
    return np.concatenate([np.insert(gpt2().encode(text), 0, 50256) for text in texts])


def ids_in(folder):
    splits = [open_split(folder, split) for split in ("val", "train")]
    for split in splits:
        split.verify()
    return np.concatenate([split.read(0, split.n_tokens) for split in splits])


def shards_of(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.npy"))}


def start(*arguments, **options):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "data.fineweb", *map(str, arguments)], **pipes, **options)


def run(*arguments, **options):
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


# ------------------------------------------------------------------------------------------------------------- shards


def test_a_tokenizer_of_one_s_own_is_used_and_another_one_refused_later(tmp_path):
    texts = documents(60)
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    bpe = byte_pairs("gpt2", [b"th", b"the"])
    path = tmp_path / "bpe.json"
    path.write_text(json.dumps(bpe.spec()), "utf-8")
    options = {"input": (file,), "folder": tmp_path / "out", "processes": 1, "shard_tokens": 3000}
    assert "bpe" in prepare(**options, tokenizer=str(path))
    expected = np.concatenate([np.insert(bpe.encode(text), 0, bpe.eot) for text in texts])
    assert np.array_equal(ids_in(tmp_path / "out"), expected)
    assert open_split(tmp_path / "out", "val").tokenizer_spec == bpe.spec()
    with pytest.raises(UserError, match="begun with another --tokenizer"):
        prepare(**options)
    (tmp_path / "plain.json").write_text(json.dumps(CharTokenizer("ab", documents=False).spec()), "utf-8")
    for name, complaint in (
        ("char", "no tokenizer 'char': it must be gpt2, a file"),
        (str(tmp_path / "no.json"), "no tokenizer"),
        (str(tmp_path / "plain.json"), "has no end-of-text token"),
    ):
        with pytest.raises(UserError, match=complaint):
            prepare(input=(file,), folder=tmp_path / "other", tokenizer=name)
    assert not (tmp_path / "other").exists()


@pytest.fixture(scope="module")
def three_files(tmp_path_factory):
    """One file of each kind, with the documents that give trouble, and the folder made of them."""
    folder = tmp_path_factory.mktemp("three")
    pages = documents(100) + ["", None, "  \n ", "a<|endoftext|>b", "long " * 5000, "x   \n\n\n y\u3000z", "日本🙂"]
    rows = documents(50, seed=1) + ["", "\r\nline\u2028line"]
    lines = "\ufefffirst line\n\n\nsecond line\n"
    files = [write_parquet(folder / "a[1].parquet", pages), write_jsonl(folder / "b.jsonl", rows)]
    (folder / "c.txt").write_text(lines, "utf-8")
    files.append(folder / "c.txt")
    summary = prepare(input=files, folder=folder / "out", shard_tokens=1000, processes=1)
    return files, folder / "out", pages + rows + [lines.removeprefix("\ufeff")], summary


def test_files_of_every_kind_become_shards_of_the_size_asked_for_with_every_document_once(three_files):
    files, out, texts, summary = three_files
    expected = ids_of(texts)
    assert np.array_equal(ids_in(out), expected)
    meta = json.loads((out / "meta.json").read_text("utf-8"))
    assert [(shard["file"], shard["tokens"]) for shard in meta["shards"]["val"]] == [("val_00000_000.npy", 1000)]
    assert "fineweb-edu-10B/val_00000_000.npy" in PUBLISHED_LOSSES
    for group in range(3):  # one file each, cut into shards of 1000 tokens and a rest
        sizes = [shard["tokens"] for shard in meta["shards"]["train"] if f"_{group:05d}_" in shard["file"]]
        assert set(sizes[:-1]) <= {1000} and 0 < sizes[-1] <= 1000
    assert f"{len(expected) - 1000:,} train, 1,000 val; 156 documents, 4 empty ones left out" in summary
    assert meta["command"].startswith("python -m data.fineweb --input ") and "--shard-tokens 1000" in meta["command"]


def test_a_finished_dataset_is_left_as_it_is_and_one_of_other_files_or_options_refused(three_files, tmp_path):
    files, out, _, summary = three_files
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.npy")}
    assert prepare(input=files, folder=out, shard_tokens=1000) == summary
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.npy")} == before
    with pytest.raises(UserError, match="another --shard-tokens: repeat the command as it was, give another folder"):
        prepare(input=files, folder=out, shard_tokens=999)
    longer = tmp_path / files[1].name
    longer.write_text(files[1].read_text("utf-8") + '{"text": "more"}\n', "utf-8")
    for others in (files[:2], [files[0], longer, files[2]], [files[1], files[0], files[2]]):
        with pytest.raises(UserError, match="another --input"):
            prepare(input=others, folder=out, shard_tokens=1000)
    with pytest.raises(UserError, match="holds another dataset"):
        prepare(pretokenized="fineweb-edu", folder=out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "meta.json").write_text("{}", "utf-8")
    with pytest.raises(UserError, match="holds another dataset"):
        prepare(input=files, folder=tmp_path / "other")


def test_corrupt_progress_and_missing_shards_are_named_and_what_is_deleted_is_made_again(three_files, tmp_path):
    files, out, _, _ = three_files
    before = shards_of(out)
    shutil.copytree(out, out := tmp_path / "out")
    (out / "train_00000_001.npy").write_bytes(b"short")
    with pytest.raises(UserError, match="train_00000_001.npy is missing or truncated, though progress_00000"):
        prepare(input=files, folder=out, shard_tokens=1000)
    for text in ("{", "[]", '{"inputs": 1}', "3"):
        (out / "progress_00000.json").write_text(text, "utf-8")
        with pytest.raises(UserError, match="progress_00000.json is corrupt.*: delete it and repeat"):
            prepare(input=files, folder=out, shard_tokens=1000)
    (out / "train_00000_001.npy").write_bytes(before["train_00000_001.npy"])
    good = (files[0].parent / "out" / "progress_00000.json").read_text("utf-8")
    progress = json.loads(good)
    for change in ({"train": progress["train"][:-1]}, {"train": progress["train"][::-1]}, {"val": []}):
        (out / "progress_00000.json").write_text(json.dumps(progress | change), "utf-8")
        with pytest.raises(
            UserError, match=r"progress_00000.json is corrupt \(it lists \d+ of \d+ shards, or not in ord"
        ):
            prepare(input=files, folder=out, shard_tokens=1000)
    for name in ("progress_-0001.json", "progress_0.json"):
        (out / "progress_00000.json").rename(out / name)
        with pytest.raises(UserError, match=f"{name} is corrupt .its name is not that of a group"):
            prepare(input=files, folder=out, shard_tokens=1000)
        (out / name).rename(out / "progress_00000.json")
    (out / "progress_00000.json").unlink()
    prepare(input=files, folder=out, shard_tokens=1000, processes=1)
    assert shards_of(out) == before


def test_a_first_group_without_text_leaves_the_validation_split_to_the_next(tmp_path):
    texts = documents(30)
    files = [write_jsonl(tmp_path / name, rows) for name, rows in {"a.jsonl": ["  "] * 500, "b.jsonl": texts}.items()]
    prepare(input=files, folder=tmp_path / "out", shard_tokens=1000, processes=1)
    assert open_split(tmp_path / "out", "val").n_tokens == 1000
    assert np.array_equal(ids_in(tmp_path / "out"), ids_of(texts))


def test_compressed_files_csv_and_categories_give_the_same_texts(tmp_path, capsys):
    texts = ["one", "two, with a comma", 'and "quotes"\nin two lines', "é\u2028", "one"]
    lines = b"\xef\xbb\xbf" + b"".join(json.dumps({"text": t}, ensure_ascii=False).encode() + b"\n" for t in texts)
    table = io.StringIO(newline="")
    csv.writer(table).writerows([["id", "text"], *enumerate(texts)])
    contents = {
        "a.JSONL": lines,
        "b.json.gz": gzip.compress(lines[:40]) + gzip.compress(lines[40:]),  # as `cat a.gz b.gz` joins two
        "c.jsonl.zst": zstd(lines),
        "d.csv": b"\xef\xbb\xbf" + table.getvalue().encode(),
        "e.csv.gz": gzip.compress(table.getvalue().encode()),
        "f.parquet": table_bytes({"text": pa.array(texts).dictionary_encode()}),  # a category of pandas
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    files = local_files([tmp_path / name for name in contents])
    assert {file.name: list(read_rows(file)) for file in files} == dict.fromkeys(contents, texts)
    (tmp_path / "t.txt.zst").write_bytes(zstd(b"a<|endoftext|>b"))
    assert list(read_rows(*local_files([tmp_path / "t.txt.zst"]))) == ["a<|endoftext|>b"]
    assert "(1 times) is read as text, not as a token: `python -m data.text --separator" in capsys.readouterr().err


def test_small_files_share_shards_and_large_ones_have_their_own(tmp_path):
    texts = [f"{i} " * (400 if i == 7 else 20) for i in range(20)]
    files = [tmp_path / f"{i}.txt" for i in range(20)]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text, "utf-8")
    prepare(input=files, folder=tmp_path / "out", shard_tokens=100, processes=1)
    assert np.array_equal(ids_in(tmp_path / "out"), ids_of(texts))
    assert 3 <= len(list((tmp_path / "out").glob("progress_*.json"))) <= 10


# ---------------------------------------------------------------------------------------------------------- bad input


def parquet_bytes(texts):
    buffer = io.BytesIO()
    write_parquet(buffer, texts)
    return buffer.getvalue()


def table_bytes(columns):
    pq.write_table(pa.table(columns), buffer := io.BytesIO())
    return buffer.getvalue()


def zstd(content):
    with pa.CompressedOutputStream(sink := pa.BufferOutputStream(), "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


PAGES = parquet_bytes(documents(200))
DAMAGED = PAGES[:1000] + random.Random(0).randbytes(400) + PAGES[1400:]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.parquet", table_bytes({"content": ["x"], "id": [1]}), r"cannot read x.parquet past row 0 .*text.*content"),
        ("x.parquet", table_bytes({"text": [1, 2]}), 'cannot read x.parquet past row 0 .*"text" is not a string'),
        ("x.parquet", PAGES[: len(PAGES) // 2], "cannot read x.parquet past row 0 .*Parquet"),
        (
            "x.parquet",
            PAGES[:1000] + random.Random(0).randbytes(400) + PAGES[1400:],
            r"x.parquet past row \d+ .*: mend",
        ),
        (
            "x.jsonl",
            b'{"text": "fine"}\n{"text": "brok',
            r"cannot read x.jsonl past row 1 \(JSONDecodeError: .*\): mend it and repeat the same command",
        ),
        ("x.jsonl", b'{"text": "fine"}\n\n{"content": "x"}\n', "cannot read x.jsonl past row 2 .*KeyError: 'text'"),
        ("x.jsonl", b'{"text": "fine"}\n["x"]\n', "cannot read x.jsonl past row 1 .*TypeError"),
        ("x.jsonl", b'{"text": "fine"}\n{"text": ["x"]}\n', 'read x.jsonl past row 1 .*"text" is not a string'),
        ("x.txt", b"Stra\xdfe", "x.txt is not UTF-8: byte 0xdf at offset 4"),
        ("x.jsonl", b"", "there is no text in the files: 0 rows are empty"),
        ("x.txt", b"\n", "there is no text in the files: 1 rows are empty"),
        (
            "x.jsonl",
            b'{"text": "hardly any text"}\n',
            "all 5 tokens fit into one shard, .*lower --shard-tokens, .* to 1",
        ),
        (
            "x.json",
            b'[{"text": "x"}]',
            'cannot read x.json past row 0 .* one array: write one object {"text": ...} per',
        ),
        ("x.csv", b"id;text\n1;x\n", 'cannot read x.csv past row 0 .* no column is named "text" among id;text'),
        ("x.csv", b'text,id\n"a, b",1\nx\n', "cannot read x.csv past row 1 .* the row has 1 fields, the header 2"),
        ("x.csv", b'text\n"not closed', "cannot read x.csv past row 0 .*unexpected end of data"),
        ("x.csv.gz", gzip.compress(b"text\n" + b"fine\n" * 9)[:-9], "cannot read x.csv.gz past row . .*Truncated"),
        ("x.jsonl.zst", zstd(b'{"text": "fine"}\n')[:-1], "cannot read x.jsonl.zst past row . .*Truncated"),
        (
            "x.txt.gz",
            gzip.compress(b"fine")[:-8] + bytes(8),
            r"cannot read .*x.txt.gz: corrupt gzip data \(zlib inflate failed",
        ),
        ("x.parquet.gz", b"", "x.parquet.gz is of an unknown kind: its name must end in .parquet, .jsonl, .json, .csv"),
        ("x.jsonl", None, "x.jsonl does not exist: give the names of"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_a_file_that_cannot_be_used_is_named_with_what_to_do(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    for _ in range(2):  # the second time, nothing of the first is in the way
        with pytest.raises(UserError, match=message):
            prepare(input=[path], folder=tmp_path / "out", processes=1)
        assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"folder": None}, "--input needs --out FOLDER"),
        ({"files": "3"}, "--files 3 is not a range of the 1 files: give FIRST:END, such as 0:1"),
        ({"files": "1:1"}, "--files 1:1 is not a range"),
        ({"files": "0:2"}, "--files 0:2 is not a range"),
        ({"processes": 0}, "--processes is 0: it must be 1 or more"),
        ({"shard_tokens": 0}, "--shard-tokens is 0: it must be 1 or more"),
        (
            {"shard_tokens": 10**15},
            "--shard-tokens is 1000000000000000: at most 10000000000, since memory holds a shard",
        ),
        ({"pretokenized": "fineweb"}, "--pretokenized downloads shards that are ready: it goes with --out alone"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(tmp_path, options, message):
    path = write_jsonl(tmp_path / "a.jsonl", ["text"])
    with pytest.raises(UserError, match=message):
        prepare(**{"input": [path], "folder": tmp_path / "out"} | options)


def test_a_damaged_file_can_be_mended_and_what_was_finished_before_it_stays(tmp_path):
    texts = documents(300)
    files = [write_jsonl(tmp_path / "a.jsonl", texts[:200]), write_jsonl(tmp_path / "b.jsonl", texts[200:])]
    whole = files[1].read_text("utf-8")
    files[1].write_text(whole[:-10], "utf-8")
    with pytest.raises(UserError, match="cannot read b.jsonl past row 99"):
        prepare(input=files, folder=tmp_path / "out", shard_tokens=2000, processes=1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.npy")}
    assert before and not (tmp_path / "out" / "meta.json").exists()
    files[1].write_text(whole, "utf-8")
    prepare(input=files, folder=tmp_path / "out", shard_tokens=2000, processes=1)
    assert before.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.npy")}.items()
    assert np.array_equal(ids_in(tmp_path / "out"), ids_of(texts))


# ------------------------------------------------------------------------------------------------------- interruption


def wait_for(condition, seconds=60):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.005)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_killed_and_interrupted_it_resumes_and_ends_with_the_same_bytes(tmp_path):
    texts = documents(4000)
    files = [write_parquet(tmp_path / "a.parquet", texts[:1000]), write_jsonl(tmp_path / "b.jsonl", texts[1000:])]
    command = ["--input", *files, "--shard-tokens", "5001", "--processes", "1", "--out"]
    status, out, err = run(*command, tmp_path / "straight")
    assert status == 0 and "documents/s" not in out and re.search(r"tokens/s, [\d,]+ documents, [\d,]+/s", err)

    out = tmp_path / "stopped"
    process = start(*command, out)
    wait_for(lambda: list(out.glob("train_00001_*")))  # in the middle of the second file
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    workers = listing.stdout.split()
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(alive, workers)))  # no process is left
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*_00000*")}
    assert workers and (out / "progress_00000.json") in finished and not (out / "meta.json").exists()
    (out / ".train_00001_099.npy.0123abcd.tmp").touch()  # as a killed write leaves it

    (out / "train_00001_000.npy").unlink(missing_ok=True)
    process = start(*command, out, start_new_session=True)
    wait_for((out / "train_00001_000.npy").exists)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches all of them
    _, err = process.communicate()
    assert process.returncode == 130 and err.rstrip().endswith("error: interrupted") and "Traceback" not in err
    assert not (out / "meta.json").exists()

    assert run(*command, out)[0] == 0
    assert shards_of(out) == shards_of(tmp_path / "straight")
    assert finished == {path: path.stat().st_mtime_ns for path in out.glob("*_00000*")}
    assert np.array_equal(ids_in(out), ids_of(texts))
    assert not list(out.glob(".*.tmp"))


def test_a_full_disk_is_refused_before_or_leaves_what_can_be_continued(tmp_path):
    """On a file system in memory, in a mount namespace of its own: too small, then full half-way, then large enough."""
    disk, files = tmp_path / "disk", [write_jsonl(tmp_path / "a.jsonl", ["7 1 " * 100_000] * 3)]  # many tokens a byte
    disk.mkdir()
    python = shlex.quote(sys.executable)
    ours = f"{python} -m data.fineweb --input {files[0]} --out {disk} --shard-tokens 100000 --processes 1"
    script = f"""
        mount -t tmpfs -o size=64k tmpfs {disk} || exit 99
        {ours}; echo status $?
        mount -o remount,size=1m {disk} && {ours}; echo status $?
        mount -o remount,size=9m {disk} && {ours}; echo status $?
        cp {disk}/*.npy {disk}/*.json {tmp_path}"""
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True) if shutil.which(command[0]) else None
    if done is None or (done.returncode and "status" not in done.stdout):
        pytest.skip("needs unshare, and a system that grants a mount namespace")
    assert re.findall(r"status (\d+)", done.stdout) == ["2", "2", "0"], done.stderr
    errors = re.findall(r"error: (.*)", done.stderr)
    assert re.search(r"needs about .* GB more and its disk has .* GB free: make room, or give a folder", errors[0])
    assert re.search(r"disk of .* is full after group 0: make room and repeat the same command", errors[1])
    assert np.array_equal(ids_in(tmp_path), ids_of(["7 1 " * 100_000] * 3))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_memory_does_not_grow_with_the_input(tmp_path):
    """Peak memory of the process that reads and writes, and of one that tokenizes."""
    script = """
import multiprocessing, sys
from pathlib import Path
from data import fineweb

def peak(process):  # not getrusage, whose peak of a process begins with that of the one that started it
    lines = Path("/proc", str(process), "status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) // 1000 for line in lines if line.startswith("VmHWM"))

def watched(encoded, total):
    for item in encoded:
        ours.append(peak("self"))
        others.append(max(peak(child.pid) for child in multiprocessing.active_children()))
        yield item

if __name__ == "__main__":
    ours, others, fineweb.show_progress = [], [], watched
    fineweb.prepare(input=(Path(sys.argv[1]),), folder=Path(sys.argv[2]), processes=1, shard_tokens=500_000)
    print(max(ours), max(others))
"""
    (tmp_path / "measure.py").write_text(script, "utf-8")
    peaks = []
    for megabytes in (4, 20):
        texts = ["word " * 2000 + str(i) for i in range(100 * megabytes)]
        path = write_parquet(tmp_path / f"{megabytes}.parquet", texts)
        command = [sys.executable, tmp_path / "measure.py", path, tmp_path / str(megabytes)]
        shown = subprocess.run(command, capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
        peaks.append([int(word) for word in shown.stdout.split()])
    grown = [large - small for small, large in zip(*peaks, strict=True)]
    assert max(grown) < 10, f"{peaks} MB, for 16 MB more of text"


# ---------------------------------------------------------------------------------------------------- several machines


def test_several_machines_prepare_their_files_and_the_last_makes_the_dataset(tmp_path):
    texts = documents(90)
    files = [write_jsonl(tmp_path / f"{i}.jsonl", texts[30 * i : 30 * i + 30]) for i in range(3)]
    options = {"input": files, "shard_tokens": 1000, "processes": 1}
    straight = prepare(**options, folder=tmp_path / "straight")
    together, apart = tmp_path / "together", [tmp_path / "1", tmp_path / "2"]
    together.mkdir()
    with data_files.writing(together, shared=True):  # machines that share a folder do not wait for each other
        said = prepare(**options, folder=together, files="1:3")
        with pytest.raises(UserError, match="another process is writing to"):
            prepare(**options, folder=together)
    assert "2 of 3 groups of files are finished" in said and "still missing: from 0.jsonl" in said
    assert prepare(**options, folder=together, files="0:1") == straight.replace("straight", "together")
    for folder, range_ in zip(apart, ("0:2", "2:3"), strict=True):  # without a common folder
        prepare(**options, folder=folder, files=range_)
        assert not (folder / "meta.json").exists()
        shutil.copytree(folder, tmp_path / "copied", dirs_exist_ok=True)
    assert prepare(**options, folder=tmp_path / "copied") == straight.replace("straight", "copied")
    assert shards_of(together) == shards_of(tmp_path / "copied") == shards_of(tmp_path / "straight")
    assert np.array_equal(ids_in(together), ids_of(texts)) and f"{len(ids_of(texts)) - 1000:,} train" in straight


# ----------------------------------------------------------------------------------------------------------------- Hub


def bin_bytes(ids):
    return np.array([20240520, 1, len(ids)] + [0] * 253, "<i4").tobytes() + np.array(ids, "<u2").tobytes()


@pytest.fixture
def hub(tmp_path):
    pages = {f"sample/10BT/00{i}_00000.parquet": parquet_bytes(documents(700, seed=i)) for i in range(3)}
    ready = {f"fineweb_train_{i:06d}.bin": bin_bytes(range(i, i + 3000)) for i in (1, 2)}
    ready |= {"README.md": b"x", "fineweb_val_000000.bin": bin_bytes(range(500))}
    other = {"sample/100BT/000_00000.parquet": parquet_bytes(["another sample"])}
    edu = {name.replace("fineweb_", "finewebedu_"): content for name, content in ready.items()}
    repositories = {"HuggingFaceFW/fineweb-edu": pages | other, "kjj0/fineweb10B-gpt2": ready}
    repositories["kjj0/finewebedu10B-gpt2"] = edu
    with local_hub.serve(repositories) as server:
        settings = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        server.settings = {**os.environ, **settings}
        yield server


def test_a_sample_streams_from_the_hub_and_resumes_after_it_failed(hub, tmp_path):
    command = ["--name", "sample-10BT", "--out", tmp_path / "out", "--shard-tokens", "9000", "--processes", "1"]
    hub.gone = "sample/10BT/001_00000.parquet"
    status, _, err = run(*command, env=hub.settings)
    assert status == 2 and re.search(r"error: cannot read sample/10BT/001_00000.parquet past row", err), err
    assert "when the network is back, repeat the same command" in err
    before = shards_of(tmp_path / "out")
    assert {name[:9] for name in before} >= {"val_00000"} and not (tmp_path / "out" / "meta.json").exists()
    hub.gone = None
    hub.requests.clear()
    status, out, err = run(*command, env=hub.settings)
    assert status == 0 and "2,100 documents" in out, err
    assert before.items() <= shards_of(tmp_path / "out").items()
    assert not any("100BT/" in request for _, request in hub.requests)
    assert np.array_equal(ids_in(tmp_path / "out"), ids_of([text for i in range(3) for text in documents(700, seed=i)]))


@pytest.mark.parametrize("name, prefix", [("fineweb-edu", "finewebedu"), ("fineweb", "fineweb")])
def test_ready_shards_are_downloaded_checked_and_no_dataset_until_all_are_intact(hub, tmp_path, name, prefix):
    hub.damage = f"{prefix}_train_000002.bin"
    command = ["--pretokenized", name, "--out", tmp_path / "out"]
    status, _, err = run(*command, env=hub.settings)
    assert status == 2 and f"error: {prefix}_train_000002.bin of kjj0/{prefix}10B-gpt2 arrived corrupt (sha256)" in err
    assert not (tmp_path / "out" / "meta.json").exists()
    hub.damage = None
    hub.requests.clear()
    status, out, err = run(*command, env=hub.settings)
    assert status == 0 and "gpt2 tokenizer, vocabulary 50,257, tokens: 6,000 train, 500 val" in out, err
    sent = [request for method, request in hub.requests if method == "GET" and "resolve" in request]
    assert len(sent) == 1 and f"{prefix}_train_000002.bin" in sent[0]  # the others were there
    names = [f"{prefix}_{shard}.bin" for shard in ("train_000001", "train_000002", "val_000000")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*names, "meta.json"]
    assert len(ids_in(tmp_path / "out")) == 6500
    assert open_split(tmp_path / "out", "train").baselines["unigram"] > 0
    path = tmp_path / "out" / names[0]
    path.write_bytes(path.read_bytes()[:-2] + b"\0\0")
    with pytest.raises(UserError, match=f"{names[0]} is corrupt .*`python -m data.fineweb --pretokenized {name} --out"):
        open_split(tmp_path / "out", "train").verify()


def test_without_network_the_error_says_what_to_do(tmp_path):
    settings = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    status, _, err = run("--out", tmp_path / "out", env=settings)
    assert status == 2 and len(err.splitlines()) == 1, err
    assert err.startswith("error: cannot list the files of HuggingFaceFW/fineweb-edu (ConnectError")
    assert "--input FILES --out FOLDER" in err


# ------------------------------------------------------------------------------------------------ one process at a time


def test_names_of_datasets_lead_to_the_samples():
    for name, sample in {"10B": "sample-10BT", "100B": "sample-100BT", "350B": "sample-350BT"}.items():
        assert DATASETS[f"fineweb-edu-{name}"][:2] == ("data.fineweb", {"name": sample})
        assert dataset_dir(f"fineweb-edu-{name}") == Path("datasets", f"fineweb-edu-{name}")
    for name, (_, folder) in PRETOKENIZED.items():
        assert dataset_dir(f"{name}-10B") == folder


def test_a_second_process_waits_for_the_one_that_prepares_and_says_so(tmp_path):
    folder = tmp_path / "datasets" / "pydocs"
    folder.mkdir(parents=True)
    held = data_files.lock(folder / ".lock")
    command = [
        sys.executable,
        "-c",
        "from data.corpora import prepare_if_missing; prepare_if_missing('pydocs'); print('there')",
    ]
    waiting = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert waiting.stderr.readline() == "waiting until another process has prepared datasets/pydocs\n"
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(timeout=0.2)
    (folder / "meta.json").write_text("{}", "utf-8")  # what the first process made
    held.close()
    out, err = waiting.communicate(timeout=240)
    assert (waiting.returncode, out, err) == (0, "there\n", "")


def test_a_folder_that_another_process_writes_to_is_refused(tmp_path):
    with data_files.writing(tmp_path):
        for command in (["data.text", ROOT / "README.md"], ["data.fineweb", "--input", ROOT / "requirements.txt"]):
            command = [sys.executable, "-m", *map(str, command), "--out", str(tmp_path)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 2 and f"another process is writing to {tmp_path}: wait for it" in done.stderr
    assert not list(tmp_path.iterdir())


def test_no_files_and_a_cache_that_cannot_be_written_are_named_and_leave_nothing(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--input needs FILES: an empty pattern or variable"):
        prepare(folder=tmp_path / "out", input=())
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": 3}\n', encoding="utf-8")
    with pytest.raises(UserError, match="past row 0"):
        prepare(folder=tmp_path / "out", input=(rows,), processes=1)
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("HF_HOME", str(rows / "below"))
    with pytest.raises(UserError, match="set HF_HOME to a folder that can"):
        prepare(folder=tmp_path / "out", input=(write_parquet(tmp_path / "rows.parquet", ["x"]),), processes=1)
    rows.write_text('{"text": "more than a token"}\n', encoding="utf-8")
    prepare(folder=tmp_path / "out", input=(rows,), processes=1, shard_tokens=2)  # JSON lines need no cache
