"""Data: from text to batches of token ids.

In reading order: tokenizer.py (text <-> ids), shards.py (ids on disk), loader.py (batches), then one script per
corpus: pydocs.py (inside every CPython), shakespeare.py, text.py (your own files), chat.py (dialogues), fineweb.py
(billions of tokens of web pages, with hub.py, documents.py and groups.py, and encode.py, which tokenizes fast). Each
script writes a dataset, a folder that `shards.open_split` opens.
"""

import sys

from data import startup

# a command of this package, after `python -m`, imports this first; another package's keeps its own signals
if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].startswith(("data.", "-mdata.")):
    startup.begin()
