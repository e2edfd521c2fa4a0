"""
Report machine code, traffic and least time of every kernel on every GPU, without a GPU.

    python -m kernels.report                                         all targets, at the shapes of gpt2-124m
    python -m kernels.report --preset gpt2-1558m --shape T=2048 --arch sm_80 sm_90
    python -m kernels.report --check                                 exit status 1 if a limit below is broken
    python -m kernels.report --json report.json --plot roofline.png

Every table says what it holds, as kernels/README.md explains: compiled, counted, or model. None is a timing; for those
there is kernels.bench. Other processes do the work, since Triton decides at import whether its kernels are interpreted
or compiled: kernels.report.traffic with TRITON_INTERPRET; kernels.report.machine_code, kernels.emulator.costs without.
"""

import concurrent.futures
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from kernels.command_line import exit_on_error, parse_options, table
from kernels.gpus import GPUS
from kernels.report import roofline
from kernels.report.machine_code import ARCHITECTURES, MULTIPROCESSORS
from kernels.report.shapes import Shape, parse_shape

LIMITS = {  # of --check, per kernel and NVIDIA target; AMD code is only compiled
    "stack_bytes": 0,  # hold spilled registers
    "spills": 0,  # instructions that store or load them
    "local_bytes": 0,
    "atomics": 0,  # add in a different order every time
    "compile_seconds": 30,
}
NARROWEST_BITS = 128  # of bulk accesses to global memory: the widest possible
UNIQUE_OVER_COMPULSORY = 1.06  # partial sums, which weigh more if rows are few
TENSOR_CORE = {"sm_90": "HGMMA"}  # for tl.dot; on other targets any tensor-core instruction will do
AMPLIFICATION = 1.1  # bytes issued / compulsory bytes: rereads, mostly from a cache. Exceptions:
AMPLIFICATION_OF = {  # attention: at T = 1,024; it grows with T
    "layer_norm.forward": 2.4,  # weight and bias again for every row: 14 bytes per element instead of 6
    "add_layer_norm.forward": 1.7,  # likewise, 20 instead of 12
    "linear_gelu.forward": 1.15,  # the bias again for every 8 rows
    "causal_attention.forward": 2.8,  # a head's keys and values again for every block of its queries
    "causal_attention.backward_dq": 2.2,  # likewise
    "causal_attention.backward_dkdv": 2.25,  # queries again for every block of keys
    "linear_cross_entropy.in_place": 1.55,  # the logits twice, the second time soon after: 6 instead of 4
}
EMULATED = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")  # the targets whose bank conflicts and sectors are counted
SECTORS = 1.0  # 32-byte sectors of global memory that accesses touch / the least for their bytes. Exceptions:
SECTORS_OF = {  # a thread takes 16 of every 32 bytes of the float32 stream
    "layer_norm.forward": 1.9,
    "layer_norm.backward": 1.4,
    "add_layer_norm.forward": 1.6,
    "add_layer_norm.backward": 1.5,
}


# --------------------------------------------------------------------------- processes


def child(module: str, *arguments: str, work: object, interpret: bool) -> list | dict:
    """Return what `python -m module` prints as JSON, given `work` as JSON, with or without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    paths = (str(Path(__file__).parents[2]), environment.get("PYTHONPATH"))
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments]
    streams = {"input": json.dumps(work), "capture_output": True, "text": True, "encoding": "utf-8"}
    done = subprocess.run(command, env=environment, **streams)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}, no message"])[-1]
        raise ValueError(f"{' '.join(command[1:])} failed: {reason}")
    return json.loads(done.stdout)


def count(shape: Shape, architectures: list[str]) -> dict[str, list[dict]]:
    """Return, by architecture, how every kernel is launched and its counted traffic. See traffic.report."""
    work = {"shape": dataclasses.asdict(shape), "architectures": architectures}
    return child("kernels.report.traffic", work=work, interpret=True)


def compile_all(kernels: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Return, by architecture, machine_code.figures of every kernel; one process per core at a time."""

    def one(architecture: str) -> list[dict]:
        work = [{"launch": kernel["launch"], "sites": kernel["sites"]} for kernel in kernels[architecture]]
        return child("kernels.report.machine_code", architecture, work=work, interpret=False)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(kernels, pool.map(one, kernels), strict=True))


def emulate_all(shape: Shape, architectures: Iterable[str]) -> dict[str, dict]:
    """Return kernels.emulator.costs of every kernel by architecture, if that can be emulated, and by name."""
    targets, work = [name for name in architectures if name in EMULATED], dataclasses.asdict(shape)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = pool.map(lambda name: child("kernels.emulator.costs", name, work=work, interpret=False), targets)
        return dict(zip(targets, runs, strict=True))


# --------------------------------------------------------------------------- gate


def broken_limits(kernels: dict[str, list[dict]], code: dict[str, list[dict]], costs: dict[str, dict]) -> list[str]:
    """Return one sentence per limit that is broken: kernel, target, figure."""
    broken = []
    for architecture in filter(code.__contains__, MULTIPROCESSORS):
        for kernel, found in zip(kernels[architecture], code[architecture], strict=True):
            sentences = [*broken_by(kernel, found, architecture)]
            if architecture in costs:
                sentences += broken_by_costs(kernel["name"], costs[architecture][kernel["name"]])
            broken += [f"{kernel['name']} on {architecture}: {sentence}" for sentence in sentences]
    return broken


def amplification(kernel: dict) -> float:
    return (kernel["loaded"] + kernel["stored"]) / kernel["compulsory_bytes"]


def broken_by(kernel: dict, found: dict, architecture: str) -> Iterator[str]:
    unique = kernel["unique_bytes"] / kernel["compulsory_bytes"]
    for what, ratio, limit in (
        ("bytes issued", amplification(kernel), AMPLIFICATION_OF.get(kernel["name"], AMPLIFICATION)),
        ("unique bytes", unique, UNIQUE_OVER_COMPULSORY),
    ):
        if ratio > limit:
            yield f"{what} are {ratio:.3f} of the compulsory ones, the limit is {limit}"
    if kernel["atomics"]:
        yield f"{kernel['atomics']} atomic operations, the limit is 0"
    limits = LIMITS | {"shared_bytes": MULTIPROCESSORS[architecture].shared_bytes_per_program}
    for figure, limit in limits.items():
        if found[figure] > limit:
            yield f"{figure.replace('_', ' ')} {found[figure]}, the limit is {limit}"
    if (found["narrowest_bits"] or NARROWEST_BITS) < NARROWEST_BITS:
        place = f"{kernel['launch']['module']} line {found['narrowest_line']}"
        yield f"accesses of {found['narrowest_bits']} bits at {place}, the limit is {NARROWEST_BITS}"
    for number, sentence in found["warnings"]:
        yield f"ptxas warns {number}, the limit is no warning about performance: {sentence}"
    if 0 < found["wgmma"] <= found["waits"]:
        yield f"{found['waits']} waits for {found['wgmma']} wgmma, one after the other: the limit is one for several"
    wanted = TENSOR_CORE.get(architecture, "")
    if kernel["flops"] and not any(name.startswith(wanted) for name in found["tensor_core"]):
        yield f"tl.dot, but no tensor-core instruction {wanted}".rstrip()


def broken_by_costs(name: str, found: dict) -> Iterator[str]:
    if found["wavefronts"] > found["least_wavefronts"]:
        yield f"bank conflicts, the limit is none: {found['worst_wavefronts']} wavefronts of shared memory"
    ratio, limit = found["sectors"] / found["least_sectors"], SECTORS_OF.get(name, SECTORS)
    if ratio > limit:
        yield f"sectors are {ratio:.3f} of the least, the limit is {limit}: {found['worst_sectors']}"


# --------------------------------------------------------------------------- tables


def machine_code_table(kernels: list[dict], architecture: str, found: list[dict]) -> str:
    rows = []
    for kernel, f in zip(kernels, found, strict=True):
        narrow = "" if f["narrowest_bits"] in (None, f["widest_bits"]) else f"{f['narrowest_bits']}-"
        row = {"kernel": kernel["name"], "warps": f["warps"], "regs": f["registers"]}
        row |= {"spill": f"{f['stack_bytes']}+{f['spills']}", "shared": f["shared_bytes"]}
        row |= {"bits": f"{narrow}{f['widest_bits']}"}
        waits = [f"{f['waits']} waits"] if f["wgmma"] else []
        row |= {"tensor cores": ", ".join([f"{n} {name}" for name, n in f["tensor_core"].items()] + waits)}
        row |= {"programs": f"{f['programs']} {f['occupancy']:.0%}" if "programs" in f else ""}
        rows.append(row | {"instr": f["instructions"], "s": f"{f['compile_seconds']:.1f}"})
    limits = MULTIPROCESSORS.get(architecture)
    allowed = f", at most {limits.shared_bytes_per_program:,} bytes of shared memory per program" if limits else ""
    return table(f"{architecture}: compiled{allowed}", rows)


def summary_table(kernels: dict[str, list[dict]], code: dict[str, list[dict]]) -> str:
    rows = []
    for same, found in zip(zip(*kernels.values(), strict=True), zip(*code.values(), strict=True), strict=True):
        row = {"kernel": same[0]["name"]}
        for architecture, f in zip(kernels, found, strict=True):
            cell = [f["registers"], f["stack_bytes"] + f["local_bytes"] + f["spills"]]
            cell += [f["programs"]] if "programs" in f else []
            cell += [f["waits"]] if f["wgmma"] else []
            row[architecture] = " ".join(map(str, cell))
        rows.append(row)
    title = "Registers, spill, programs per multiprocessor, and on sm_90 waits for the tensor cores: compiled"
    return table(title, rows)


def cost_table(costs: dict[str, dict]) -> str:
    rows = []
    for name in next(iter(costs.values())):
        row = {"kernel": name}
        for architecture, found in costs.items():
            f = found[name]
            conflicts = f"{f['wavefronts'] / f['least_wavefronts']:.2f}" if f["wavefronts"] else "-"
            row[architecture] = f"{conflicts} {f['sectors'] / f['least_sectors']:.2f}"
        rows.append(row)
    return table("Wavefronts of shared memory, sectors of global memory, over the least: counted, emulated", rows)


def traffic_tables(kernels: dict[str, list[dict]]) -> Iterator[str]:
    """Yield one table for all architectures whose kernels move the same bytes with the same arithmetic."""
    alike = {}
    for architecture, counted in kernels.items():
        rows = []
        for k in counted:
            row = {"kernel": k["name"], "calls": k["calls"], "launches": k["launches"]}
            for figure in ("loaded", "stored", "unique_bytes", "compulsory_bytes"):
                row[figure.removesuffix("_bytes")] = f"{k[figure] / 1e6:,.1f}"
            row |= {"ampl": f"{amplification(k):.2f}", "dot": f"{k['flops'] / 1e9:,.1f}"}
            rows.append(row | {"other": f"{k['arithmetic'] / 1e9:,.1f}"})
        alike.setdefault(json.dumps(rows), []).append(architecture)
    for rows, architectures in alike.items():
        title = f"Traffic per call as launched on {', '.join(architectures)}: counted."
        yield table(f"{title} MB; ampl: issued / compulsory; 10^9 operations", json.loads(rows))


def roofline_table(kernels: dict[str, list[dict]]) -> str:
    rows = []
    for same in zip(*kernels.values(), strict=True):
        row = {"kernel": same[0]["name"]}
        for architecture, kernel in zip(kernels, same, strict=True):
            name = roofline.REPRESENTATIVE_GPU[architecture]
            seconds, bound = roofline.kernel_seconds(kernel, GPUS[name])
            row[name] = f"{1e6 * seconds:,.0f} {bound[0]}"
        rows.append(row)
    title = "Least microseconds per call: model, from counted traffic; bound by m(emory), t(ensor cores), a(rithmetic)"
    return table(title, rows)


def steps(kernels: dict[str, list[dict]], shape: Shape) -> dict[str, dict[str, dict]]:
    """Return roofline.step by GPU and by which families are in Triton."""
    found = {}
    for architecture, rows in kernels.items():
        name, choices = roofline.REPRESENTATIVE_GPU[architecture], roofline.configurations().items()
        found[name] = {choice: roofline.step(rows, shape, GPUS[name], *what) for choice, what in choices}
    return found


def step_table(shape: Shape, name: str, found: dict[str, dict]) -> str:
    rows = []
    for choice, parts in found.items():
        milliseconds = {part: f"{figure:,.2f}" for part, figure in parts.items() if part != "mfu"}
        rows.append({"Triton": choice, **milliseconds, "MFU": f"{parts['mfu']:.1%}"})
    title = f"A step of {shape.N:,} tokens on one {name}, least milliseconds by what is in Triton: model"
    return f"{table(title, rows)}\n\n{roofline.verdict(found)}"


# --------------------------------------------------------------------------- command line


@dataclasses.dataclass
class Options:
    """Report machine code, traffic and roofline of every kernel, without a GPU."""

    preset: str = "gpt2-124m"  # shapes to take, one of the presets of train_gpt2.py
    shape: tuple[str, ...] = ()  # sizes other than the preset's, such as T=2048: letters B T C H L V
    arch: tuple[str, ...] = ARCHITECTURES  # targets to compile for
    check: bool = False  # exit with status 1 if a limit is broken
    json: Path | None = None  # write all figures to this file
    plot: Path | None = None  # draw the roofline to this file


def run(options: Options) -> int:
    shape = parse_shape(options.preset, options.shape)
    unknown = [name for name in options.arch if name not in ARCHITECTURES]
    if unknown:
        raise ValueError(f"--arch {unknown[0]}: use some of {' '.join(ARCHITECTURES)}")
    if importlib.util.find_spec("triton") is None:
        raise ValueError("the package triton is not installed: there is nothing to compile with")
    kernels = count(shape, list(dict.fromkeys(options.arch)))
    code, costs, in_steps = compile_all(kernels), emulate_all(shape, kernels), steps(kernels, shape)
    print(f"{options.preset}: {shape}, bfloat16 branches, float32 residual stream")
    compiled = [machine_code_table(kernels[architecture], architecture, found) for architecture, found in code.items()]
    modeled = [step_table(shape, name, found) for name, found in in_steps.items()]
    counted = [cost_table(costs)] if costs else []
    counted += [*traffic_tables(kernels), roofline_table(kernels)]
    print(*compiled, summary_table(kernels, code), *counted, *modeled, sep="\n")
    if options.json:
        figures = {"shape": dataclasses.asdict(shape), "counted": kernels, "compiled": code, "emulated": costs}
        figures["model"] = in_steps
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    if options.plot:
        roofline.plot(kernels, options.plot, f"{options.preset}: {shape}")
    if not options.check:
        return 0
    broken = broken_limits(kernels, code, costs)
    print("\n".join(["", *broken, f"{len(broken)} limits broken"]))
    return 1 if broken else 0


def main(words: list[str] | None = None) -> None:
    with exit_on_error():
        raise SystemExit(run(parse_options(Options, words, "python -m kernels.report")))


if __name__ == "__main__":
    main()
