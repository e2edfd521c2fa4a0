"""Data: from text to batches of token ids.

In reading order: tokenizer.py (text <-> ids), shards.py (ids on disk), loader.py (batches), then one script per
corpus: pydocs.py (inside every CPython), shakespeare.py, text.py (your own files), chat.py (dialogues), fineweb.py
(billions of tokens of web pages, with hub.py, documents.py and groups.py, and encode.py, which tokenizes fast). Each
script writes a dataset, a folder that `shards.open_split` opens.
"""

from data import startup

if startup.is_command_of("data"):  # another package's keeps its own signals
    startup.begin()
