"""
Several processes, one run: who they are, what they agree on, and how they share the weights.

    ddp     every process holds all weights and optimizer state; gradients are averaged during the backward
    zero1   ddp, but each process holds a share of the optimizer's state (Rajbhandari et al. 2020, arXiv:1910.02054)
    fsdp    each holds a share of weights, gradients and state; a block's weights are gathered for its turn (FSDP2)

torchrun starts the processes and tells each its number in the environment. The three modes give the same losses, and
write the same checkpoint: whole tensors by name, as a single process has them.
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
LATECOMERS = timedelta(days=7)  # to wait for a machine that still prepares its data
# what gloo and NCCL say when a process is gone
LOST = ("closed by peer", "reset by peer", "remote process exited", "Broken pipe", "Connection refused")


@dataclasses.dataclass(frozen=True)
class Distributed:
    """This process's number among all and on its machine, how many there are, and how they share the weights."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    mode: Mode = "ddp"

    @classmethod
    def from_env(cls, mode: Mode) -> "Distributed":
        """As the environment says; a single process where it says nothing. UserError for a mode that needs several."""
        variables = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
        found = cls(*(int(os.environ.get(name, default)) for name, default in variables), mode)
        if found.world_size == 1 and mode != "ddp":
            raise UserError(f"--parallel {mode} shares memory among processes: start several with torchrun, or use ddp")
        return found

    @contextlib.contextmanager
    def process_group(self, gpus: bool) -> Iterator[None]:
        """Waits for the others, however late they are, and forms a group with them: NCCL for GPUs, else gloo.

        UserError when another process is lost meanwhile.
        """
        if self.world_size == 1:
            yield
            return
        try:
            store, _, _ = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(self._agreed_name(store), store)
            dist.init_process_group("nccl" if gpus else "gloo", store=store, rank=self.rank, world_size=self.world_size)
            yield
        except RuntimeError as error:
            if any(text in str(error) for text in LOST):
                raise UserError(f"process {self.rank} ends, since another process of the run is gone") from error
            raise
        dist.destroy_process_group()

    def _agreed_name(self, store: dist.Store) -> str:
        """A name for the group, the same on all processes, once all are there.

        After a restart torchrun's store still holds what the processes before wrote. So each asks under a name of its
        own that no earlier one had, and the first answers until all have confirmed.
        """
        mine = secrets.token_hex(8)
        store.set(f"asks/{self.rank}", mine)
        if self.rank > 0:
            store.wait([f"answer/{mine}"], LATECOMERS)
            name = store.get(f"answer/{mine}").decode()
            store.set(f"{name}/confirmed/{self.rank}", "")
            return name
        missing, rounds = set(range(1, self.world_size)), 0
        while missing:
            rounds += 1
            if rounds % 1200 == 0:  # a minute
                print(f"still waiting for process(es) {sorted(missing)}", file=sys.stderr, flush=True)
            for rank in missing:
                if store.check([f"asks/{rank}"]):
                    store.set(f"answer/{store.get(f'asks/{rank}').decode()}", mine)
            time.sleep(0.05)
            missing = {rank for rank in missing if not store.check([f"{mine}/confirmed/{rank}"])}
        return mine

    # ----------------------------------------------------------------------------------------------- what they agree on

    def sum(self, value: Tensor) -> Tensor:
        """The sum of the processes' tensors, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def all_reduce_max(self, number: int) -> int:
        """The greatest of the processes' numbers."""
        if self.world_size == 1:
            return number
        value = torch.tensor(number, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return value.item()

    def disagree(self, number: int) -> bool:
        """Whether they have different numbers."""
        return self.all_reduce_max(number) != -self.all_reduce_max(-number)

    # ------------------------------------------------------------------------------------------------------ the weights

    def shard(self, model: nn.Module, blocks: list[nn.Module]) -> None:
        """fsdp: cut the parameters of each block, and then those outside, into a share for each process."""
        if self.mode == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh  # here: they take a second to import
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(next(model.parameters()).device.type, (self.world_size,))
            for module in [*blocks, model]:
                fully_shard(module, mesh=mesh)

    def replicate(self, model: nn.Module) -> nn.Module:
        """ddp and zero1: the model whose backward averages gradients over the processes."""
        if self.mode == "fsdp" or self.world_size == 1:
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def set_grad_sync(self, model: nn.Module, enabled: bool) -> None:
        """ddp, zero1: whether the next backward averages over the processes. Before the forward, which reads it too.

        fsdp averages after every backward: until then it would hold whole gradients.
        """
        if self.mode != "fsdp" and self.world_size > 1:
            model.require_backward_grad_sync = enabled

    def optimizer(self, kind: Callable, groups: list, **options) -> torch.optim.Optimizer:
        """Return kind(groups, **options); zero1: each rank holds a shard of its state, and updates those weights."""
        if self.mode == "zero1":
            from torch.distributed.optim import ZeroRedundancyOptimizer

            return ZeroRedundancyOptimizer(groups, optimizer_class=kind, **options)
        return kind(groups, **options)

    # -------------------------------------------------------------------------------------------------------- the state

    def item(self, value: Tensor) -> float:
        """The number in a tensor, which under fsdp may be spread over the processes. All processes call it."""
        return (value.full_tensor() if self.mode == "fsdp" else value).item()

    def gather_full(self, value):
        """value, a tensor or dicts and lists of them, made whole: under fsdp on the CPU of the first process, and None
        on the others; else as it is. All call it."""
        if isinstance(value, dict):
            return {name: self.gather_full(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self.gather_full(item) for item in value]
        if self.mode != "fsdp" or not hasattr(value, "full_tensor"):
            return value
        value = value.full_tensor()
        return value.cpu() if self.rank == 0 else None  # only the first writes: the others keep nothing

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict | None:
        """Its state_dict() as a single process has it, on the first process; all call it."""
        if self.mode != "zero1":
            return self.gather_full(optimizer.state_dict())
        optimizer.consolidate_state_dict(to=0)
        return optimizer.state_dict() if self.rank == 0 else None

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Take over what `optimizer_state` gave in any mode, but not its options, weight decay say; all call it."""
        options = [{name: value for name, value in g.items() if name != "params"} for g in optimizer.param_groups]
        if self.mode == "fsdp":
            from torch.distributed.tensor import distribute_tensor

            parameters = [p for group in optimizer.param_groups for p in group["params"]]

            def share(name: str, value: Tensor, like) -> Tensor:
                return (
                    value
                    if name == "step"
                    else distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
                )

            moments = state["state"].items()
            moments = {i: {name: share(name, v, parameters[i]) for name, v in held.items()} for i, held in moments}
            state = {**state, "state": moments}
        optimizer.load_state_dict(state)
        for group, own in zip(optimizer.param_groups, options, strict=True):
            group.update(own)
