"""
Checkpoints, checkpoints/step_NNNNNN.pt of a run's folder: a dict by torch.save, and its sha256 in a file beside it.

A file whose sha256 differs is corrupt, and the one before it is used. It is read with weights_only=True, which runs no
code, and memory-mapped: only what is used takes memory, once for all ranks of a machine.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import socket
import sys
from pathlib import Path
from typing import BinaryIO

import torch

from data.files import UserError, as_flag, atomic_write
from training.distributed import Distributed

# what every checkpoint holds
KEYS = {"step", "model", "optimizers", "config", "tokenizer", "run", "micro_batch"}
# options that must not change when a run resumes
FIXED = ("n_layer", "n_head", "n_embd", "block_size", "optimizer", "batch_tokens", "seed", "shuffle")


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint and its sha256; UserError if a weight is not finite, or the disk is full."""
    if not all(tensor.isfinite().all() for tensor in checkpoint["model"].values()):
        raise UserError(f"the weights after step {checkpoint['step']} are not finite: no checkpoint; lower --lr")

    def write(file: BinaryIO) -> None:
        hashed = _Hashed(file)
        try:
            torch.save(checkpoint, hashed)
        except RuntimeError as error:
            raise hashed.error or error from None  # torch hides that the disk is full
        atomic_write(Path(f"{path}.sha256"), lambda file: file.write(hashed.digest.hexdigest().encode()))

    try:
        atomic_write(path, write)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror}): make room on that disk") from error


class _Hashed:
    """A file that hashes what is written to it: from memory, so that a corrupt write does not match."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first."""
    paths = (folder / "checkpoints").glob("step_*.pt")
    return sorted((path for path in paths if path.stem[5:].isdecimal()), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def load_checkpoint(path: Path, verify: bool = True) -> dict:
    """
    Return a checkpoint with memory-mapped tensors: only what is used takes memory, once for all ranks.

    verify: compare its sha256 with the one beside it first
    Raise UserError if the file is missing, corrupt or something else.
    """
    sidecar = Path(f"{path}.sha256")
    if path.is_file() and not sidecar.exists():
        raise UserError(f"{path} cannot be checked: {sidecar.name}, written beside it, is missing: copy both")
    try:
        if verify:
            expected = sidecar.read_text(encoding="utf-8").strip()
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    raise UserError(f"{path} is corrupt: its sha256 is not the one written beside it")
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(checkpoint, dict) or not set(checkpoint) >= KEYS:
        raise UserError(f"{path} is not a checkpoint of train_gpt2.py: it lacks some of {', '.join(sorted(KEYS))}")
    return checkpoint


def newest_checkpoint(folder: Path) -> tuple[Path, dict] | tuple[None, None]:
    """Return (path, checkpoint) for the newest intact checkpoint, or (None, None); UserError if all are corrupt."""
    paths = checkpoints(folder)
    for path in paths:
        try:
            return path, load_checkpoint(path)
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)
    if paths:
        raise UserError(f"no checkpoint in {folder} can be read: --resume never starts fresh and moves the run away")
    return None, None


def starting_point(config, tokenizer_spec: dict, dist: Distributed) -> dict | None:
    """
    Return the checkpoint that a run resumes from, None if it starts fresh. Collective.

    config: the run's options (train_gpt2.Config)
    Raise UserError if it was trained with other options, or the ranks see different ones.
    """
    path, checkpoint = find_checkpoint(Path(config.out_dir), config.resume, dist)
    if dist.disagree(checkpoint["step"] if checkpoint else 0):
        raise UserError(f"the ranks see different checkpoints in {config.out_dir}: share the folder, or copy it")
    if checkpoint is None:
        return None
    then, now = checkpoint["run"], dataclasses.asdict(config)
    changed = [f"{as_flag(name)} {then[name]} (now {now[name]})" for name in FIXED if then[name] != now[name]]
    if checkpoint["tokenizer"] != tokenizer_spec:
        changed.append(f"--data {then['data']} (now {now['data']}, with another vocabulary)")
    if changed:
        cure = "use the same, another --out-dir, or --resume never"
        raise UserError(f"{path} was trained with other options, {', '.join(changed)}: {cure}")
    return checkpoint


def find_checkpoint(folder: Path, resume: str, dist: Distributed) -> tuple[Path, dict] | tuple[None, None]:
    """
    Return (path, checkpoint) that --resume means for a run in `folder`, (None, None) if it starts fresh.

    A checkpoint of another run starts this one, which then resumes from its own; UserError if the folder holds a run
    that did not start that way. Collective: one rank per machine reads and hashes the file, the others map the same.
    """
    fresh = dist.rank == 0 and resume == "never" and not restarted_in(folder)
    if dist.all_reduce_max(int(fresh)):
        return None, None
    named = resume not in ("auto", "never") and not _resumes_itself(folder, resume)
    path, checkpoint = None, None
    if dist.local_rank == 0:
        path, checkpoint = (Path(resume), load_checkpoint(Path(resume))) if named else newest_checkpoint(folder)
    step = dist.all_reduce_max(checkpoint["step"] if checkpoint else 0)
    if step and dist.local_rank > 0:
        path = Path(resume) if named else folder / "checkpoints" / f"step_{step:06d}.pt"
        checkpoint = load_checkpoint(path, verify=False)
    return path, checkpoint


def check_resume(folder: Path, resume: str, max_steps: int) -> None:
    """Raise UserError if --resume names a file that is not a checkpoint, or that has done all steps of a new run."""
    if resume not in ("auto", "never") and not _resumes_itself(folder, resume):
        step = load_checkpoint(Path(resume), verify=False)["step"]
        if step >= max_steps and folder.resolve() not in Path(resume).resolve().parents:
            raise UserError(f"--resume {resume} has done {step} steps: --max-steps is {max_steps}, but must be above")


def _resumes_itself(folder: Path, resume: str) -> bool:
    """Return whether a run that was started with another run's checkpoint has checkpoints of its own to resume from."""
    if folder.resolve() in Path(resume).resolve().parents or not checkpoints(folder):
        return False
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads((folder / "config.json").read_text(encoding="utf-8"))["resume"] == resume:
            return True
    raise UserError(f"{folder} holds a run that did not start with --resume {resume}: give another --out-dir")


def restarted_in(folder: Path) -> bool:
    """Return whether torchrun has restarted the ranks after they began to write to this folder. For rank 0."""
    path, again = folder / ".launch", int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return again and path.exists() and path.read_text(encoding="utf-8") == launch_name()


def launch_name() -> str:
    """Return a name for the torchrun launch that started this process, the same after its restarts."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if name != "none":
        return name
    # the default of --rdzv-id, shared by all launches: torchrun is our parent, and lives through restarts
    try:
        began = Path(f"/proc/{os.getppid()}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):  # no Linux
        began = ""
    return f"{socket.gethostname()} {os.getppid()} {began}"
