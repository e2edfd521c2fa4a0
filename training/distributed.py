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
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.files import UserError

Mode = Literal["ddp", "zero1", "fsdp"]
JOIN_TIMEOUT = timedelta(days=7)  # a machine may still be preparing its data
# in the errors of gloo and NCCL when a process is gone
PEER_LOST = ("closed by peer", "reset by peer", "remote process exited", "Broken pipe", "Connection refused")


@dataclasses.dataclass(frozen=True)
class Distributed:
    """The global and local rank of this process, the number of ranks, and the mode of parallelism."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    mode: Mode = "ddp"

    @classmethod
    def from_env(cls, mode: Mode) -> "Distributed":
        """Read torchrun's environment; without it, a single process. Raise UserError if the mode needs several."""
        variables = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
        found = cls(*(int(os.environ.get(name, default)) for name, default in variables), mode)
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
        try:
            store, _, _ = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(self._agreed_name(store), store)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size)
            yield
        except RuntimeError as error:
            if any(text in str(error) for text in PEER_LOST):
                raise UserError(f"rank {self.rank}: lost contact with another rank") from error
            raise
        dist.destroy_process_group()

    def end_process(self, status: int) -> None:
        """
        End one of several processes at once, with its output flushed; do nothing in a single one.

        gloo's threads outlive the process group. If one still has a tensor to release while the interpreter shuts
        down, it aborts the process, and torchrun takes the finished run for a failed one.
        """
        if self.world_size > 1:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
            os._exit(status)

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
        if self.world_size == 1:
            return number
        value = torch.tensor(number, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return value.item()

    def disagree(self, number: int) -> bool:
        """Return whether the ranks have different numbers. Collective."""
        return self.all_reduce_max(number) != -self.all_reduce_max(-number)

    # --------------------------------------------------------------------------------------------- weights, gradients

    def shard(self, model: nn.Module, blocks: list[nn.Module]) -> None:
        """fsdp: shard the parameters of each block, and then those outside the blocks."""
        if self.mode == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh  # imported late: they take a second
            from torch.distributed.fsdp import fully_shard

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
        """Load what `optimizer_state` returned in any mode; keep this optimizer's own options. Collective."""
        own = [{name: value for name, value in g.items() if name != "params"} for g in optimizer.param_groups]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

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
