"""The Hugging Face Hub: the files of FineWeb-Edu, and shards that others have tokenized."""

import hashlib
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.documents import File
from data.files import UserError, writing
from data.groups import check_space, read_progress
from data.shards import map_bin, summary, write_meta
from data.tokenizer import gpt2

HUB_DATASET = "HuggingFaceFW/fineweb-edu"
PRETOKENIZED = {  # name -> a repository of .bin shards on the Hub, the folder for them
    "fineweb-edu": ("kjj0/finewebedu10B-gpt2", Path("datasets/fineweb-edu-10B")),
    "fineweb": ("kjj0/fineweb10B-gpt2", Path("datasets/fineweb-10B")),
}
WITHOUT_NETWORK = "without network, give files of your own with --input FILES --out FOLDER"


def check_cache() -> None:
    """Raise UserError unless the cache of `datasets`, which it also needs for local Parquet files, can be written."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    try:
        Path(home).expanduser().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        cause = f"the cache of Hugging Face's libraries cannot be written ({error.strerror}: {error.filename})"
        raise UserError(f"{cause}: set HF_HOME to a folder that can") from None


def hub_files(name: str, revision: str | None) -> tuple[str, list[File]]:
    """Return the commit (the newest if None) and the files of a FineWeb-Edu sample; UserError without network."""
    from huggingface_hub import HfApi

    path = f"sample/{name.removeprefix('sample-')}"
    with _hub_errors(f"list the files of {HUB_DATASET}"):
        revision = revision or HfApi().dataset_info(HUB_DATASET).sha
        tree = HfApi().list_repo_tree(HUB_DATASET, path, repo_type="dataset", revision=revision, recursive=True)
        listing = sorted((entry.path, entry.size) for entry in tree if entry.path.endswith(".parquet"))
    if not listing:
        raise UserError(f"{HUB_DATASET} no longer has Parquet files in {path}: {WITHOUT_NETWORK}")
    return revision, [File(f"hf://datasets/{HUB_DATASET}@{revision}/{file}", file, size) for file, size in listing]


def download_shards(name: str, folder: Path) -> str:
    """Download the shards of PRETOKENIZED that `folder` lacks and check them against the Hub's sha256.

    Return a one-line summary; raise UserError without network. The folder is a dataset once all shards are intact.
    """
    from huggingface_hub import HfApi, snapshot_download

    repository = PRETOKENIZED[name][0]
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder):
        if (folder / "meta.json").exists() or read_progress(folder):
            raise UserError(f"{folder} holds another dataset: give another folder with --out, or delete it")
        with _hub_errors(f"list the files of {repository}"):
            info = HfApi().dataset_info(repository, files_metadata=True)
        shards = {folder / entry.rfilename: entry for entry in info.siblings if entry.rfilename.endswith(".bin")}
        check_space(folder, sum(entry.size for path, entry in shards.items() if not path.exists()))
        with _hub_errors(f"download {repository}"):
            options = {"repo_type": "dataset", "revision": info.sha, "allow_patterns": "*.bin"}
            snapshot_download(repository, local_dir=folder, **options)
        entries = {"train": [], "val": []}
        for path, entry in sorted(shards.items()):
            with open(path, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 != entry.lfs.sha256:
                path.unlink()
                raise UserError(f"{path.name} of {repository} arrived corrupt (sha256): repeat the same command")
            tokens = len(map_bin(path).tokens)
            entries["val" if "val" in path.name else "train"].append(
                {"file": path.name, "tokens": tokens, "sha256": sha256}
            )
        command = shlex.join(["python", "-m", "data.fineweb", "--pretokenized", name, "--out", str(folder)])
        meta = write_meta(folder, gpt2(), entries, command)
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        return summary(folder, meta)


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of httpx, of huggingface_hub, of the system
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"cannot {what} ({reason}): try again, or {WITHOUT_NETWORK}") from None
