"""
The arithmetic of a GPU in numpy: exact to the bit if PTX defines the result, else off by a chosen part of its bound.

`errors` says how far approximate instructions are off: "exact" (rounded correctly), "uniform" (anything up to half the
bound, an assumption, by a hash of the input's bits) or "worst" (by the bound, up or down by the same hash).

    ex2.approx, div.full    2 units in the last place; exp2(0) = 1 and x / 1 = x
    rsqrt.approx            a relative 2^-22.9
    mma                     products exact; eight of them and the sum so far are aligned to the largest, cut off one bit
                            below its last bit, added, and cut to float32, as measured on an A100; in every mode

Sources: NVIDIA, "Parallel Thread Execution ISA", https://docs.nvidia.com/cuda/parallel-thread-execution; Fasi, Higham,
Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021, https://doi.org/10.7717/peerj-cs.330. Tensor
cores since the A100's keep more bits or add more products at once; here all add as an A100's.
"""

import numpy as np

ERRORS = ("exact", "uniform", "worst")
SMALLEST_NORMAL = np.float32(2.0**-126)

# ----------------------------------------------------------------------------- rounding


def flush(x: np.ndarray) -> np.ndarray:
    """Return x with subnormal elements replaced by zeros of their sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def round_to_16_bits(x: np.ndarray, type: str) -> np.ndarray:
    """Return the bits of float32 elements rounded to "bf16" or "f16"."""
    if type == "f16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def widen(bits: np.ndarray, type: str) -> np.ndarray:
    """Return the float32 values of the bits of "bf16" or "f16" elements."""
    if type == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return a * b + c, rounded once to float32."""
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c  # to round again errs only if halfway between two float32, or subnormal
    if ((total.view(np.int64) & (2**29 - 1)) == 2**28).any() or (np.abs(total) < SMALLEST_NORMAL).any():
        total = rounded_to_odd(product, c)
    return total.astype(np.float32)


def rounded_to_odd(product: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return product + c in float64, with an odd last bit if inexact: rounding again, to fewer bits, is then right."""
    total = product + c
    other, bits = total - product, total.view(np.int64)
    rest = (product - (total - other)) + (c - other)  # what rounding to float64 lost
    inexact = ((rest < 0) | (rest > 0)) & ((bits & 1) == 0)
    return np.where(inexact, bits + np.where((rest > 0) == (total > 0), 1, -1), bits).view(np.float64)


def fma_16_bits(type: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return the bits of a * b + c, rounded once to "bf16" or "f16"."""
    total = rounded_to_odd(np.multiply(a, b, dtype=np.float64), c)
    if type == "f16":
        return total.astype(np.float16).view(np.uint16)
    bits = total.view(np.int64)
    cut = (bits >> 29 << 29).view(np.float64).astype(np.float32).view(np.uint32)  # 8 bits are kept of these 24
    return round_to_16_bits((cut | ((bits & (2**29 - 1)) != 0)).view(np.float32), type)


# ------------------------------------------------------------------------- approximation


def within(bound: np.ndarray, bits: np.ndarray, errors: str) -> np.ndarray:
    """Return the error of an approximate result, by a hash of the input's bits."""
    share = ((bits ^ bits >> np.uint32(15)) * np.uint32(2654435761)).view(np.int32) / 2.0**31
    return bound * {"exact": 0, "uniform": share / 2, "worst": np.sign(share)}[errors]


def off_by_2_units(result: np.ndarray, bits: np.ndarray, errors: str) -> np.ndarray:
    rounded = result.astype(np.float32)
    off = (result + within(2.0 * np.spacing(np.abs(rounded)), bits, errors)).astype(np.float32)
    return np.where(np.isfinite(rounded) & (rounded != 0), off, rounded)


def ex2(x: np.ndarray, errors: str) -> np.ndarray:
    x = flush(x)
    approximate = off_by_2_units(np.exp2(x.astype(np.float64)), x.view(np.uint32), errors)
    return np.where(x == 0, np.float32(1), flush(approximate))


def div_full(a: np.ndarray, b: np.ndarray, errors: str) -> np.ndarray:
    bits = a.view(np.uint32) ^ b.view(np.uint32) * np.uint32(31)
    return np.where(b == 1, a, off_by_2_units(np.divide(a, b, dtype=np.float64), bits, errors))


def rsqrt(x: np.ndarray, errors: str) -> np.ndarray:
    exact = 1 / np.sqrt(flush(x).astype(np.float64))
    return (exact + within(exact * 2.0**-22.9, x.view(np.uint32), errors)).astype(np.float32)


# --------------------------------------------------------------------------- tensor core


def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return a.T @ b + c per warp as an A100 adds. a: (16 k, warps, m); b: (16 k, warps, n); c: (warps, m, n)."""
    for k in (0, 8):
        products = a[k : k + 8, :, :, None] * b[k : k + 8, :, None, :]
        largest = np.maximum(np.abs(products).max(axis=0), np.abs(c))
        finite = np.isfinite(largest)
        exponent = np.clip((largest.view(np.int32) >> 23) - 127, -100, 127)
        scale = np.ldexp(np.float32(1), np.minimum(24 - exponent, 127))
        cut = (products * scale).astype(np.int32).sum(axis=0, dtype=np.int32) + (c * scale).astype(np.int32)
        total = (cut * np.ldexp(1.0, exponent - 24)).view(np.int64)
        total = (total >> 29 << 29).view(np.float64).astype(np.float32)
        c = total if finite.all() else np.where(finite, total, products.sum(axis=0) + c)
    return c
