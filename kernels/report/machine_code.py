"""
Compile kernels ahead of time for any GPU, without one, and read their machine code.

    python -m kernels.report.machine_code sm_80 < kernels.json      in a process without TRITON_INTERPRET; prints JSON

A launch is compiled as traffic.py recorded it, specialized as Triton's launcher would: pointers aligned to 16 bytes and
integers divisible by 16 are marked so, an integer 1 and a None become constants. ptxas, cuobjdump and nvdisasm come
with the triton package. For AMD the assembly text is read.

Bulk accesses: lines of the kernel in which one access spans at least 16 bytes per thread of the program. Only those can
move 128 bits per thread, and only for those does it matter.

Occupancy: programs that fit on a multiprocessor at once, limited by warps, registers and shared memory.
"""

import collections
import contextlib
import dataclasses
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

AMD = "gfx942"  # compiled only: no limits and no occupancy
TENSOR_CORE = re.compile(r"^(HMMA|IMMA|DMMA|HGMMA|QGMMA|UTC\w*MMA|OMMA|v_mfma)")


@dataclasses.dataclass(frozen=True)
class Multiprocessor:
    """
    The capacity of one multiprocessor. Source: CUDA C++ Programming Guide, table "Technical Specifications per Compute
    Capability", https://docs.nvidia.com/cuda/cuda-c-programming-guide; arch_traits.h of NVIDIA's cccl agrees.
    """

    warps: int
    programs: int
    shared_bytes: int
    shared_bytes_per_program: int  # the most that one program may request
    registers: int = 65_536
    registers_step: int = 256  # a warp's registers are rounded up to a multiple of it
    warps_step: int = 4  # and the warps that registers allow down to a multiple of it: four schedulers
    shared_step: int = 128
    shared_reserved: int = 1024  # per program, for the system, from sm_80 on


KB = 1024
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 164 * KB, 163 * KB),
    "sm_86": Multiprocessor(48, 16, 100 * KB, 99 * KB),
    "sm_89": Multiprocessor(48, 24, 100 * KB, 99 * KB),
    "sm_90": Multiprocessor(64, 32, 228 * KB, 227 * KB),
    "sm_100": Multiprocessor(64, 32, 228 * KB, 227 * KB),
    "sm_120": Multiprocessor(48, 24, 100 * KB, 99 * KB),
}
ARCHITECTURES = (*MULTIPROCESSORS, AMD)


def programs_that_fit(limits: Multiprocessor, warps: int, registers: int, shared_bytes: int) -> int:
    """Return how many programs run on one multiprocessor at once. registers: per thread; shared_bytes: per program."""
    fit = [limits.programs, limits.warps // warps]
    if registers:
        per_warp = round_up(registers * 32, limits.registers_step)
        fit.append(limits.registers // per_warp // limits.warps_step * limits.warps_step // warps)
    shared = round_up(shared_bytes + limits.shared_reserved, limits.shared_step)
    if shared:
        fit.append(limits.shared_bytes // shared)
    return min(fit)


def round_up(number: int, step: int) -> int:
    return -(-number // step) * step


# --------------------------------------------------------------------------- compiling


def compile_launch(launch: dict, architecture: str):
    """Return Triton's compiled kernel, the CPU seconds it took, and what ptxas said; no cache is used."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(launch["module"]), launch["kernel"])
    signature, constants, attributes = {}, dict(launch["constants"]), {}
    for position, name in enumerate(kernel.arg_names):
        value, specialized = launch["arguments"].get(name), not kernel.params[position].do_not_specialize
        if name in constants or value is None or (value == 1 and isinstance(value, int) and specialized):
            signature[name] = "constexpr"
            constants.setdefault(name, value)
            continue
        if isinstance(value, int):
            value = ["i32" if -(2**31) <= value < 2**31 else "i64", specialized and value % 16 == 0]
        signature[name], divisible = ["fp32", False] if isinstance(value, float) else value
        if divisible:
            attributes[(position,)] = [["tt.divisibility", 16]]
    amd = architecture == AMD
    target = GPUTarget("hip", AMD, 64) if amd else GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = True
    log, start = io.StringIO(), sum(os.times()[:4])
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target, launch["options"])
    return compiled, sum(os.times()[:4]) - start, log.getvalue()


def tool(name: str, *arguments: str) -> str:
    """Return the output of one of NVIDIA's tools inside the triton package."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True, encoding="utf-8").stdout


# --------------------------------------------------------------------------- reading


def read_cubin(cubin: bytes) -> tuple[dict, list]:
    """Return registers, stack and local bytes of NVIDIA code, and its instructions as (line of the kernel, opcode)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", tool("cuobjdump", "-res-usage", str(path))))
        text = tool("nvdisasm", "-c", "-g", str(path))
    code = r"\s*/\*[0-9a-f]+\*/\s+(?:\{ *)?(?:@!?U?P\w+ +)?([A-Z][\w.]*)"
    names = {"REG": "registers", "STACK": "stack_bytes", "LOCAL": "local_bytes"}
    found = {ours: int(usage[theirs]) for theirs, ours in names.items()}
    return found, instructions(text, r'.*//## File "[^"]*", line (\d+)', code)


def read_amd(assembly: str) -> tuple[dict, list]:
    """Return the same for AMD code, which spills to the private segment."""

    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    private = field("private_segment_fixed_size")
    found = {"registers": field("vgpr_count"), "stack_bytes": private, "local_bytes": 0}
    return found, instructions(assembly, r"\s*\.loc\s+\d+\s+(\d+)", r"\s+([a-z]\w+)")


def instructions(text: str, marker: str, code: str) -> list[tuple[int, str]]:
    """Return (line of the kernel, opcode) per row that matches `code`; rows that match `marker` name the line."""
    line, found = 0, []
    for row in text.splitlines():
        if number := re.match(marker, row):
            line = int(number[1])
        elif opcode := re.match(code, row):
            found.append((line, opcode[1]))
    return found


def width_of_access(opcode: str) -> tuple[int, bool] | None:
    """Return the bits that an instruction moves between global memory and a thread, and whether it stores, or None."""
    parts = opcode.split(".")
    if parts[0] in ("LDG", "STG", "LDGSTS"):
        bits = [int(part) for part in parts if part in ("64", "128", "256")]
        narrow = [int(part[1:]) for part in parts if re.fullmatch(r"[US](8|16)", part)]
        return (bits + narrow + [32])[0], parts[0] == "STG"
    if amd := re.match(r"(?:global|buffer|flat)_(load|store)_(\w+)", opcode):
        words = re.search(r"dwordx(\d)", amd[2])
        bits = 32 * int(words[1]) if words else 32 if "dword" in amd[2] else 16 if "short" in amd[2] else 8
        return bits, amd[1] == "store"
    return None


def figures(launch: dict, sites: dict[str, int], architecture: str) -> dict:
    """Compile one launch and read its machine code. sites: line -> bytes that one access in it spans."""
    compiled, seconds, log = compile_launch(launch, architecture)
    if architecture == AMD:
        result, opcodes_by_line = read_amd(compiled.asm["amdgcn"])
    else:
        result, opcodes_by_line = read_cubin(compiled.asm["cubin"])
    warps = compiled.metadata.num_warps
    wide_lines = {int(line) for line, spanned in sites.items() if spanned >= 16 * warps * compiled.metadata.warp_size}
    narrowest, widest = {}, 0  # line -> bits; bits
    for line, opcode in opcodes_by_line:
        if access := width_of_access(opcode):
            widest = max(widest, access[0])
            if line in wide_lines:
                narrowest[line] = min(access[0], narrowest.get(line, access[0]))
    opcodes = collections.Counter(re.split(r"[.]", opcode)[0] for _, opcode in opcodes_by_line)
    line = min(narrowest, key=narrowest.get, default=None)
    result |= {
        "spills": opcodes["STL"] + opcodes["LDL"],
        "shared_bytes": compiled.metadata.shared,
        "widest_bits": widest,
        "narrowest_bits": narrowest.get(line),
        "narrowest_line": line,
        "tensor_core": {name: n for name, n in sorted(opcodes.items()) if TENSOR_CORE.match(name)},
        "atomics": sum(n for name, n in opcodes.items() if re.match(r"(RED|REDG|ATOM|ATOMG)$|\w+_atomic_", name)),
        "barriers": opcodes["BAR"] + opcodes["s_barrier"],
        "wgmma": sum("GMMA" in opcode for _, opcode in opcodes_by_line),
        "waits": sum(opcode.startswith("WARPGROUP.DEPBAR") for _, opcode in opcodes_by_line),  # for wgmma
        "warnings": re.findall(r"\((C75\d\d)\) ([^\n]*)", log),  # of ptxas, about performance
        "instructions": sum(opcodes.values()) - opcodes["NOP"],
        "warps": warps,
        "stages": compiled.metadata.num_stages,
        "compile_seconds": seconds,
    }
    if limits := MULTIPROCESSORS.get(architecture):
        programs = programs_that_fit(limits, warps, result["registers"], result["shared_bytes"])
        result |= {"programs": programs, "occupancy": programs * warps / limits.warps}
    return result


if __name__ == "__main__":
    found = [figures(kernel["launch"], kernel["sites"], sys.argv[1]) for kernel in json.load(sys.stdin)]
    print(json.dumps(found))
