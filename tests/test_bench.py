"""The bench: what it compares, how it times, its tables and pictures on a CPU, what it says where there is no GPU."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import sys
import textwrap
import types

import pytest
import torch

import kernels
from kernels.bench import __main__ as bench
from kernels.bench import ladder, launches, operations, rivals, training
from kernels.command_line import table
from kernels.gpus import GPUS
from kernels.report import __main__ as report
from kernels.report import roofline
from kernels.report.shapes import PRESETS, Shape, arguments, calls_per_step

TINY_SHAPE = Shape(B=2, T=5, C=32, H=2, L=1, V=50)
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


def run(folder, *words):
    """Run the command in this process and the folder. Return its exit status, what it printed, and its errors."""
    status = 0
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            with contextlib.chdir(folder):
                bench.main([*words])
        except SystemExit as end:
            status = end.code
    return types.SimpleNamespace(returncode=status, stdout=shown.getvalue(), stderr=errors.getvalue())


@NO_GPU
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu", "--preset", "gpt3"], "error: --preset gpt3: use one of laptop"),
        (["--device", "cpu", "--repeats", "0"], "error: --repeats is 0, but must be at least 1"),
        ([], "error: no GPU to time: python -m kernels.report needs none"),
        (["--device", "abacus"], "error: --device abacus cannot be used"),
        (["--device", "cpu", "--dtype", "int8"], "error: --dtype int8: use auto, float32 or bfloat16"),
        (["--nonsense"], "error: Unrecognized options: --nonsense (--help shows every option)"),
        (["--repeats", "many"], "error: Error parsing --repeats: invalid literal for int() with base 10: 'many'"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(words)
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and shown.startswith(message) and shown.count("\n") == 1


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    sizes = ["--shape", "B=2", "T=16", "C=32", "H=2", "V=60"]
    files = ["--json", "bench.json", "--plot", "bench.png"]
    return folder, run(folder, "--device", "cpu", "--repeats", "2", *sizes, *files)


@NO_GPU
def test_a_cpu_times_pytorch_and_the_rivals_that_run_there_and_interprets_triton_marked_as_no_speed(timed):
    folder, done = timed
    assert done.returncode == 0, done.stderr
    rows = json.loads((folder / "bench.json").read_text(encoding="utf-8"))["rows"]
    assert [row["operation"] for row in rows if row["version"] == "torch"] == list(calls_per_step(PRESETS["laptop"]))
    others = {row["version"]: row["operation"] for row in rows if row["version"] != "torch"}
    assert others.pop("SDPA flash") == "causal_attention" and others.pop("chunked") == "linear_cross_entropy"
    assert len(rows) == 14 and list(others) == ["triton, interpreted, tiny: not a speed"]
    assert all(row["both_ms"] >= max(row["forward_ms"], row["backward_ms"]) > 0 for row in rows)
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")


class Hardware:
    """A GPU that runs what is queued, and a CPU that queues it, in seconds of a clock of their own."""

    def __init__(self, monkeypatch, launch, work):
        self.now = self.free = 0.0  # what the CPU's clock says; when the GPU has done all that is queued
        self.launch, self.work, hardware = launch, work, self

        class Event:
            def __init__(self, enable_timing):
                self.at = None

            def record(self):
                self.at = hardware.free = max(hardware.free, hardware.now)

            def query(self):
                return self.at <= hardware.now

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: setattr(self, "now", max(self.now, self.free)))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.queue(cycles / 2e9))
        monkeypatch.setattr(operations.time, "perf_counter", lambda: self.now)

    def queue(self, seconds):
        self.free = max(self.free, self.now) + seconds

    def phases(self, repeat):
        slow = 20 if repeat < 0 else 1  # the first runs compile
        for phase in range(2):
            yield
            for _ in range(10):  # kernels
                self.now += slow * self.launch
                self.queue((1 + phase) * self.work)
        yield


@pytest.mark.parametrize(("launch", "work"), [(50e-6, 2e-6), (2e-6, 50e-6)], ids=["launches", "kernels"])
def test_the_time_on_a_gpu_is_that_of_its_kernels_and_the_time_of_launching_them_stands_beside_it(
    launch, work, monkeypatch
):
    times = operations.time_phases(Hardware(monkeypatch, launch, work).phases, torch.device("cuda"), repeats=5)
    expected = {"forward_ms": 1e4 * work, "backward_ms": 2e4 * work, "both_ms": 3e4 * work, "launch_ms": 2e4 * launch}
    assert times == pytest.approx(expected | {"queued": 1.0})
    said = operations.doubts([{"operation": "gelu", "version": "torch", **times}])
    expected = "gelu, torch: Python takes 1.000 ms to launch 0.060 ms of work, so a GPU that runs it waits"
    assert said == ([expected] if launch > work else [])


def test_a_launch_that_no_sleep_outlasts_is_reported_as_python_s_time(monkeypatch):
    times = operations.time_phases(Hardware(monkeypatch, 20e-3, 1e-6).phases, torch.device("cuda"), repeats=5)
    assert times["queued"] == 0.0 and times["both_ms"] > 100
    assert (
        "only 0% of the runs were queued in time" in operations.doubts([{"operation": "a", "version": "b"} | times])[-1]
    )


def test_the_time_is_the_median_and_the_first_runs_do_not_count(monkeypatch):
    """A clock by which forward took 1000 ms thrice, then 1, 2 and 30 ms, and backward twice as long."""
    clock, seconds = [0.0], [1.0] * 3 + [0.001, 0.002, 0.030]

    def phases(repeat):
        yield
        clock[0] += seconds[repeat + 3]
        yield
        clock[0] += 2 * seconds[repeat + 3]
        yield

    monkeypatch.setattr(operations.time, "perf_counter", lambda: clock[0])
    times = operations.time_phases(phases, torch.device("cpu"), repeats=3)
    assert times == pytest.approx({"forward_ms": 2.0, "backward_ms": 4.0, "both_ms": 6.0})


def test_compiled_pytorch_is_compared_when_asked_for():
    assert list(rivals.versions("layer_norm", compiled=False, on_gpu=False)) == ["torch"]
    assert list(rivals.versions("layer_norm", compiled=True, on_gpu=False)) == ["torch", "torch.compile"]


@NO_GPU
@pytest.mark.parametrize("version", ["SDPA flash", "SDPA cuDNN", "SDPA efficient", "chunked"])
def test_a_rival_of_pytorch_computes_the_same_or_says_that_it_cannot_run(version):
    operation = "linear_cross_entropy" if version == "chunked" else "causal_attention"
    rival = rivals.versions(operation, compiled=False, on_gpu=True)[version]
    given, _ = arguments(operation, TINY_SHAPE, torch.float32, "cpu")
    if version in ("SDPA cuDNN", "SDPA efficient"):
        with pytest.raises(RuntimeError, match="No viable backend"):
            rival(*given)
        return
    leaves = [a for a in given if isinstance(a, torch.Tensor) and a.requires_grad]
    stock = getattr(kernels.select("none"), operation)
    ours, theirs = ((result := f(*given), *torch.autograd.grad(result.sum(), leaves)) for f in (stock, rival))
    torch.testing.assert_close(theirs, ours)


OTHER_PACKAGES = {  # with the signatures of liger-kernel 0.8 and flash-attn 2.8, and PyTorch inside
    "flash_attn/__init__.py": """
        import torch.nn.functional as F

        def flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=causal, scale=softmax_scale)
            return y.transpose(1, 2)
        """,
    "liger_kernel/ops/layer_norm.py": """
        import torch.nn.functional as F

        class LigerLayerNormFunction:
            @staticmethod
            def apply(X, W, B, eps):
                return F.layer_norm(X, W.shape, W, B, eps)
        """,
    "liger_kernel/ops/fused_linear_cross_entropy.py": """
        import torch.nn.functional as F

        class LigerFusedLinearCrossEntropyFunction:
            @staticmethod
            def apply(_input, weight, target, bias=None, ce_weight=None, ignore_index=-100):
                return F.cross_entropy(_input @ weight.T, target, ignore_index=ignore_index), None, None, None
        """,
}


@pytest.fixture
def other_packages(tmp_path, monkeypatch):
    for name, code in OTHER_PACKAGES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(code), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in ("flash_attn", "liger_kernel")]:
        del sys.modules[name]


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) for name in ("flash_attn", "liger_kernel")), reason="the real ones are here"
)
def test_liger_and_flash_attention_are_called_as_they_expect_and_compute_the_same(other_packages):
    compared = {}
    for operation in calls_per_step(TINY_SHAPE):
        found = rivals.versions(operation, compiled=False, on_gpu=True)
        given, _ = arguments(operation, TINY_SHAPE, torch.float32, "cpu")
        for name in found.keys() & {"liger", "flash-attn"}:
            compared[operation] = name
            torch.testing.assert_close(found[name](*given), found["torch"](*given))
    attention = {"causal_attention": "flash-attn"}
    assert compared == attention | dict.fromkeys(["layer_norm", "add_layer_norm", "linear_cross_entropy"], "liger")


def test_a_package_that_cannot_be_imported_is_left_out_with_a_word(other_packages, capsys):
    (other_packages / "flash_attn/__init__.py").write_text("raise ImportError('undefined symbol')", encoding="utf-8")
    assert "flash-attn" not in rivals.versions("causal_attention", compiled=False, on_gpu=True)
    shown = capsys.readouterr().err
    assert shown == "flash_attn cannot be imported and is left out: ImportError: undefined symbol\n"


def test_the_share_of_the_roofline_counts_the_matrix_products_inside_an_operation():
    shape, gpu = PRESETS["gpt2-124m"], GPUS["A100"]
    kernel = {"operation": "linear_gelu", "unique_bytes": 1e9, "flops": 0, "arithmetic": 0}
    least = operations.needed("linear_gelu", shape, [kernel], gpu)
    product = 2 * shape.N * shape.C * 4 * shape.C
    assert least["flops"] == 3 * product
    assert least["least_ms"] == pytest.approx(1e3 * (3 * product / gpu.flops + 1e9 / gpu.bandwidth))
    assert operations.needed("causal_attention", shape, [kernel], gpu) is None


def test_launches_are_counted_and_timed_without_a_gpu():
    work = {"layers": 0, "repeats": 20, "operations": ["linear_gelu"]}
    found = report.child("kernels.emulator.launches", work=work, interpret=False)
    assert found["processor"] and found["linear_gelu"]["triton"] == 2
    # x and the weight to bfloat16, a product; two products, a sum of dbias, casts
    assert 6 <= found["linear_gelu"]["pytorch"] <= 12
    assert 10 < found["linear_gelu"]["forward_us"] < found["linear_gelu"]["both_us"] < 1e5


def test_the_verdict_on_launches_is_the_batch_at_which_the_gpu_takes_as_long_as_python():
    shape, gpu = dataclasses.replace(PRESETS["gpt2-124m"], B=8), GPUS["A100"]
    figures = {"unique_bytes": 1e9, "flops": 0, "arithmetic": 0, "launches": 1}
    counted = [{"operation": name, "calls": calls, **figures} for name, calls in calls_per_step(shape).items() if calls]
    step = roofline.step(counted, shape, gpu, set(kernels.FAMILIES), compiled=False)
    milliseconds = (step["total"] - step["adamw"]) * 2.4 / 8  # as long as 2.4 sequences take
    found = {name: {"both_us": 100.0} for name in calls_per_step(shape)}
    found |= {"micro-step": {"both_us": 1e3 * milliseconds}, "processor": "an abacus"}
    rows, verdict = launches.compare(found, counted, shape, gpu, "A100")
    assert [row["operation"] for row in rows] == [*(each["operation"] for each in counted), "micro-step"]
    assert verdict.startswith("One core of an abacus takes") and verdict.endswith("below 3 sequences.")


def test_every_useful_choice_of_kernels_is_trained_once():
    choices = training.useful_choices(triton=True)
    families = set(kernels.FAMILIES)
    assert choices[:2] == ["all", "none"] and len(set(choices)) == len(choices) == 2 + 2 * len(families)
    chosen = [set(kernels.families(choice)) for choice in choices]
    assert all({family} in chosen and families - {family} in chosen for family in families)
    assert training.useful_choices(triton=False) == ["none"]


def test_training_runs_use_a_small_dataset_of_their_own_and_are_read_from_their_logs_into_one_table(tmp_path):
    files = ["--json", "train.json", "--plot", "train.png"]
    sizes = {"n-layer": 1, "n-head": 2, "n-embd": 16, "block-size": 32, "batch-tokens": 128, "micro-batch": 4}
    sizes |= {"warmup-steps": 1, "eval-tokens": 64, "dtype": "float32"}
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    words = ["--train", "--preset", "gpt2-124m", "--device", "cpu", "--steps", "4", *files, "--", *words]
    done = run(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "train.json").read_text(encoding="utf-8"))["rows"]
    assert (row["kernels"], row["compile"], row["mfu"]) == ("none", False, None)
    assert row["tokens_per_s"] > 0 and 0.1 < row["peak_gb"] < 20
    assert row["last_loss"] == pytest.approx(math.log(50257), abs=0.5)  # GPT-2's vocabulary, as the preset has
    assert "tokens_per_s" in done.stdout and (tmp_path / "train.png").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.json", "train.png"]  # and no datasets


@NO_GPU
def test_the_ladder_is_climbed_rung_by_rung_on_a_cpu(tmp_path):
    sizes = {"n-layer": 1, "n-head": 1, "n-embd": 16, "block-size": 32, "batch-tokens": 64, "micro-batch": 2}
    words = [
        word
        for name, value in (sizes | {"warmup-steps": 1, "eval-tokens": 32}).items()
        for word in (f"--{name}", str(value))
    ]
    words = ["--ladder", "--device", "cpu", "--steps", "3", "--json", "ladder.json", "--", *words]
    done = run(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "ladder.json").read_text(encoding="utf-8"))["rows"]
    assert [row["rung"] for row in rows] == ["float32", "+ flash attention", "+ padded vocabulary"]
    assert [row["times"] for row in rows] == pytest.approx(
        [row["tokens_per_s"] / rows[0]["tokens_per_s"] for row in rows]
    )
    # the same GPT at every rung; a padded vocabulary draws other weights
    assert rows[0]["last_loss"] == pytest.approx(rows[1]["last_loss"], abs=1e-4) != rows[2]["last_loss"]


def test_the_modeled_ladder_speeds_products_up_as_the_data_sheet_says_and_ends_at_the_step_of_the_report():
    shape, gpu = PRESETS["gpt2-124m"], GPUS["A100"]
    figures = {"unique_bytes": 1e9, "flops": 1e11, "arithmetic": 0, "launches": 1}
    counted = [{"operation": name, "calls": calls, **figures} for name, calls in calls_per_step(shape).items()]
    rows = ladder.modeled(shape, gpu, counted)
    assert [row["rung"] for row in rows] == [rung.name for rung in ladder.rungs(on_gpu=True, compiled=True)][:-1]
    assert all(row["over_last"] > 1.1 for row in rows[1:5]) and rows[4]["times"] > 5
    seconds = [shape.N / row["tokens_per_s"] for row in rows]
    products = (
        6 * 2 * shape.N * shape.C * (12 * shape.L * shape.C + shape.W) / 2 + 12 * shape.L * shape.N * shape.T * shape.C
    )
    assert seconds[0] - seconds[1] == pytest.approx(products * (1 / 19.5e12 - 1 / 156e12), rel=0.05)
    last = roofline.step(counted, shape, gpu, set(kernels.FAMILIES), compiled=True)
    assert 1e3 * seconds[-1] == pytest.approx(last["total"]) and rows[-1]["mfu"] == pytest.approx(last["mfu"])


def test_a_training_run_that_stops_is_an_error_with_its_own_words(tmp_path):
    done = run(tmp_path, "--train", "--device", "cpu", "--", "--data", "nowhere")
    assert done.returncode == 2
    said = (
        "error: train_gpt2.py laptop --kernels none --no-compile --data nowhere stopped: there is no dataset in nowhere"
    )
    assert done.stderr.startswith(said)


def test_tables_show_fractions_in_percent_and_big_numbers_whole():
    cells = {("mfu", 0.5): "50.0%", ("ms", 1.25): "1.250", ("tokens", 12345.6): "12,346"}
    assert [bench.format_cell(*cell) for cell in cells] == list(cells.values())
    assert bench.format_cell("mfu", None) == "" and table("t", [{"a": "x", "b": 1}]).splitlines()[-1] == "x  1"
