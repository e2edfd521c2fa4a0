"""The hardware at hand: which device a run takes, which dtype it multiplies fast, and how fast at best."""

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch
from torch import nn

from data.files import UserError
from kernels.gpus import named_gpu

CPU_TOKENS = 16_384  # at once: more gain a CPU nothing


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that --device names; auto: this process's GPU, else an Apple GPU, else the CPU."""
    if name == "auto":
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    elif name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("training runs on cpu, cuda and mps")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0][:150]
        raise UserError(f"--device {name} cannot be used: {reason}; --device auto takes what is there") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """float32 or bfloat16; auto takes bfloat16 where the hardware multiplies it, float32 where it is only emulated."""
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            cpu = torch.cpu.get_capabilities()
            fast = device.type == "cpu" and (cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
        name = "bfloat16" if fast else "float32"
    return getattr(torch, name)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s that the GPU's data sheet names, the denominator of MFU; None where the table lacks it."""
    return named_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def named_peak(gpu: str) -> float | None:
    """The same by a GPU's name, as the driver spells it: "NVIDIA A100-SXM4-80GB"."""
    found = named_gpu(gpu)
    return found and found.flops


def out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory ran out, in any of the ways that PyTorch has for it."""
    texts = ("out of memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in texts)


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
    """The first of the candidates for which attempt() does not run out of memory; 0 when there is none."""
    for n in candidates:
        try:
            attempt(n)
            return n
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        gc.collect()  # here, not above: while the error is handled it holds on to the attempt's tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


def largest_micro_batch(model: nn.Module, block_size: int, most: int, copies: int, autocast: Callable) -> int:
    """
    The largest divisor of `most` whose sequences a forward and backward of `model` holds in memory; 0 if not even one.
    On a CPU the largest of at most CPU_TOKENS.

    copies: of the parameters, held aside meanwhile for the optimizer's state and the like
    autocast: gives the context that the model is called in
    """
    device, divisors = next(model.parameters()).device, [n for n in range(most, 0, -1) if most % n == 0]
    if device.type != "cuda":
        return next((n for n in divisors if n * block_size <= CPU_TOKENS), 1)

    def attempt(n: int) -> None:
        held = [torch.empty_like(p) for p in model.parameters() for _ in range(copies)]
        tokens = torch.zeros(n, block_size, dtype=torch.int64, device=device)
        with autocast():
            model(tokens, tokens).backward()
        del held

    found = largest_that_fits(divisors, attempt)
    model.zero_grad(set_to_none=True)
    return found
