"""What a newcomer types, and the first line of the answer: each mistake is told what to type next."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from runs import ROOT, random_model, save_run

from data.tokenizer import CharTokenizer

CHINESE = "我叫李明，今天天气很好，我们去公园散步吧。\n" * 9


@pytest.fixture
def here(monkeypatch):
    """A folder with a run, a run that has no checkpoint yet, and files of all kinds."""
    tokenizer = CharTokenizer("\n abc", documents=False)
    save_run(Path("runs/mine"), random_model(tokenizer.vocab_size), tokenizer, data="pydocs")
    os.makedirs("runs/new/checkpoints")
    os.makedirs("my")
    files = {"book.txt": b"some text", "chinese.txt": CHINESE.encode("gbk"), "photo.png": b"\x89PNG\0\1\2\3\0\0"}
    files |= {
        "my/a.txt": b"one text of mine\n" * 9,
        "my/photo.png": files["photo.png"],
        "pages.jsonl": b'{"text": "a"}\n',
    }
    for name, content in files.items():
        with open(name, "wb") as file:
            file.write(content)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def answer(line, capsys, monkeypatch):
    """Run a command line in this process. Return its exit status and the first line that it prints."""
    program, *words = shlex.split(line)
    monkeypatch.setattr(sys, "argv", [program, *words])
    capsys.readouterr()
    status = 0
    try:
        importlib.import_module(program.removesuffix(".py")).main()
    except SystemExit as end:
        status = end.code or 0
    shown = capsys.readouterr()
    text = shown.err if status else shown.out
    assert "Traceback" not in text and (not status or text.count("\n") == 1), text
    return status, text.partition("\n")[0]


WRONG = {  # what is typed -> what the error line says
    "train_gpt2.py labtop": "there is no preset labtop: did you mean laptop? the presets are laptop, ",
    "train_gpt2.py gpt2": "there is no preset gpt2: did you mean gpt2-124m?",
    "train_gpt2.py config/train_shakespeare_char.py": "did you mean shakespeare-char?",
    "train_gpt2.py --max-steps 5": "a preset is missing, as in `python train_gpt2.py laptop --max-steps 5`",
    "train_gpt2.py laptop --learning-rate 1e-3": "there is no option --learning-rate: use --lr",
    "train_gpt2.py laptop --batch_size=8": "there is no option --batch-size: use --batch-tokens for",
    "train_gpt2.py laptop --max-iters 5": "there is no option --max-iters: use --max-steps",
    "train_gpt2.py laptop --warmup-step 5": "there is no option --warmup-step: did you mean --warmup-steps?",
    "train_gpt2.py laptop --xyzzy 5": "there is no option --xyzzy: see python train_gpt2.py laptop --help",
    "train_gpt2.py laptop --device=gpu": "--device gpu cannot be used: use auto, cpu, cuda (a GPU), cuda:1 or mps",
    "train_gpt2.py laptop --compile true": "'true' belongs to no option: python train_gpt2.py PRESET --option value",
    "train_gpt2.py laptop lr=1e-3": "'lr=1e-3' belongs to no option: did you mean --lr=1e-3?",
    "train_gpt2.py laptop --lr": "--lr",
    "train_gpt2.py laptop --lr fast": "--lr",
    "train_gpt2.py laptop --n-embd 100 --n-head 3": "is not divisible by --n-head 3: use a multiple, such as 99",
    "train_gpt2.py laptop --out-dir book.txt": "--out-dir book.txt is a file: give the name of a folder, such as runs/",
    "train_gpt2.py laptop --optimizer sgd": "muon",
    "train_gpt2.py laptop --batch-tokens 1000": "it must be a multiple of 128, such as 1024",
    "train_gpt2.py laptop --optimizer adamw --adamw-lr 1e-3": "--adamw-lr is for --optimizer muon: with adamw",
    "train_gpt2.py laptop --data pydoc": "there is no dataset in pydoc: did you mean pydocs?",
    "train_gpt2.py laptop --data book.txt": "first with `python -m data.text book.txt --out datasets/book`, then use "
    "--data datasets/book",
    "train_gpt2.py laptop --data my": "prepare it first with `python -m data.text my --out datasets/my`",
    "train_gpt2.py laptop --data pages.jsonl": "with `python -m data.fineweb --input pages.jsonl --out datasets/pages`",
    "train_gpt2.py laptop --data runs/mine": "runs/mine is a run, not a dataset: use --init-from runs/mine",
    "train_gpt2.py laptop --init-from gpt3": "--init-from gpt3: use one of gpt2, gpt2-medium",
    "train_gpt2.py gpt2-124m --plan --kernels all --n-head 4": "with --kernels layernorm,gelu,cross_entropy",
    "sample.py": "which model? python sample.py runs/mine, or one of runs/new, gpt2, gpt2-medium",
    "sample.py runs": "runs is a folder of runs: give one of runs/mine, runs/new",
    "sample.py runs/mien": "there is no model runs/mien: did you mean runs/mine?",
    "sample.py runs/new": "runs/new has no checkpoint yet: train_gpt2.py writes one every --checkpoint-every steps",
    "sample.py runs/mine --start hello": "there is no option --start: use --prompt",
    "sample.py runs/mine --promt hello": "there is no option --promt: did you mean --prompt?",
    "sample.py runs/mine --prompt ab\u2603": "the character tokenizer lacks '\u2603', first at position 2: it knows",
    "sample.py runs/mine --prompt \udce9": "--prompt holds bytes that are not utf-8: give it with --prompt-file",
    "sample.py runs/mine --prompt-file chinese.txt": "try `iconv -f gb18030 -t utf-8 chinese.txt > new.txt`, which",
    "sample.py gpt2": "cannot download gpt2 (LocalEntryNotFoundError): put https://huggingface.co/openai-community/gpt2/",
    "data.text book.txt": "out",
    "data.text --out datasets/my": "there is no text in no files: give files that hold some",
    "data.text chinese.txt --out datasets/c": "not UTF-8: byte 0xce at offset 0: try --encoding gb18030, which",
    "data.text chinese.txt --encoding gbq --out datasets/c": "--encoding gbq is unknown: use one that Python knows",
    "data.text photo.png --out datasets/p": "photo.png is a binary file, not text: leave it out",
    "data.text 'my/*.text' --out datasets/my": "no file matches my/*.text: give files, folders or a pattern",
    "data.text buch.txt --out datasets/b": "cannot read buch.txt: No such file or directory: give the names of text",
}  # fmt: skip
RIGHT = {
    "train_gpt2.py": "laptop: a small GPT in minutes on two CPU cores, no download",
    "train_gpt2.py --help": "laptop: a small GPT in minutes",
    "train_gpt2.py laptop --help": "usage: python train_gpt2.py laptop [--option value ...]",
    "train_gpt2.py --max_steps=5 laptop --compile=False --plan": "preparing datasets/pydocs: seconds, no download",
    "train_gpt2.py laptop --init-from runs/mine --plan --data fineweb-10B": "2 layers, 4 heads, 16 channels, 24",
    "train_gpt2.py gpt2-124m --init-from gpt2-medium --plan": "24 layers, 16 heads, 1024 channels, 1,024 tokens per",
    "data.text my --out datasets/my": "datasets/my: char tokenizer, vocabulary 10, tokens: 137 train, 16 val",
    "data.text my/*.txt --out datasets/my": "datasets/my: char tokenizer",
    "data.text chinese.txt --encoding gbk --out datasets/c": "datasets/c: char tokenizer, vocabulary 19, tokens: 178",
    "sample.py runs/mine --max_new_tokens=5": "",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_mistake_is_told_what_to_type_next(here, line, capsys, monkeypatch):
    status, first = answer(line, capsys, monkeypatch)
    assert status == 2 and first.startswith("error: ") and WRONG[line] in first
    assert not os.path.exists("datasets") or not os.listdir("datasets")


@pytest.mark.parametrize("line", RIGHT)
def test_what_is_right_begins_with_what_it_does(here, line, capsys, monkeypatch):
    status, first = answer(line, capsys, monkeypatch)
    assert status == 0 and RIGHT[line] in first, first


def test_a_reader_that_leaves_ends_a_command_silently(here):
    command = [sys.executable, ROOT / "sample.py", "runs/mine", "--max-new-tokens", "5000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.read(10)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=240)) == ("", 141)


def test_the_python_of_the_readme_runs(here):
    os.rename("runs/mine", "runs/laptop")
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    program = program.replace('"The "', '"abc "')
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert shown.returncode == 0 and shown.stdout.startswith("abc ") and len(shown.stdout) == 4 + 50 + 1, shown.stderr


def test_every_file_a_message_sends_to_is_there():
    texts = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*/*.py") if path.parent.name != "tests")
    for module in re.findall(r"python -m ((?:data|kernels|training)(?:\.\w+)+)", texts):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
