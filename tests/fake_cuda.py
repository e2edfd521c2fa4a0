"""
Pretend to have a CUDA device, in processes that a test starts: `import fake_cuda` comes first and makes it.

Python and PyTorch see an A100, whose tensors lie in host memory and whose operators are the CPU's: fake_cuda.cpp, which
the test has built as FAKE_CUDA. An operator that mixes devices raises, as with CUDA. Triton's kernels are specialized
and not run: what they would write is 0. torch.compile runs the graphs for which it would generate code.
"""

import ctypes
import os

ctypes.CDLL(os.environ["FAKE_CUDA"])  # before PyTorch asks for the first time whether it has CUDA

import functools  # noqa: E402
import types  # noqa: E402

import torch  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler.compiler import make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

PROPERTIES = types.SimpleNamespace(
    name="NVIDIA A100-SXM4-80GB",
    major=8,
    minor=0,
    total_memory=85_000_000_000,
    multi_processor_count=108,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65_536,
    shared_memory_per_block_optin=166_912,
    shared_memory_per_multiprocessor=167_936,
    L2_cache_size=40 * 2**20,
    gcnArchName="",
)


class Stream:
    """A stream and an event, on which nothing ever runs."""

    cuda_stream = stream_id = device_index = 0
    device_type, device = 1, torch.device("cuda", 0)

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    record = synchronize = wait_stream = wait_event = record_event = lambda self, *_: None
    query = lambda self: False  # noqa: E731  it has not happened yet
    elapsed_time = lambda self, other: 1.0  # noqa: E731  milliseconds


def waits() -> list[str]:
    """Return what the host would have waited for since the last call: item, copies between host and GPU, nonzero ..."""
    return torch.ops.fake_cuda.waits()


launches: list[tuple[str, str]] = []  # kernel, and the specialization that Triton would compile for its arguments


@functools.cache
def _binder(kernel: JITFunction):
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 80, 32)))


def _launch(kernel: JITFunction, *arguments, grid, warmup, **options) -> None:
    bound, specialization, options = _binder(kernel)(*arguments, **options)
    for name, value in bound.items():
        assert not isinstance(value, torch.Tensor) or value.is_cuda, f"{kernel.fn.__name__}: {name} is on the CPU"
    assert all(0 < size < 2**31 for size in grid[:1]) and all(0 < size < 2**16 for size in grid[1:]), grid
    name = f"{kernel.fn.__module__.removeprefix('kernels.')}.{kernel.fn.__name__}"
    launches.append((name, f"{specialization} {options}"))


def _answer(names: str, value, module=torch.cuda) -> None:
    for name in names.split():
        setattr(module, name, lambda *_, **__: value)


_answer("is_available is_initialized _is_compiled is_bf16_supported", True)
_answer("_sleep _lazy_init set_device synchronize empty_cache reset_peak_memory_stats", None)
_answer("current_device _exchange_device _maybe_exchange_device memory_allocated max_memory_allocated", 0)
_answer("device_count", 1)
_answer("current_stream", Stream())
_answer("get_device_properties", PROPERTIES)
_answer("get_device_name", PROPERTIES.name)
_answer("get_device_capability", (PROPERTIES.major, PROPERTIES.minor))
_answer("mem_get_info", (80_000_000_000, PROPERTIES.total_memory))
_answer("_cuda_getDevice _cuda_exchangeDevice _cuda_maybeExchangeDevice _cuda_getCurrentRawStream", 0, torch._C)
_answer("_cuda_getDeviceCount", 1, torch._C)
_answer("_cuda_setDevice", None, torch._C)
_answer("_cuda_isInBadFork", False, torch._C)
torch.cuda.default_generators = (torch.Generator("cuda"),)
torch.cuda.Event = Stream
JITFunction.run = _launch
_compile = torch.compile
torch.compile = lambda model, backend="aot_eager", **_: _compile(model, backend=backend)  # options are inductor's
