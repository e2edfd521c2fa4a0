"""
Every kernel on every GPU, without one: machine code, traffic, and the time that both allow.

    python -m kernels.report                                         all targets, at the shapes of gpt2-124m
    python -m kernels.report --preset gpt2-1558m --shape T=2048 --arch sm_80 sm_90
    python -m kernels.report --arch sm_80 sm_90 --check              exit status 1 when a limit below is broken
    python -m kernels.report --json report.json --plot roofline.png

Three kinds of numbers, and every table says which it holds. Compiled: read from machine code that Triton and ptxas made
here. Counted: from running the kernels in Triton's interpreter, scaled to the shape. Model: arithmetic on counted bytes
and on the makers' data sheets. None is a timing; for those there is kernels.bench.

Two processes do the work, since Triton decides at import whether its kernels are interpreted or compiled:
kernels.report.traffic with TRITON_INTERPRET, kernels.report.machine_code without it.
"""

import argparse
import concurrent.futures
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from kernels.gpus import GPUS
from kernels.report import roofline
from kernels.report.machine_code import ARCHITECTURES, MULTIPROCESSORS
from kernels.report.shapes import PRESETS, Shape, parse_shape

LIMITS = {  # of --check, for each kernel and target; AMD code is compiled only, and not held to them
    "stack_bytes": 0,  # where spilled registers go
    "spills": 0,  # instructions that store or load them
    "local_bytes": 0,
    "atomics": 0,  # sums in another order every time
    "compile_seconds": 30,
}
NARROWEST_BITS = 128  # of bulk accesses to global memory: the widest there is
TOUCHED_OVER_MINIMUM = 1.06  # partial sums, which weigh more where rows are few
TENSOR_CORE = {"sm_90": "HGMMA"}  # where tl.dot is; elsewhere any tensor-core instruction will do
ISSUED_OVER_MINIMUM = 1.1  # bytes read again, most of them from a cache; but for these:
ISSUED_OVER_MINIMUM_OF = {  # attention: at T = 1,024; it grows with T
    "layer_norm.forward": 2.4,  # weight and bias again for every row: 14 bytes a number instead of 6
    "add_layer_norm.forward": 1.7,  # likewise, 20 instead of 12
    "linear_gelu.forward": 1.15,  # the bias again for every 8 rows
    "causal_attention.forward": 2.8,  # a head's keys and values again for every block of its queries
    "causal_attention.backward_dq": 2.2,  # likewise
    "causal_attention.backward_dkdv": 2.25,  # its queries again for every block of keys
    "linear_cross_entropy.in_place": 1.55,  # the logits twice, the second time soon after: 6 instead of 4
}


# --------------------------------------------------------------------------- processes


def child(module: str, *arguments: str, work: object, interpret: bool) -> list | dict:
    """What `python -m module` prints as JSON, given `work` as JSON, with or without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    paths = (str(Path(__file__).parents[2]), environment.get("PYTHONPATH"))
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(
        command, input=json.dumps(work), env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    if done.returncode:
        raise ValueError(f"{' '.join(command[1:])} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def count(shape: Shape, architectures: list[str]) -> dict[str, list[dict]]:
    """By architecture, every kernel: how it is launched there, and its counted traffic. See traffic.report."""
    work = {"shape": dataclasses.asdict(shape), "architectures": architectures}
    return child("kernels.report.traffic", work=work, interpret=True)


def compile_all(kernels: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """By architecture, what machine_code.figures says of every kernel; as many at a time as there are cores."""

    def one(architecture: str) -> list[dict]:
        work = [{"launch": kernel["launch"], "sites": kernel["sites"]} for kernel in kernels[architecture]]
        return child("kernels.report.machine_code", architecture, work=work, interpret=False)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(kernels, pool.map(one, kernels), strict=True))


# --------------------------------------------------------------------------- gate


def broken_limits(kernels: dict[str, list[dict]], code: dict[str, list[dict]]) -> list[str]:
    """One sentence for each limit that is broken: kernel, target, figure."""
    broken = []
    for architecture in filter(code.__contains__, MULTIPROCESSORS):
        for kernel, found in zip(kernels[architecture], code[architecture], strict=True):
            sentences = [*broken_by_traffic(kernel), *broken_by_code(kernel, found, architecture)]
            broken += [f"{kernel['name']} on {architecture}: {sentence}" for sentence in sentences]
    return broken


def broken_by_traffic(kernel: dict) -> Iterator[str]:
    issued = (kernel["loaded"] + kernel["stored"]) / kernel["minimum"]
    allowed = ISSUED_OVER_MINIMUM_OF.get(kernel["name"], ISSUED_OVER_MINIMUM)
    if issued > allowed:
        yield f"bytes issued are {issued:.3f} of the minimum, the limit is {allowed}"
    touched = kernel["touched"] / kernel["minimum"]
    if touched > TOUCHED_OVER_MINIMUM:
        yield f"bytes touched are {touched:.3f} of the minimum, the limit is {TOUCHED_OVER_MINIMUM}"
    if kernel["atomics"]:
        yield f"{kernel['atomics']} atomic operations, the limit is 0"


def broken_by_code(kernel: dict, found: dict, architecture: str) -> Iterator[str]:
    for figure, limit in LIMITS.items():
        if (found[figure] or 0) > limit:
            yield f"{figure.replace('_', ' ')} {found[figure]}, the limit is {limit}"
    shared = MULTIPROCESSORS[architecture].shared_bytes_of_program
    if found["shared_bytes"] > shared:
        yield f"shared bytes {found['shared_bytes']}, the limit is {shared}"
    if (found["narrowest_bits"] or NARROWEST_BITS) < NARROWEST_BITS:
        where = f"{kernel['launch']['module']} line {found['narrowest_line']}"
        yield f"accesses of {found['narrowest_bits']} bits at {where}, the limit is {NARROWEST_BITS}"
    wanted = TENSOR_CORE.get(architecture, "")
    if kernel["flops"] and not any(name.startswith(wanted) for name in found["tensor_core"]):
        yield f"tl.dot, but no tensor-core instruction {wanted}".rstrip()


# --------------------------------------------------------------------------- tables


def table(title: str, header: list[str], rows: list[list]) -> str:
    """Text columns as wide as they must be; the first to the left, the others to the right."""
    cells = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in cells)
    ]
    return "\n".join(["", title, "", lines[0], "-" * len(lines[0]), *lines[1:]])


def machine_code_table(kernels: list[dict], architecture: str, found: list[dict]) -> str:
    rows = []
    for kernel, f in zip(kernels, found, strict=True):
        cores = " ".join(f"{n} {name}" for name, n in f["tensor_core"].items())
        narrow = "" if f["narrowest_bits"] in (None, f["widest_bits"]) else f"{f['narrowest_bits']}-"
        fit = f"{f['programs']} {f['occupancy']:.0%}" if "programs" in f else ""
        seconds = "cached" if f["compile_seconds"] is None else f"{f['compile_seconds']:.1f}"
        rows.append([kernel["name"], f["warps"], f["registers"], f"{f['stack_bytes']}+{f['spills']}"])
        rows[-1] += [f["shared_bytes"], f"{narrow}{f['widest_bits']}", cores, fit, f["instructions"], seconds]
    limits = MULTIPROCESSORS.get(architecture)
    allowed = f", {limits.shared_bytes_of_program:,} bytes of shared memory a program at most" if limits else ""
    title = f"{architecture}: compiled{allowed}"
    header = ["kernel", "warps", "regs", "spill", "shared", "bits", "tensor cores", "programs", "instr", "s"]
    return table(title, header, rows)


def traffic_table(kernels: list[dict], architectures: list[str]) -> str:
    def mb(number):
        return f"{number / 1e6:,.1f}"

    rows = []
    for k in kernels:
        over = (k["loaded"] + k["stored"]) / k["minimum"]
        row = [
            k["name"],
            k["calls"],
            k["launches"],
            mb(k["loaded"]),
            mb(k["stored"]),
            mb(k["touched"]),
            mb(k["minimum"]),
        ]
        rows.append([*row, f"{over:.2f}", f"{k['flops'] / 1e9:,.1f}", f"{k['arithmetic'] / 1e9:,.1f}"])
    title = f"Traffic of one call as launched on {', '.join(architectures)}: counted."
    title += " MB; over: issued / minimum; 10^9 operations"
    header = ["kernel", "calls", "launches", "loaded", "stored", "touched", "minimum", "over", "dot", "other"]
    return table(title, header, rows)


def traffic_tables(kernels: dict[str, list[dict]]) -> Iterator[str]:
    """One table for all architectures whose kernels move the same bytes with the same arithmetic."""
    moved = ("name", "launches", "loaded", "stored", "touched", "minimum", "flops", "arithmetic")
    alike = {}
    for architecture, rows in kernels.items():
        alike.setdefault(str([[row[key] for key in moved] for row in rows]), []).append(architecture)
    for architectures in alike.values():
        yield traffic_table(kernels[architectures[0]], architectures)


def roofline_table(kernels: dict[str, list[dict]]) -> str:
    names = [roofline.TYPICAL[architecture] for architecture in kernels]
    rows = []
    for same in zip(*kernels.values(), strict=True):
        least = [roofline.kernel_seconds(kernel, GPUS[name]) for kernel, name in zip(same, names, strict=True)]
        rows.append([same[0]["name"], *(f"{1e6 * seconds:,.0f} {bound[0]}" for seconds, bound in least)])
    title = (
        "Least microseconds of one call: model, from counted traffic; bound by m(emory), t(ensor cores), a(rithmetic)"
    )
    return table(title, ["kernel", *names], rows)


def steps(kernels: dict[str, list[dict]], shape: Shape) -> dict[str, dict[str, dict]]:
    """By GPU and by which families are in Triton: what roofline.step says."""
    sets = roofline.configurations()
    named = {roofline.TYPICAL[architecture]: rows for architecture, rows in kernels.items()}
    return {
        name: {c: roofline.step(rows, shape, GPUS[name], families) for c, families in sets.items()}
        for name, rows in named.items()
    }


def step_table(shape: Shape, name: str, found: dict[str, dict]) -> str:
    columns = [column for column in found["all"] if column != "mfu"]
    rows = [
        [configuration, *(f"{parts[column]:,.2f}" for column in columns), f"{parts['mfu']:.1%}"]
        for configuration, parts in found.items()
    ]
    title = f"A step of {shape.N:,} tokens on one {name}, least milliseconds by what is in Triton: model"
    return table(title, ["Triton", *columns, "MFU"], rows)


# --------------------------------------------------------------------------- command line


def options(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.report",
        description="Machine code, traffic and roofline of every kernel, no GPU needed.",
    )
    parser.error = lambda message: fail(f"{message} (--help shows every option)")
    parser.add_argument("--preset", default="gpt2-124m", help=f"shapes to take: {', '.join(PRESETS)}")
    parser.add_argument(
        "--shape", nargs="+", default=[], metavar="T=2048", help="sizes other than the preset's: B T C H L V"
    )
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), help=f"of {' '.join(ARCHITECTURES)}")
    parser.add_argument("--check", action="store_true", help="exit with status 1 when a limit is broken")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--plot", metavar="FILE", help="draw the roofline there")
    return parser.parse_args(words)


def fail(message: str) -> None:
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


def run(chosen: argparse.Namespace) -> int:
    shape = parse_shape(chosen.preset, chosen.shape)
    unknown = [name for name in chosen.arch if name not in ARCHITECTURES]
    if unknown:
        raise ValueError(f"--arch {unknown[0]}: use some of {' '.join(ARCHITECTURES)}")
    if importlib.util.find_spec("triton") is None:
        raise ValueError("the package triton is not installed: there is nothing to compile with")
    kernels = count(shape, list(dict.fromkeys(chosen.arch)))
    code = compile_all(kernels)
    in_steps = steps(kernels, shape)
    sizes = " ".join(f"{letter}={number}" for letter, number in dataclasses.asdict(shape).items())
    print(f"{chosen.preset}: {sizes}, bfloat16 branches, float32 residual stream")
    for architecture, found in code.items():
        print(machine_code_table(kernels[architecture], architecture, found))
    print(*traffic_tables(kernels), roofline_table(kernels), sep="\n")
    for name, found in in_steps.items():
        print(step_table(shape, name, found))
    if chosen.json:
        everything = {"shape": dataclasses.asdict(shape), "counted": kernels, "compiled": code, "model": in_steps}
        Path(chosen.json).write_text(json.dumps(everything, indent=1), encoding="utf-8")
    if chosen.plot:
        roofline.plot(kernels, chosen.plot, f"{chosen.preset}: {sizes}")
    broken = broken_limits(kernels, code) if chosen.check else []
    if chosen.check:
        print("\n".join(["", *broken, f"{len(broken)} limits broken"]))
    return 1 if broken else 0


def main(words: list[str] | None = None) -> None:
    try:
        status = run(options(words))
    except ValueError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.strerror}: {error.filename}")
    raise SystemExit(status)


if __name__ == "__main__":
    main()
