"""
Checkpoints, checkpoints/step_NNNNNN.pt of a run's folder: a dict by torch.save, and its sha256 in a file beside it.

A file whose sha256 differs is corrupt, and the one before it is used. It is read with weights_only=True, which runs no
code, and memory-mapped: only what is used takes memory, once for all ranks of a machine.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from data.files import UserError, as_flag, atomic_write
from data.outside import check_shape, read_json
from data.streams import explain
from training.distributed import Distributed, env_number

SHAPE = {  # what every checkpoint holds, in the terms of outside.check_shape
    "step": range(2**62),
    "model": dict,
    "training?": dict,  # with --ema, whose average is "model": the weights that training goes on from
    "optimizers": [{"state": dict, "param_groups": [{"params": list}]}],
    "config": dict,
    "tokenizer": dict,
    "run": dict,
    "micro_batch": range(1, 2**31),
    "data?": str,  # open_data's fingerprint of the dataset; checkpoints of older versions lack it
}
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
        raise UserError(f"no checkpoint of step {checkpoint['step']}: {explain(error)}") from error


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
    named = (path for path in paths if re.fullmatch(r"step_\d{1,18}", path.stem) and path.is_file())
    return sorted(named, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    return int(path.name.split(".")[0].removeprefix("step_"))


def load_checkpoint(path: Path, verify: bool = True) -> dict:
    """
    Return a checkpoint with memory-mapped tensors: only what is used takes memory, once for all ranks.

    verify: compare its sha256 with the one beside it first
    Raise UserError if the file is missing, corrupt or something else.
    """
    sidecar = Path(f"{path}.sha256")
    if not path.is_file():  # reading from a pipe of that name would never end
        raise UserError(f"{path} cannot be read: there is no such file")
    if not sidecar.exists():
        raise UserError(f"{path} cannot be checked: {sidecar.name}, written beside it, is missing: copy both")
    try:
        if verify:
            expected = sidecar.read_text(encoding="utf-8").strip()
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    raise UserError(f"{path} is corrupt: its sha256 is not the one written beside it")
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UserError:
        raise
    except Exception as error:  # of the system, of torch, of the restricted unpickler: many kinds
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    with fitting(path, "train_gpt2.py"):
        check_shape(checkpoint, SHAPE)
        if re.match(r"step_\d{1,18}\.pt", path.name) and step_of(path) != checkpoint["step"]:
            raise ValueError(f"its step is {checkpoint['step']}")
        checkpoint["model"] = plain_names(checkpoint["model"])
        for name, tensor in checkpoint["model"].items():
            if not (isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.isfinite().all()):
                raise ValueError(f"{name} is not a tensor of finite numbers")
    return checkpoint | {"path": str(path)}


@contextlib.contextmanager
def fitting(path: Path, what: str) -> Iterator[None]:
    """Raise UserError with the file's name for whatever goes wrong while the content of a checkpoint is taken."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} is not a checkpoint of {what}: {one_line(error)}") from error


def plain_names(weights: dict) -> dict:
    """Return tensors by the names that the model has without torch.compile's and DDP's wrappers."""
    return {re.sub(r"^(_orig_mod\.|module\.)+", "", name): tensor for name, tensor in weights.items()}


def one_line(error: Exception | str) -> str:
    return " ".join(str(error).split())[:300]


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


def starting_point(config, tokenizer_spec: dict, dist: Distributed, fingerprint: str = "") -> dict | None:
    """
    Return the checkpoint that a run resumes from, None if it starts fresh. Collective.

    config:      the run's options (train_gpt2.Config)
    fingerprint: of the dataset's content
    Raise UserError if it was trained with other options or other data, or the ranks see different checkpoints.
    """
    path, checkpoint = find_checkpoint(Path(config.out_dir), config.resume, dist)
    if dist.disagree(checkpoint["step"] if checkpoint else 0):
        raise UserError(f"the ranks see different checkpoints in {config.out_dir}: share the folder, or copy it")
    if checkpoint is None:
        return None
    now = dataclasses.asdict(config)
    then = {field.name: field.default for field in dataclasses.fields(config)} | checkpoint["run"]  # an older version's
    changed = [f"{as_flag(name)} {then[name]} (now {now[name]})" for name in FIXED if then[name] != now[name]]
    data = f"--data {then['data']} (now {now['data']}"
    if checkpoint["tokenizer"] != tokenizer_spec:
        changed.append(f"{data}, with another vocabulary)")
    elif fingerprint and checkpoint.get("data", fingerprint) != fingerprint:
        changed.append(f"{data}, {'prepared anew from' if then['data'] == now['data'] else 'which is'} another text)")
    if changed:
        cure = "use the same, another --out-dir, or --resume never"
        raise UserError(f"{path} was trained with other options, {', '.join(changed)}: {cure}")
    return checkpoint


def find_checkpoint(folder: Path, resume: str, dist: Distributed) -> tuple[Path, dict] | tuple[None, None]:
    """
    Return (path, checkpoint) that --resume means for a run in `folder`, (None, None) if it starts fresh.

    Another checkpoint, or the newest of another run, starts this run, which then resumes from its own; UserError if
    the folder holds a run that did not start that way. Collective: one rank per machine reads and hashes the file, the
    others map the same.
    """
    fresh = dist.rank == 0 and resume == "never" and not restarted_in(folder)
    if dist.all_reduce_max(int(fresh)):
        return None, None
    named = Path(resume) if resume not in ("auto", "never") and not _resumes_itself(folder, resume) else folder
    path, checkpoint = None, None
    if dist.local_rank == 0:
        path, checkpoint = (
            newest_checkpoint(named) if named.is_dir() or named == folder else (named, load_checkpoint(named))
        )
    step = dist.all_reduce_max(checkpoint["step"] if checkpoint else 0)
    if step and dist.local_rank > 0:
        path = named / "checkpoints" / f"step_{step:06d}.pt" if named.is_dir() else named
        checkpoint = load_checkpoint(path, verify=False)
    return path, checkpoint


def check_resume(folder: Path, resume: str, max_steps: int) -> None:
    """Raise UserError if --resume names no checkpoint, or one that has done all steps of a new run."""
    if resume not in ("auto", "never") and not _resumes_itself(folder, resume):
        path = Path(resume)
        if path.is_dir() and not checkpoints(path):
            raise UserError(f"--resume {resume} has no checkpoints: give a run, or its file checkpoints/step_NNNNNN.pt")
        step = step_of(checkpoints(path)[0]) if path.is_dir() else load_checkpoint(path, verify=False)["step"]
        if step >= max_steps and folder.resolve() not in path.resolve().parents:
            raise UserError(f"--resume {resume} has done {step} steps: --max-steps is {max_steps}, but must be above")


def _resumes_itself(folder: Path, resume: str) -> bool:
    """Return whether a run that was started with --resume CHECKPOINT has newer ones of its own to resume from."""
    if not checkpoints(folder):
        return False
    with contextlib.suppress(UserError):
        if read_json(folder / "config.json", {"resume": str})["resume"] == resume:
            return True
    if folder.resolve() in [Path(resume).resolve(), *Path(resume).resolve().parents]:
        return False
    raise UserError(f"{folder} holds a run that did not start with --resume {resume}: give another --out-dir")


def restarted_in(folder: Path) -> bool:
    """Return whether torchrun has restarted the ranks after they began to write to this folder. For rank 0."""
    path, again = folder / ".launch", env_number("TORCHELASTIC_RESTART_COUNT", 0) > 0
    return again and path.is_file() and path.read_bytes() == launch_name().encode()


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
