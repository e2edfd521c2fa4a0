"""The report: what it counts against formulas by hand, what it compiles, its gate, its tables and its command line."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import pytest
import torch
from accuracy import interpreted

import train_gpt2
from kernels import attention
from kernels.common import emulate_gpu
from kernels.gpus import GPUS, SOURCES
from kernels.report import __main__ as report
from kernels.report import machine_code, roofline, traffic
from kernels.report.machine_code import ARCHITECTURES, MULTIPROCESSORS, Multiprocessor
from kernels.report.shapes import PRESETS, Shape, calls_per_step, parse_shape
from model import GPT

ROOT = Path(__file__).parents[1]
SMALL = Shape(B=2, T=48, C=64, H=2, L=2, V=200)  # W = 256


@pytest.fixture(scope="module")
def counted():
    return {kernel["name"]: kernel for kernel in report.count(SMALL, ["sm_80"])["sm_80"]}


@pytest.fixture(scope="module", autouse=True)
def compiled_code_in_a_folder_of_the_tests(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


# ------------------------------------------------------------------------------------------------------------ traffic


def by_hand(s: Shape) -> dict[str, tuple[int, int]]:
    """Bytes loaded and stored by every kernel but attention's, added up from the operation's tensors."""
    N, C, W = s.N, s.C, s.W
    programs = math.ceil(N / 16)  # of a backward that sums over rows
    gelu_columns = {"forward": math.ceil(4 * C / 512), "backward": math.ceil(4 * C / 1024)}
    assert gelu_columns == {"forward": 1, "backward": 1}
    return {
        "layer_norm.forward": (N * C * 4 + N * 2 * C * 4, N * C * 2 + N * 8),  # x, w, b; y, mean and rstd
        "layer_norm.backward": (N * C * (2 + 4) + N * 8 + programs * C * 4, N * C * 4 + programs * 2 * C * 4),
        "add_layer_norm.forward": (N * C * (2 + 4) + N * 2 * C * 4, N * C * (4 + 2) + N * 8),
        "add_layer_norm.backward": (N * C * (2 + 4 + 4) + N * 8 + programs * C * 4, N * C * 6 + programs * 2 * C * 4),
        "linear_gelu.forward": (N * 4 * C * 2 + math.ceil(N / 8) * 4 * C * 4, N * 4 * C * 2),
        "linear_gelu.backward": (N * 4 * C * 4 + programs * 4 * C * 4, N * 4 * C * 2 + programs * 4 * C * 4),
        # logits twice, and once at the target for the loss and once for the gradient; targets are int64
        "linear_cross_entropy.in_place": (N * (2 * W + 2) * 2 + N * 8, N * (W + 1) * 2 + N * 4),
        "cross_entropy.forward": (N * (W + 1) * 2 + N * 8, N * 4 * 3),
        "cross_entropy.backward": (N * (W + 1) * 2 + N * (8 + 4 + 4 + 4), N * (W + 1) * 2),
    }


@pytest.mark.parametrize("name", list(by_hand(SMALL)))
def test_counted_bytes_are_those_of_a_formula_by_hand(counted, name):
    assert (counted[name]["loaded"], counted[name]["stored"]) == by_hand(SMALL)[name]


def test_the_minimum_is_each_input_once_and_each_output_once_without_partial_sums(counted):
    N, C, W = SMALL.N, SMALL.C, SMALL.W
    assert counted["add_layer_norm.forward"]["compulsory_bytes"] == N * C * 12 + 2 * C * 4 + N * 8
    backward, sums = counted["add_layer_norm.backward"], math.ceil(N / 16) * 2 * C * 4
    assert backward["compulsory_bytes"] == backward["unique_bytes"] - sums == N * C * 16 + C * 4 + N * 8
    assert counted["linear_gelu.backward"]["compulsory_bytes"] == N * 4 * C * 6 + 4 * C * 4
    assert counted["linear_cross_entropy.in_place"]["compulsory_bytes"] == N * W * 4 + N * 8 + N * 4


def test_attention_reads_qkv_writes_y_and_multiplies_the_lower_triangle_of_blocks(counted):
    forward = counted["causal_attention.forward"]
    heads, T, D, N, C = SMALL.B * SMALL.H, SMALL.T, SMALL.C // SMALL.H, SMALL.N, SMALL.C
    assert forward["compulsory_bytes"] == N * 3 * C * 2 + N * C * 2 + heads * T * 4  # qkv, y, and lse in float32
    assert forward["stored"] == N * C * 2 + heads * T * 4
    dots = {name: kernel["flops"] for name, kernel in counted.items() if name.startswith("causal_attention")}
    assert dots["causal_attention.forward"] >= 2 * heads * T * T * D  # two products, half of them causal
    assert sum(dots.values()) >= 7 * heads * T * T * D


def test_calls_and_launches_are_those_of_a_training_step(counted):
    assert counted["add_layer_norm.forward"]["calls"] == 2 * SMALL.L
    assert counted["causal_attention.forward"]["calls"] == SMALL.L
    assert all(kernel["launches"] == 1 and kernel["atomics"] == 0 for kernel in counted.values())


def attention_by_hand(heads: int, T: int, D: int, forward: int, dq: int, dkdv: int) -> dict[str, tuple[int, int]]:
    """Bytes loaded and stored, in bfloat16; lse and delta in float32. Blocks are of queries, in dkdv of keys."""

    def keys_seen(block):  # by the blocks of queries: all keys up to the last query of each
        return sum(min(start + block, T) for start in range(0, T, block))

    queries_seen = sum(T - start for start in range(0, T, dkdv))  # by the blocks of keys: all from the first key on
    row = 2 * D
    return {
        "_forward_kernel": (heads * row * (T + 2 * keys_seen(forward)), heads * T * (row + 4)),
        "_backward_dq_kernel": (
            heads * (T * (3 * row + 4) + 2 * row * keys_seen(dq)),
            heads * (T * (row + 4) + math.ceil(T / dq) * 2 * D * 4),  # and two sums per block
        ),
        "_backward_dkdv_kernel": (heads * (T * 2 * row + queries_seen * (2 * row + 8)), heads * T * 2 * row),
    }


@interpreted
@pytest.mark.parametrize(
    ("gpu", "T", "blocks"),
    [("sm_80", 256, (128, 128, 128)), ("sm_80", 150, (64, 64, 64)), ("sm_90", 150, (128, 128, 64))],
)
def test_counted_bytes_of_attention_are_those_of_a_formula_by_hand(gpu, T, blocks):
    with emulate_gpu(gpu):
        found = traffic.measure("causal_attention", Shape(B=1, T=T, C=64, H=2, L=1, V=10))
    moved = {kernel: (figures["loaded"], figures["stored"]) for kernel, figures in found.items()}
    assert moved == attention_by_hand(2, T, 32, *blocks)


@interpreted
def test_each_gpu_gets_the_launches_of_its_own_row():
    launched = {}
    for gpu in MULTIPROCESSORS:
        with emulate_gpu(gpu):
            launched[gpu] = traffic.record_launches("causal_attention", PRESETS["gpt2-124m"])
        names = [launch.kernel.strip("_").removesuffix("_kernel") for launch in launched[gpu]]
        assert names == ["forward", "backward_dq", "backward_dkdv"]
        for name, launch in zip(names, launched[gpu], strict=True):
            expected = attention.launch_parameters(name, 1024, 64, torch.bfloat16, gpu)
            assert launch.constants | launch.options == expected | {"H": 12, "D": 64}
    assert launched["sm_90"] != launched["sm_80"] != launched["sm_86"] == launched["sm_89"]


measured = functools.cache(traffic.measure)  # both changes have small shapes in common


@interpreted
@pytest.mark.parametrize("change", [{"B": 1, "T": 58}, {"B": 3, "T": 32}], ids=["58 rows", "96 rows"])
@pytest.mark.parametrize("operation", list(calls_per_step(SMALL)))
def test_the_rule_of_scaling_is_exact_at_other_sizes(operation, change):
    shape = dataclasses.replace(SMALL, **change)
    launches, small = traffic.record_launches(operation, shape), traffic.small_shapes(operation, shape)
    runs = [(traffic.units(operation, each), measured(operation, each)) for each in small]
    predicted = traffic.scaled(operation, shape, launches, runs)
    for kernel, found in measured(operation, shape).items():
        assert [predicted[kernel][name] for name in traffic.FIGURES] == [found[name] for name in traffic.FIGURES]


# ------------------------------------------------------------------------------------------------------- machine code


VOLTA = Multiprocessor(64, 32, 96 * 1024, 96 * 1024, shared_reserved=0)


@pytest.mark.parametrize(
    ("limits", "threads", "registers", "shared_bytes", "programs", "percent"),
    [
        # CUDA C++ Best Practices Guide, "Calculating Occupancy", on compute capability 7.0:
        # https://docs.nvidia.com/cuda/cuda-c-best-practices-guide/index.html#calculating-occupancy
        (VOLTA, 128, 37, 0, 12, 75),
        (VOLTA, 320, 37, 0, 4, 63),
        # CUDA Programming Guide, "Kernel Launch and Occupancy", on 10.0: blocks of one warp, limited by their number
        # https://docs.nvidia.com/cuda/cuda-programming-guide/02-basics/writing-cuda-kernels.html
        (MULTIPROCESSORS["sm_100"], 32, 32, 0, 32, 50),
        # Boehm, "How to Optimize a CUDA Matmul Kernel", 2022, on an A6000 with what ptxas says of its kernel 3
        # https://siboehm.com/articles/22/CUDA-MMM
        (MULTIPROCESSORS["sm_86"], 1024, 37, 8192, 1, 67),
        (MULTIPROCESSORS["sm_80"], 128, 64, 163 * 1024, 1, 6),  # by shared memory
        (MULTIPROCESSORS["sm_80"], 128, 64, 48 * 1024, 3, 19),  # 49 with what is reserved
        (MULTIPROCESSORS["sm_80"], 32, 16, 0, 32, 50),  # by the number of programs
        (MULTIPROCESSORS["sm_80"], 128, 255, 0, 2, 13),  # by registers
    ],
)
def test_occupancy_is_that_of_published_cases_and_of_each_limit(
    limits, threads, registers, shared_bytes, programs, percent
):
    fit = machine_code.programs_that_fit(limits, threads // 32, registers, shared_bytes)
    assert fit == programs and math.floor(100 * fit * threads / 32 / limits.warps + 0.5) == percent


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("LDG.E.128", (128, False)),
        ("STG.E.U16", (16, True)),
        ("LDG.E.EF.64.CONSTANT", (64, False)),
        ("LDGSTS.E.BYPASS.128", (128, False)),
        ("STG.E", (32, True)),
        ("global_load_dwordx4", (128, False)),
        ("buffer_store_short", (16, True)),
        ("LDS.128", None),
    ],
)
def test_the_width_of_an_access_is_read_from_its_opcode(opcode, expected):
    assert machine_code.width_of_access(opcode) == expected


PLANTED = '''
import triton
import triton.language as tl


@triton.jit
def spilling(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """A block so large that a warp cannot hold it."""
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols).to(tl.float32)
    total = tl.sum(x, axis=0)
    tl.store(y_ptr + cols, x * tl.math.exp2(x - total))


@triton.jit
def scalar_stores(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """A stride of two between the numbers stored."""
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols)
    tl.store(y_ptr + cols * 2, x)


@triton.jit
def serialized(x_ptr, y_ptr, T, BLOCK: tl.constexpr):
    """A sum of matrix products that goes on after a loop which may not have run."""
    tile = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x, y = tl.load(x_ptr + tile), tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for _ in range(T):
        y = tl.dot(x, tl.trans(tl.load(x_ptr + tile)), y)
        x_ptr += BLOCK * BLOCK
    for _ in range(2):
        y = tl.dot(x, tl.trans(tl.load(x_ptr + tile)), y)
        x_ptr += BLOCK * BLOCK
    tl.store(y_ptr + tile, y)


@triton.jit
def adding(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """A sum that depends on who comes first."""
    cols = tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr + cols, tl.load(x_ptr + cols))
'''


def plant(name: str, dtype: str, sizes: dict[str, int], elements: int, warps: int) -> dict:
    """A kernel of PLANTED as the report sees it, counted by hand."""
    lines = PLANTED.splitlines()
    start = next(number for number, line in enumerate(lines, start=1) if f"def {name}" in line)
    launch = {"module": "planted", "kernel": name, "options": {"num_warps": warps, "num_stages": 2}}
    launch |= {"arguments": {"x_ptr": [dtype, True], "y_ptr": ["*fp32", True], "T": 1000}, "constants": sizes}
    moved = 4 * elements
    counted = {"loaded": moved, "stored": moved, "unique_bytes": 2 * moved, "compulsory_bytes": 2 * moved, "atomics": 0}
    sites = {number: moved for number in range(start, start + 8)}
    return {"name": name, "launch": launch, "sites": sites, "flops": int(name == "serialized")} | counted


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Four kernels, each with one thing wrong, compiled for an A100, the last for an H100."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.py").write_text(PLANTED, encoding="utf-8")
    simple = [("spilling", 16384), ("scalar_stores", 1024), ("adding", 1024)]
    kernels = {"sm_80": [plant(name, "*fp32", {"BLOCK": block}, block, warps=1) for name, block in simple]}
    kernels |= {"sm_90": [plant("serialized", "*bf16", {"BLOCK": 64}, 64 * 64, warps=4)]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        return kernels, report.compile_all(kernels)


def test_the_gate_catches_a_planted_regression_and_names_kernel_target_and_figure(planted):
    broken = report.broken_limits(*planted, {})
    planted_by = {"spills": "spilling", "stack bytes": "spilling", "accesses of 32 bits": "scalar_stores"}
    planted_by |= {"atomics": "adding", "ptxas warns C7515": "serialized", "8 waits for 8 wgmma": "serialized"}
    for words, name in planted_by.items():
        caught = [line.partition(":")[0] for line in broken if words in line]
        assert caught == [f"{name} on {'sm_90' if name == 'serialized' else 'sm_80'}"], words


def test_the_gate_catches_shared_memory_tensor_cores_and_traffic(planted):
    kernels, code = planted
    (_, scalar, _) = kernels["sm_80"]
    least = scalar["compulsory_bytes"]
    kernel = scalar | {"flops": 1, "loaded": 9 * least, "unique_bytes": 2 * least}
    found = {**code["sm_80"][1], "narrowest_bits": 128, "shared_bytes": 164 * 1024}
    broken = report.broken_limits({"sm_80": [kernel]}, {"sm_80": [found]}, {})
    assert len(broken) == 4
    for words in ("bytes issued", "unique bytes", "shared bytes 167936", "no tensor-core instruction"):
        assert any(words in line for line in broken)


EMULATE = """
import json, planted, torch
from kernels.emulator import costs, driver
with driver.emulated("sm_80", counting=True) as launches:
    planted.scalar_stores[(1,)](torch.ones(1024), torch.zeros(2048), BLOCK=1024, num_warps=1)
print(json.dumps(costs.figures(launches)))
"""


def test_the_gate_catches_bank_conflicts_and_sectors(tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text(PLANTED, encoding="utf-8")
    (tmp_path / "emulate.py").write_text(EMULATE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = report.child("emulate", work=[], interpret=False)
    (said,) = report.broken_by_costs("scalar_stores", found)
    assert said.startswith("sectors are 1.500 of the least, the limit is 1.0: planted.py:")
    assert list(report.broken_by_costs("layer_norm.forward", found)) == []  # an exception
    conflict = {"wavefronts": 64, "least_wavefronts": 32, "worst_wavefronts": "a.py:1 ld.shared.b32: 64, least 32"}
    (said,) = report.broken_by_costs("layer_norm.forward", found | conflict)
    assert "bank conflicts, the limit is none: a.py:1 ld.shared.b32: 64, least 32" in said


# ----------------------------------------------------------------------------------------------------------- roofline


def test_the_least_time_is_the_longest_of_the_three_bounds():
    a100 = GPUS["A100"]
    assert roofline.least_seconds(2039e9, 0, a100) == (1.0, "memory")
    assert roofline.least_seconds(2039e9, 624e12, a100) == (2.0, "tensor")
    assert roofline.least_seconds(2039e9, 0, a100, arithmetic=58.5e12) == (3.0, "arithmetic")


def test_every_ceiling_names_its_source_and_every_source_its_page():
    assert {gpu.source.removesuffix("?") for gpu in GPUS.values()} == set(SOURCES)
    assert all("https://" in source for source in SOURCES.values())
    assert {gpu.architecture for gpu in GPUS.values()} == set(ARCHITECTURES)
    assert all(not GPUS[typical].source.endswith("?") for typical in roofline.REPRESENTATIVE_GPU.values())


@pytest.mark.parametrize("preset", ["laptop", "gpt2-124m"])
def test_parameters_and_flops_are_those_of_the_model(preset):
    shape = PRESETS[preset]
    config = dataclasses.replace(train_gpt2.PRESETS[preset][1].shape(shape.V))
    with torch.device("meta"):
        model = GPT(config)
    assert roofline.parameters(shape) == model.parameter_count()
    assert roofline.flops_per_token(shape) == model.flops_per_token()
    assert config.padded_vocab_size == shape.W


def test_the_presets_are_those_of_the_training_script():
    assert list(PRESETS) == [name for name in train_gpt2.PRESETS if not name.endswith("-fast")]
    for name, (_, config) in train_gpt2.PRESETS.items():
        shape = PRESETS[name.removesuffix("-fast")]
        sizes = (config.n_layer, config.n_head, config.n_embd, config.block_size)
        assert sizes == (shape.L, shape.H, shape.C, shape.T)
        assert shape.N in (config.batch_tokens, config.batch_tokens // 8)


def test_a_family_left_out_changes_its_own_part_of_the_step_alone(counted):
    parts = {
        name: roofline.step(list(counted.values()), SMALL, GPUS["H100"], *choice)
        for name, choice in roofline.configurations().items()
    }
    for family in roofline.FAMILIES:
        without = parts[f"all but {family}"]
        assert without[family] == parts["none"][family] != parts["all"][family]
        assert all(without[other] == parts["all"][other] for other in roofline.FAMILIES if other != family)
    assert parts["all"]["total"] < parts["none, eager"]["total"] > parts["none"]["total"]


def test_compiled_pytorch_moves_the_bytes_that_inductor_s_code_for_gpt2_124m_does():
    """Figures of 'kernel_num_gb' in what inductor of PyTorch 2.13 generates for an A100, in GB."""
    generated = {
        "add_layer_norm": [0.607393792, 0.704908288, 0.301989888],
        "linear_gelu": [0.805306368, 1.207959552, 0.4030464],
        "linear_cross_entropy": [6.588071936, 13.188202504],
    }
    for operation, expected in generated.items():
        found = [moved / 1e9 for moved, _ in roofline.torch_passes(operation, PRESETS["gpt2-124m"], compiled=True)]
        assert found == pytest.approx(expected, rel=0.008), operation
    biases = 12 * (2 * 0.101056512 + 0.3022848)
    other = [roofline.other_bytes(PRESETS["gpt2-124m"], triton) / 1e9 for triton in (set(), {"attention"})]
    assert other[0] == pytest.approx(biases + 0.154533888 + 0.2318 + 1.2, rel=0.01)
    assert other[0] - other[1] == pytest.approx(12 * 0.3022848, rel=0.01)  # c_attn's bias


def test_the_verdict_names_the_families_that_save_little():
    theirs = dict.fromkeys(roofline.FAMILIES, 10.0) | {"total": 200.0}
    ours = theirs | {"gelu": 9.0, "attention": 12.0, "cross_entropy": 2.0, "total": 193.0}
    said = roofline.verdict({"all": ours, "none": theirs})
    little = "layernorm (+0.0%), gelu (+0.5%), attention (-1.0%)"
    assert said == f"All kernels save 3.5% of a step of compiled PyTorch. Under 1%: {little}."


# ------------------------------------------------------------------------------------------------------- command line


def test_the_command_passes_the_gate_at_gpt2_124m_prints_tables_and_writes_figures_and_a_picture(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        report.main(["--arch", "sm_80", "--check", "--json", "report.json", "--plot", "roofline.png"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and shown.endswith("0 limits broken\n"), shown
    assert max(map(len, shown.splitlines())) <= 120
    for words in (
        "sm_80: compiled",
        "launched on sm_80: counted",
        "counted, emulated",
        "model, from counted traffic",
        "in Triton: model",
    ):
        assert words in shown
    everything = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert set(everything) == {"shape", "counted", "compiled", "emulated", "model"}
    assert {kernel["operation"] for kernel in everything["counted"]["sm_80"]} == set(calls_per_step(SMALL))
    assert len(everything["compiled"]["sm_80"]) == len(everything["counted"]["sm_80"])
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "gpt3"], "error: --preset gpt3: use one of laptop"),
        (["--shape", "T=none"], "error: --shape T=none: use a letter"),
        (["--arch", "sm_70"], "error: --arch sm_70: use some of sm_80"),
        (["--nonsense"], "error: Unrecognized options: --nonsense (--help"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        report.main(words)
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and shown.startswith(message) and shown.count("\n") == 1


def test_a_child_that_dies_without_a_word_is_an_error_with_its_exit_status(tmp_path, monkeypatch):
    (tmp_path / "dies.py").write_text("import os; os._exit(7)", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ValueError, match="-m dies failed: exit status 7, no message"):
        report.child("dies", work=[], interpret=False)


def test_sizes_change_one_by_one():
    assert parse_shape("gpt2-124m", ["T=2048", "B=8"]) == dataclasses.replace(PRESETS["gpt2-124m"], T=2048, B=8)
    with pytest.raises(ValueError, match="C=100 is not divisible by H=12"):
        parse_shape("gpt2-124m", ["C=100"])
