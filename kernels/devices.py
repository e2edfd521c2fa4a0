"""The hardware at hand: which device a run takes, which dtype it multiplies fast, and how fast at best."""

from collections.abc import Callable

import torch

PEAK_FLOPS = {  # words of a GPU's name -> dense bf16 FLOP/s with float32 accumulation, from NVIDIA's data sheets
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,  # ahead of the plain name, which is the SXM module's
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A40": 150e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


class DeviceError(Exception):
    """A device that is not there; the text says which."""


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that --device names; auto: this process's GPU, else an Apple GPU, else the CPU."""
    if name == "auto":
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    elif name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0][:150]
        raise DeviceError(f"--device {name} cannot be used: {reason}; --device auto takes what is there") from error
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
    words = f" {gpu.replace('-', ' ')} "
    return next((flops for name, flops in PEAK_FLOPS.items() if f" {name} " in words), None)


def largest_that_fits(candidates: list[int], attempt: Callable[[int], None]) -> int:
    """The first of the candidates for which attempt() does not run out of memory; 0 when there is none."""
    for n in candidates:
        try:
            attempt(n)
            return n
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    return 0
