"""The hardware: device, fast dtype, peak FLOP/s, and the largest micro-batch that fits in memory."""

import contextlib
import gc
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import nn

import kernels
from data.files import UserError, as_user_error
from data.startup import out_of_memory
from kernels import machine
from kernels.common import unavailable
from kernels.gpus import named_gpu
from model import GPTConfig
from training.distributed import Distributed

CPU_TOKENS = 16_384  # per micro-step: larger batches make a CPU no faster
MARGIN = 0.02  # of a GPU's memory, left free by the search for a micro-batch: memory fragments


def choose_device(name: str, dist: Distributed = Distributed()) -> torch.device:  # noqa: B008  it is frozen
    """Return the device that --device names; auto: this rank's GPU, else an Apple GPU, else the CPU."""
    if name.startswith("cuda:") and dist.world_size > 1:
        raise UserError(f"--device {name} would put every rank on one GPU: use --device cuda, each rank takes its own")
    if name == "auto":
        with warnings.catch_warnings(action="ignore"):  # the sentence of unseen_gpu() says it better
            name = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
        if name == "cpu" and (reason := machine.unseen_gpu()):
            raise UserError(f"{reason}, or use --device cpu to train without it")
    if name == "cuda":
        name = f"cuda:{dist.local_rank}"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"--device {name} cannot be used: use auto, cpu, cuda (a GPU), cuda:1 or mps")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0][:150]
        raise UserError(f"--device {name} cannot be used: {reason}; --device auto picks what is available") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def check_machine(config, device: torch.device, dist: Distributed) -> None:
    """Raise UserError if the first step on this device would fail, or if several ranks would train a GPT-2 on CPUs."""
    check_size(config.shape(vocab_size=1), config.sequences_per_rank(dist.world_size) * (config.block_size + 1))
    if device.type == "cuda" and config.compile and (reason := unavailable(device)):
        raise UserError(f"--compile on a GPU is done by Triton, but {reason}: or use --no-compile --kernels none")
    if config.device == "auto" and device.type == "cpu" and dist.world_size > 1 and config.n_embd >= 768:
        found = f"torchrun started {dist.world_size} processes, but PyTorch finds no GPU"
        raise UserError(f"{found}: see what nvidia-smi reports, or use --device cpu if you mean to train on CPUs")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return float32 or bfloat16; auto takes bfloat16 if the hardware multiplies it, float32 if it only emulates it."""
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            cpu = torch.cpu.get_capabilities()
            fast = device.type == "cpu" and (cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
        name = "bfloat16" if fast else "float32"
    return getattr(torch, name)


def compiled(model: nn.Module) -> nn.Module:
    """
    Return torch.compile(model), with the same bits in every process.

    Reductions take the tiles that a rule gives: timing them on the GPU could choose others, which round otherwise.
    """
    torch.compiler.config.cache_key_tag = kernels.source_hash()
    return torch.compile(model, options={"deterministic": True})


def peak_flops(device: torch.device) -> float | None:
    """Return the GPU's dense bf16 FLOP/s by its data sheet, the denominator of MFU; None if the table lacks it."""
    gpu = named_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu and gpu.flops


def peak_memory(device: torch.device) -> int | None:
    """Return the peak bytes of this process on its GPU, or in RAM on a CPU; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource  # Windows lacks it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def check_size(shape: GPTConfig, batch_tokens: int) -> None:
    """
    Raise UserError if the weights, or a rank's tokens of a step, exceed this machine's memory, before building them.

    A lower bound: what fits may still run out of memory. Without this, billions of layers would be built for hours.
    """
    if not hasattr(os, "sysconf"):  # Windows
        return
    memory, C = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), shape.n_embd
    block = 4 * 12 * C * C + 50_000  # weights, and a block's Python objects
    sizes = {"the model": shape.n_layer * block + 4 * C * (shape.vocab_size + shape.block_size)}
    sizes["a step's batch"] = 8 * batch_tokens
    for name, size in sizes.items():
        if size > memory:
            gigabytes = f"at least {size / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f} GB"
            raise UserError(f"{name} takes {gigabytes}: lower --n-layer, --n-embd, --block-size or --batch-tokens")


@contextlib.contextmanager
def explain_out_of_memory(hint: str = "lower --micro-batch, or take a smaller model") -> Iterator[None]:
    """Raise UserError with what to do about it if memory runs out, or if torch.compile fails."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            raise UserError(f"out of memory: {hint}") from error
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = str(error).strip().partition("\n")[0][:200]
            raise UserError(f"torch.compile failed ({reason}): use --no-compile, or install a C++ compiler") from error
        raise


def largest_that_fits(candidates: list[int], attempt: Callable[[int], None]) -> int:
    """
    Return the first candidate that attempt() accepts, 0 if none fits in memory.

    Any failure leads to the next candidate: memory may run out, or a kernel may exceed a GPU's launch limits. If the
    last one fails for a reason other than memory, raise that error.
    """
    refusal = None
    for n in candidates:
        try:
            attempt(n)
            return n
        except (RuntimeError, ValueError, MemoryError) as error:
            refusal = error.with_traceback(None)  # its frames would keep the attempt's tensors alive
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if refusal and not out_of_memory(refusal):
        raise refusal
    return 0


def choose_micro_batch(
    config, model: nn.Module, dist: Distributed, plan, autocast: Callable, previous: int | None
) -> int:
    """
    Return --micro-batch; for auto the largest divisor of a rank's sequences that fits in every rank's memory.

    On a CPU, the largest of at most CPU_TOKENS tokens. On a GPU, micro-steps are tried with the model as it is, and
    what it will hold besides is set aside: optimizer state, DDP's buckets. Under fsdp the plan alone decides: a rank
    that ran out of memory while it tried would leave the others waiting. Collective.
    config:   the run's options (train_gpt2.Config)
    plan:     of the run (training.plan.Plan)
    autocast: returns the context that the model runs in
    previous: the resumed run's size, kept if it divides, so that results stay bit-identical
    """
    if config.micro_batch != "auto":
        return config.micro_batch
    sequences, device = config.sequences_per_rank(dist.world_size), next(model.parameters()).device
    if previous and sequences % previous == 0:
        return previous
    divisors = [n for n in range(sequences, 0, -1) if sequences % n == 0]
    if device.type != "cuda":
        return next((n for n in divisors if n * config.block_size <= CPU_TOKENS), 1)
    memory = torch.cuda.get_device_properties(device).total_memory
    held = plan.optimizer_bytes() + int(MARGIN * memory)
    held += sum(p.nbytes for p in model.parameters()) if dist.world_size > 1 else 0  # DDP's buckets

    def attempt(n: int) -> None:
        if dist.mode == "fsdp":
            if not plan.fits(n, memory):
                raise MemoryError
            return
        model.zero_grad(set_to_none=True)
        reserved = torch.empty(held, dtype=torch.uint8, device=device)
        tokens = torch.zeros(n, config.block_size, dtype=torch.int64, device=device)
        for _ in range(min(2, sequences // n)):  # the second micro-step finds gradients in memory
            with autocast():
                loss = model(tokens, tokens)
            loss.backward()
        del loss, tokens
        update = torch.empty(plan.update_bytes(), dtype=torch.uint8, device=device)
        del reserved, update

    with as_user_error():
        found = -dist.all_reduce_max(-largest_that_fits(divisors, attempt))
    model.zero_grad(set_to_none=True)
    if found == 0:
        raise UserError("not one sequence fits in memory: lower --block-size, or give --micro-batch 1 to try it")
    return found
