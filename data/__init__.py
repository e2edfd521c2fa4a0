"""Data: from text to batches of token ids.

In reading order: tokenizer.py (text <-> ids), shards.py (ids on disk), loader.py (batches), then one script per
corpus: pydocs.py (inside every CPython), shakespeare.py, text.py (your own files), fineweb.py (billions of tokens of
web pages, with encode.py, which tokenizes fast). Each script writes a dataset, a folder that `shards.open_split` opens.
"""

import importlib
import sys
from pathlib import Path

from data.files import UserError, lock

DATASETS = {  # name -> the module that prepares it, and how
    "pydocs": ("data.pydocs", {}),
    "shakespeare-char": ("data.shakespeare", {"tokenizer": "char"}),
    "shakespeare-gpt2": ("data.shakespeare", {"tokenizer": "gpt2"}),
    "fineweb-edu-10B": ("data.fineweb", {"name": "sample-10BT"}),
    "fineweb-edu-100B": ("data.fineweb", {"name": "sample-100BT"}),
    "fineweb-edu-350B": ("data.fineweb", {"name": "sample-350BT"}),
    "fineweb-10B": ("data.fineweb", {"pretokenized": "fineweb"}),
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
            module, options = DATASETS[name]
            print(importlib.import_module(module).prepare(folder=folder, **options))
