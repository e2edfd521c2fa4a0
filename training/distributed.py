"""
Multi-process training: ranks, collectives, and how weights and state are replicated or sharded.

    ddp     every rank holds all weights and optimizer state; gradients are averaged during the backward
    zero1   ddp, but each rank holds a shard of the optimizer state (Rajbhandari et al. 2020, arXiv:1910.02054)
    fsdp    each rank holds a shard of weights, gradients and state; a block's weights are gathered when needed (FSDP2)

torchrun starts the processes and passes each its rank in the environment. The three modes give the same losses, and
write the same checkpoint: full tensors by name, as a single process has them.
"""

import contextlib
import dataclasses
import math
import os
import secrets
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.files import UserError
from training import peers

Mode = Literal["ddp", "zero1", "fsdp"]
JOIN_TIMEOUT = timedelta(days=7)  # a machine may still be preparing its data
JOIN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells each process
# per parameter, of AdamW, of Muon, and of Muon with a variance per row or column
STATES = ({"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}, {"momentum_buffer", "variance"})
COLLECTIVE_TIMEOUT = timedelta(hours=1)  # the others wait while rank 0 writes a checkpoint; NCCL's 10 minutes are short
# in the errors of gloo and NCCL when a process is gone
PEER_LOST = ("closed by peer", "reset by peer", "remote process exited", "Broken pipe", "Connection refused")


@contextlib.contextmanager
def ended_at_once() -> Iterator[None]:
    """
    End the process at once, with its output flushed, if it exits while it is one of several ranks.

    gloo's threads outlive the process group. If one still has a tensor to release while the interpreter shuts down, it
    aborts the process: its exit status is lost, and torchrun takes a finished run for a failed one.
    """
    try:
        yield
    except SystemExit as end:
        if "RANK" in os.environ and dist.is_initialized():
            _end(end.code)
        raise


def _end(status: int) -> None:
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


@dataclasses.dataclass(frozen=True)
class Distributed:
    """The global and local rank of this process, the number of ranks, and the mode of parallelism."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    mode: Mode = "ddp"

    @classmethod
    def from_env(cls, mode: Mode, joining: bool = True) -> "Distributed":
        """Read torchrun's environment; without it, a single process. Raise UserError if the mode needs several.

        joining: the ranks will meet, so all of torchrun's variables are needed; else WORLD_SIZE alone may be given
        """
        rank, local_rank, world_size = map(env_number, ("RANK", "LOCAL_RANK", "WORLD_SIZE"), (0, 0, 1))
        found = cls(rank, local_rank, world_size, mode)
        missing = [name for name in JOIN if not os.environ.get(name)]
        if world_size < 1 or joining and (world_size > 1 and missing or rank >= world_size):
            given = f"RANK={rank} WORLD_SIZE={world_size}" + (f", without {', '.join(missing)}" if missing else "")
            raise UserError(f"the environment says {given}: start several processes with torchrun, or unset these")
        if found.world_size == 1 and mode != "ddp":
            raise UserError(f"--parallel {mode} needs several processes: start them with torchrun, or use ddp")
        return found

    @contextlib.contextmanager
    def process_group(self, gpus: bool) -> Iterator[None]:
        """Join the other ranks, however late they start: NCCL for GPUs, else gloo. UserError if a rank is lost."""
        if self.world_size == 1:
            yield
            return
        backend = "nccl" if gpus else "gloo"
        if "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
        try:
            store, _, _ = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(self._agreed_name(store), store)
            group = {"rank": self.rank, "world_size": self.world_size, "timeout": COLLECTIVE_TIMEOUT}
            dist.init_process_group(backend, store=store, **group)
            with peers.watch(store, self.rank, self.world_size):
                yield
        except RuntimeError as error:
            if any(text in str(error) for text in PEER_LOST):
                raise UserError(f"rank {self.rank}: lost contact with another rank") from error
            raise
        dist.destroy_process_group()

    def end_process(self, status: int) -> None:
        """End one of several processes at once, as `ended_at_once` does; do nothing in a single one."""
        if self.world_size > 1:
            _end(status)

    def _agreed_name(self, store: dist.Store) -> str:
        """Return a name for the group, the same on all ranks, once all have joined.

        After a restart, torchrun's store still holds entries of the previous processes. So each rank asks under a new
        random name, and rank 0 answers until all have confirmed.
        """
        mine = secrets.token_hex(8)
        store.set(f"asks/{self.rank}", mine)
        if self.rank > 0:
            store.wait([f"answer/{mine}"], JOIN_TIMEOUT)
            name = store.get(f"answer/{mine}").decode()
            store.set(f"{name}/confirmed/{self.rank}", "")
            return name
        missing, rounds = set(range(1, self.world_size)), 0
        while missing:
            rounds += 1
            if rounds % 1200 == 0:  # a minute
                print(f"still waiting for rank(s) {sorted(missing)}", file=sys.stderr, flush=True)
            for rank in missing:
                if store.check([f"asks/{rank}"]):
                    store.set(f"answer/{store.get(f'asks/{rank}').decode()}", mine)
            time.sleep(0.05)
            missing = {rank for rank in missing if not store.check([f"{mine}/confirmed/{rank}"])}
        return mine

    # ----------------------------------------------------------------------------------------------------- agreement

    def sum(self, value: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place. Collective."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def all_reduce_max(self, number: int) -> int:
        """Return the largest of the ranks' numbers. Collective."""
        return self._largest([number])[0]

    def disagree(self, number: int) -> bool:
        """Return whether the ranks have different numbers. Collective."""
        return bool(self.differing([number])[0])

    def differing(self, numbers: list[int | None]) -> tuple[list[int], list[int]]:
        """Return the indexes at which ranks have different numbers, and the largest number of each. Collective.

        numbers: as many on every rank, within 62 bits; None if this rank has none
        """
        none = -(2**62)
        largest = self._largest([none if number is None else number for number in numbers])
        smallest = self._largest([none if number is None else -number for number in numbers])
        pairs = zip(largest, smallest, strict=True)
        return [i for i, (high, low) in enumerate(pairs) if high != -low], largest

    def among_equals(self, identity: int) -> tuple[int, int]:
        """Return the place of this rank among those with the same identity, and how many those are. Collective."""
        _, all_of_them = self.differing([identity if r == self.rank else None for r in range(self.world_size)])
        same = [r for r, other in enumerate(all_of_them) if other == identity]
        return same.index(self.rank), len(same)

    def _largest(self, numbers: list[int]) -> list[int]:
        if self.world_size == 1:
            return numbers
        values = torch.tensor(numbers, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.tolist()

    # --------------------------------------------------------------------------------------------- weights, gradients

    def shard(self, model: nn.Module, blocks: list[nn.Module]) -> None:
        """fsdp: shard the parameters of each block, and then those outside the blocks."""
        if self.mode == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh  # imported late: they take a second
            from torch.distributed.fsdp import fully_shard

            # nn.Linear returns a view, which nothing here changes in place
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
            mesh = init_device_mesh(next(model.parameters()).device.type, (self.world_size,))
            for module in [*blocks, model]:
                fully_shard(module, mesh=mesh)

    def replicate(self, model: nn.Module) -> nn.Module:
        """ddp, zero1: return the model wrapped so that its backward averages gradients over the ranks."""
        if self.mode == "fsdp" or self.world_size == 1:
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def set_grad_sync(self, model: nn.Module, enabled: bool) -> None:
        """ddp, zero1: set whether the next backward averages gradients. Call it before the forward, which reads it too.

        fsdp averages in every backward: to accumulate locally, it would have to hold full gradients.
        """
        if self.mode != "fsdp" and self.world_size > 1:
            model.require_backward_grad_sync = enabled

    def optimizer(self, kind: Callable, groups: list, **options) -> torch.optim.Optimizer:
        """Return kind(groups, **options); zero1: each rank holds a shard of its state, and updates those weights."""
        if self.mode == "zero1":
            from torch.distributed.optim import ZeroRedundancyOptimizer

            return ZeroRedundancyOptimizer(groups, optimizer_class=kind, **options)
        return kind(groups, **options)

    # ---------------------------------------------------------------------------------------------------------- state

    def floats(self, *scalars: Tensor) -> list[float]:
        """Return the numbers in tensors, which fsdp may have sharded, by a single wait for the GPU. Collective."""
        return torch.stack([t.full_tensor() if hasattr(t, "full_tensor") else t for t in scalars]).tolist()

    def gather_full(self, value):
        """Gather sharded tensors (in nested dicts and lists) to the CPU of rank 0; None on other ranks.

        No-op unless fsdp. Collective.
        """
        if isinstance(value, dict):
            return {name: self.gather_full(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self.gather_full(item) for item in value]
        if self.mode != "fsdp" or not hasattr(value, "full_tensor"):
            return value
        value = value.full_tensor()
        return value.cpu() if self.rank == 0 else None  # only rank 0 writes

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict | None:
        """Return its full state_dict(), as a single process has it, on rank 0. Collective."""
        if self.mode != "zero1":
            return self.gather_full(optimizer.state_dict())
        optimizer.consolidate_state_dict(to=0)
        return optimizer.state_dict() if self.rank == 0 else None

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """
        Load what `optimizer_state` returned in any mode; keep this optimizer's own options. Collective.

        Raise ValueError if it is not the state of such an optimizer: a moment of another shape corrupts the memory.
        """
        own = [{name: value for name, value in g.items() if name != "params"} for g in optimizer.param_groups]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        sizes = [
            [len(group["params"]) for group in groups] for groups in (state["param_groups"], optimizer.param_groups)
        ]
        if sizes[0] != sizes[1] or list(range(len(parameters))) != sorted(state["state"]):
            raise ValueError(f"the optimizer's state is of {sizes[0]} parameters, not of {sizes[1]}")
        for i, parameter in enumerate(parameters):
            check_moments(state["state"][i], parameter, f"its optimizer's state of parameter {i}")

        def placed(name: str, value, parameter: Tensor):
            if self.mode == "fsdp" and name != "step":
                from torch.distributed.tensor import distribute_tensor

                return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
            # a checkpoint's tensors are memory-mapped, and state that stays on the CPU must outlive the file
            return value.clone() if isinstance(value, Tensor) and parameter.device.type == "cpu" else value

        moments = {i: {k: placed(k, v, parameters[i]) for k, v in held.items()} for i, held in state["state"].items()}
        # own options go in first: they decide on which device AdamW keeps "step"
        groups = [{**saved, **options} for saved, options in zip(state["param_groups"], own, strict=True)]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})


def env_number(name: str, default: int) -> int:
    """Return a number that torchrun put into the environment; the default if it is absent or empty."""
    text = os.environ.get(name, "").strip()
    if text and not (text.isascii() and text.isdecimal() and int(text) < 2**31):
        raise UserError(f"{name} is {text!r} in the environment, not a number: start with torchrun, or unset it")
    return int(text) if text else default


def end_with_parent(parent: int) -> None:
    """Ask this process to save and end, as SIGTERM does, once torchrun is gone: killed, it cannot end its workers."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def check_moments(held: dict, parameter: Tensor, name: str) -> None:
    """Raise ValueError unless an optimizer's state for a parameter is complete, finite and of its shape."""
    if not isinstance(held, dict) or set(held) not in STATES:
        raise ValueError(f"{name} lacks some of AdamW's or Muon's: {', '.join(map(str, held))}"[:200])
    for key, value in held.items():
        if key == "step":
            value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            fits = isinstance(value, int | float) and math.isfinite(value) and value >= 0
        else:
            fits = isinstance(value, Tensor) and value.is_floating_point() and bool(value.isfinite().all())
            if key == "variance":  # c_attn is three matrices
                rows, columns = parameter.shape
                fits = fits and list(value.shape) in [[n * max(rows // n, columns)] for n in (1, 3)]
            else:
                fits = fits and value.shape == parameter.shape
        if not fits:
            raise ValueError(f"{name} has an unfit {key} for a parameter of {tuple(parameter.shape)}")
