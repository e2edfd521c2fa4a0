"""The corpora that are known by name, each prepared once, by the first command that needs it."""

import importlib
import sys
from pathlib import Path

from data.files import UserError, lock

_EDU = "`python -m data.fineweb --pretokenized fineweb-edu` is quicker"
DATASETS = {  # name -> the module that prepares it, how, and what that takes
    "pydocs": ("data.pydocs", {}, "seconds, no download"),
    "shakespeare-char": ("data.shakespeare", {"tokenizer": "char"}, "a download of 1.1 MB"),
    "shakespeare-gpt2": ("data.shakespeare", {"tokenizer": "gpt2"}, "a download of 1.1 MB"),
    "fineweb-edu-10B": ("data.fineweb", {"name": "sample-10BT"}, f"hours, a download, 20 GB of disk; {_EDU}"),
    "fineweb-edu-100B": ("data.fineweb", {"name": "sample-100BT"}, "a day or more, a download, 200 GB of disk"),
    "fineweb-edu-350B": ("data.fineweb", {"name": "sample-350BT"}, "days, a download, 700 GB of disk"),
    "fineweb-10B": ("data.fineweb", {"pretokenized": "fineweb"}, "a download of 20 GB"),
}


FINEWEB_TOKENS = {  # of GPT-2, rounded; --plan needs them before the data is there
    "fineweb-edu-10B": 10**10,
    "fineweb-edu-100B": 10**11,
    "fineweb-edu-350B": 35 * 10**10,
    "fineweb-10B": 10**10,
}


def dataset_dir(name: str) -> Path:
    """Return the folder of a dataset: datasets/NAME for a name in DATASETS; anything else is itself a folder."""
    return Path("datasets", name) if name in DATASETS else Path(name)


def prepare_if_missing(name: str) -> None:
    """Prepare a dataset of DATASETS unless it exists. Raise UserError if it cannot be prepared.

    One process per machine prepares it; the others report that they wait, however long it takes.
    """
    folder = dataset_dir(name)
    if name not in DATASETS or (folder / "meta.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = lock(folder / ".lock", refusal="another process prepares it")
    except UserError:
        print(f"waiting until another process has prepared {folder}", file=sys.stderr, flush=True)
        held = lock(folder / ".lock")
    with held:
        if not (folder / "meta.json").exists():  # unless another process prepared it while this one waited
            module, options, takes = DATASETS[name]
            print(f"preparing {folder}: {takes}", flush=True)
            print(importlib.import_module(module).prepare(folder=folder, **options))
