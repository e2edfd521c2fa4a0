"""
What only a GPU executes, on one that is not there: see fake_cuda.py.

No tensor of the CPU meets one of the GPU, Python waits for the GPU only where it must, and compiled graphs hold what
is named here and nothing else.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hellaswag_questions import write_questions

TESTS = Path(__file__).parent
UNABLE = sys.platform != "linux" or torch.version.cuda or torch.version.hip or not shutil.which("g++")
pytestmark = pytest.mark.skipif(bool(UNABLE), reason="needs Linux, PyTorch for CPUs, and a C++ compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The GPU that is not there, compiled."""
    folder = Path(importlib.util.find_spec("torch").origin).parent
    library = tmp_path_factory.mktemp("fake_cuda") / "fake_cuda.so"
    includes = [f"-I{folder / 'include'}", f"-I{folder / 'include/torch/csrc/api/include'}"]
    links = [f"-L{folder / 'lib'}", f"-Wl,-rpath,{folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    command = ["g++", "-shared", "-fPIC", "-std=c++20", *includes, TESTS / "fake_cuda.cpp", "-o", library, *links]
    subprocess.run(command, check=True)
    return library


@pytest.fixture(scope="module")
def on_gpu(library):
    """A function: run code in a process that has this GPU, and return what it prints as JSON in its last line."""

    def run(code: str, *arguments):
        paths = os.pathsep.join([str(TESTS), os.environ["PYTHONPATH"]])
        environment = os.environ | {"FAKE_CUDA": str(library), "PYTHONPATH": paths}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-c", f"import fake_cuda, json, sys\n{code}", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=290)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_tests_that_train_in_their_own_process_also_pass_on_a_machine_with_a_gpu(library):
    """Some of them; with FAKE_CUDA in the environment, any test does."""
    files = [TESTS / f"test_{name}.py" for name in ("diagnostics", "train_gpt2")]
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-k", "bad_initialization or character_preset", *files]
    environment = {name: text for name, text in os.environ.items() if name not in ("PYTEST_XDIST_WORKER", "PYTHONPATH")}
    environment |= {"FAKE_CUDA": str(library)}
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr


RUN = """
import torch, sample, train_gpt2
from pathlib import Path
from kernels import select
from kernels.bench import operations
from kernels.report.shapes import calls_per_step
from training.run import read_log
tiny = "laptop --n-layer 1 --n-embd 32 --n-head 2 --block-size 32 --batch-tokens 256 --eval-tokens 64"
logs = {}
for kernels in ("none", "all"):
    paths = ["--data", sys.argv[1], "--hellaswag-input", sys.argv[2], "--out-dir", f"{sys.argv[3]}/{kernels}"]
    paths += ["--sample-tokens", "40"]
    for options in ("--hellaswag-every 1 --no-compile --max-steps 1", "--hellaswag-every 0 --compile --max-steps 2"):
        try:
            train_gpt2.main([*tiny.split(), *options.split(), "--kernels", kernels, "--micro-batch", "auto", *paths])
        except SystemExit as end:
            assert end.code == 0
    logs[kernels] = read_log(Path(sys.argv[3], kernels))
    sample.main([f"{sys.argv[3]}/{kernels}", "--kernels", kernels, "--max-new-tokens", "40", "--top-k", "9"])
gpu = torch.device("cuda", 0)
for operation in calls_per_step(operations.TINY):
    for function in (getattr(select(names, gpu), operation) for names in ("none", "all")):
        found = operations.time_operation(function, operation, operations.TINY, gpu, torch.bfloat16, repeats=1)
        assert found["both_ms"] == 1 and found["queued"] == 1
print()
print(json.dumps(logs))
"""


def test_runs_that_resume_samples_and_the_bench_touch_no_tensor_of_the_cpu(on_gpu, dataset, tmp_path):
    logs = on_gpu(RUN, dataset, write_questions(tmp_path / "questions.jsonl"), tmp_path / "runs")
    for log in logs.values():
        assert [record["step"] for record in log] == [1, 2] and 0 <= log[0]["hellaswag_acc"] <= 1
    assert 4 < logs["none"][1]["val_loss"] < logs["none"][0]["val_loss"]


WAITS = """
import dataclasses, torch, train_gpt2
from collections import Counter
from pathlib import Path
from model import sample_text
from torch.testing._internal.distributed.fake_pg import FakeStore
from training import distributed, hellaswag, setup
from training.diagnostics.measure import Diagnostics
from training.distributed import Distributed
numbers = torch.ones(3, device="cuda")
for mistake in (lambda: numbers + torch.ones(3), lambda: torch.multinomial(numbers, 1, generator=torch.Generator())):
    try:
        mistake()
    except RuntimeError as error:
        assert "cpu" in str(error)
    else:
        raise AssertionError("CUDA would refuse this")
tiny = "laptop --n-layer 2 --n-embd 32 --n-head 2 --block-size 128 --batch-tokens 256 --micro-batch 1 --eval-tokens 256"
config = train_gpt2.parse([*tiny.split(), "--data", sys.argv[1]])
data, dist, found = setup.open_data(config, Distributed()), Distributed(), {}
questions = hellaswag.questions_for(sys.argv[2], data.tokenizer, 128)
for kernels in ("none", "all"):
    trainer = train_gpt2.make_trainer(dataclasses.replace(config, kernels=kernels), data, dist)
    watch = Diagnostics(trainer.raw_model, trainer.optimizers, trainer.autocast)
    fake_cuda.waits(), fake_cuda.launches.clear()
    waits = {}
    batch = data.loader.batch(0)
    waits["batch"] = fake_cuda.waits()
    train_gpt2.train_step(trainer, *batch, 1)
    waits["step"], launches = fake_cuda.waits(), list(fake_cuda.launches)
    train_gpt2.validate(trainer, data.val_split)
    waits["validate"] = fake_cuda.waits()
    hellaswag.scores(trainer.raw_model, questions, trainer.device, dist, trainer.autocast)
    waits["hellaswag"] = fake_cuda.waits()
    sample_text(trainer.raw_model, data.tokenizer, 50, seed=1)
    waits["sample"] = fake_cuda.waits()
    with torch.no_grad(), trainer.autocast():
        for length in range(1, 129, 3):  # HellaSwag's questions have all lengths
            trainer.raw_model(batch[0][:, :length])
    evaluated = sorted(set(fake_cuda.launches[len(launches) :]))
    fake_cuda.waits()
    emptied = []  # the queue, before the clock is read
    torch.cuda.synchronize = emptied.append
    with watch.watching(*batch):
        [optimizer.step() for optimizer in trainer.optimizers]
    waits["diagnose"] = fake_cuda.waits() + ["clock"] * len(emptied)
    found[kernels] = {"waits": waits, "launches": launches, "evaluated": evaluated}

def train(steps):
    "Rank 0 of two, in a group that sends nothing: what it waited for."
    words = f"--max-steps {steps} --warmup-steps 1 --eval-every 0 --sample-tokens 0 --out-dir {sys.argv[3]}/{steps}"
    config = train_gpt2.parse([*tiny.split(), *words.split(), "--data", sys.argv[1]])
    assert train_gpt2.train(config, Distributed(world_size=2)) == 0
    return Counter(fake_cuda.waits())

torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
torch.distributed.get_backend = lambda: "nccl"
distributed.DistributedDataParallel = lambda model, **_: model  # its C++ waits for what this group never sends
fake_cuda.waits()
found = {"alone": found, "step of two ranks": train(4) - train(3)}
print(json.dumps(found))
"""


def test_python_waits_for_the_gpu_only_where_it_reads_a_result_or_brings_new_tokens(on_gpu, dataset, tmp_path):
    found = on_gpu(WAITS, dataset, write_questions(tmp_path / "questions.jsonl"), tmp_path / "runs")
    to_gpu, from_gpu, item = "copy to the GPU", "copy from the GPU", "item"
    assert found["step of two ranks"] == {from_gpu: 1}  # of the training loop, with what ranks agree upon
    found = found["alone"]
    for each in found.values():
        waits = {name: Counter(waits) for name, waits in each["waits"].items()}
        diagnosed = waits.pop("diagnose")
        assert diagnosed.keys() == {from_gpu, "clock", "aten::nonzero"}
        assert diagnosed["clock"] == 4 + 2 * 4  # two optimizers
        assert waits == {
            "batch": {},  # from pinned memory
            "step": {from_gpu: 1},  # its loss, gradient norm, and whether to stop
            "validate": {to_gpu: 2 * 2 + 1, item: 2, from_gpu: 1},  # two batches, and their sum
            "hellaswag": {to_gpu: 3 * 4 + 1, from_gpu: 3 + 1},  # three batches, and the counts
            "sample": {to_gpu: 1, from_gpu: 1},  # whatever the number of tokens
        }
    assert not found["none"]["launches"]
    calls = 2 * 2  # layers times micro-steps
    assert Counter(name for name, _ in found["all"]["launches"]) == {
        "layernorm._forward_kernel": 2 * calls + 2,
        "layernorm._backward_kernel": 2 * calls + 2,
        "attention._forward_kernel": calls,
        "attention._backward_dq_kernel": calls,
        "attention._backward_dkdv_kernel": calls,
        "gelu._forward_kernel": calls,
        "gelu._backward_kernel": calls,
        "cross_entropy._in_place_kernel": 2,
    }
    compiled = Counter(name for name, _ in found["all"]["evaluated"])
    assert max(compiled.values()) <= 4, "Triton compiles again for other lengths"  # two dtypes, a few tiles


GRAPHS = r"""
import re, torch, triton, types
import kernels, model as gpt
from kernels.emulator.driver import Driver
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config as inductor
from torch._inductor.compile_fx import compile_fx
from torch._inductor.graph import GraphLowering
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

def compiled(model):
    "The model, compiled but for the code, and a list in which its graphs will be."
    graphs = []
    keep = lambda graph, inputs, **_: graphs.append(graph) or make_boxed_func(graph.forward)
    backend = lambda graph, inputs: compile_fx(graph, inputs, inner_compile=keep)
    return fake_cuda._compile(model, backend=backend, fullgraph=True), graphs

def passes(graphs, size):
    "The operators that read or write a tensor of at least `size` elements, and make more than a view of it."
    found = []
    for node in (node for graph in graphs for node in graph.graph.nodes if node.op == "call_function"):
        tensors = tree_leaves([getattr(n, "meta", {}).get("val") for n in (node, *node.all_input_nodes)])
        view = getattr(node.target, "is_view", True) or node.target is torch.ops.aten.reshape.default
        if not view and any(isinstance(t, torch.Tensor) and t.numel() >= size for t in tensors):
            found.append(str(node.target))
    return found

B, T = 64, 1024
config = gpt.GPTConfig(n_layer=int(sys.argv[1]))
with FakeTensorMode(), torch.device("cuda"):
    model, graphs = compiled(gpt.GPT(config, kernels.select("all", "cuda")))
    tokens = torch.zeros(B, T, dtype=torch.int64)
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(tokens, tokens)
    loss.backward()
found = {"large": passes(graphs, B * T * config.n_embd), "atomic": []}

def keep(graph):
    "Generate the code of a graph. What stands in for the module returns empty tensors of the right shapes."
    code = re.sub("#.*", "", graph.codegen()[0].value)
    found["atomic"][-1] += re.findall(r"atomic_\w+(?=\()|index_put\w*|scatter_(?:add|reduce)\w*|index_add\w*", code)
    outputs = [getattr(each, "meta", {}).get("val") for each in graph.orig_gm.graph.output_node().args[0]]
    made = lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    call = lambda _: [made(each) if isinstance(each, torch.Tensor) else each for each in outputs]
    return types.SimpleNamespace(call=call, __file__="")

GraphLowering.compile_to_module, inductor.compile_threads, inductor.force_disable_caches = keep, 1, True
triton.runtime.driver.set_active(Driver("sm_80", None, False, {}))
ours, pytorch_s = gpt.embedding, lambda weight, tokens: torch.nn.functional.embedding(tokens, weight)
for names, n_layer, gpt.embedding in ("none", 1, ours), ("all", 1, ours), ("all", 0, pytorch_s):
    torch._dynamo.reset()
    found["atomic"].append([])
    with FakeTensorMode(), torch.device("cuda"), torch.autocast("cuda", torch.bfloat16):
        model = gpt.GPT(gpt.GPTConfig(n_layer), kernels.select(names, "cuda"))
        tokens = torch.zeros(4, 1024, dtype=torch.int64)
        fake_cuda._compile(model, fullgraph=True)(tokens, tokens).backward()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def graphs(on_gpu) -> dict:
    """The operators of a compiled step on large tensors; the atomic additions in the code of three choices."""
    return on_gpu(GRAPHS, 2)


def test_a_compiled_step_reads_and_writes_activations_in_our_operators_in_products_and_in_few_named_passes(graphs):
    L, found = 2, Counter(name.removesuffix(".default") for name in graphs["large"])
    products = {"aten.addmm": 3 * L, "aten.mm": L + 8 * L}  # with a bias; c_fc, and two gradients of each
    ours = {"gpt2.embedding": 1, "gpt2.embedding_backward": 1, "gpt2.linear_cross_entropy": 1}
    ours |= dict.fromkeys(("gpt2.layer_norm", "gpt2.layer_norm_backward"), 2 * L + 1)
    for name in ("causal_attention", "bias_gelu"):
        ours |= dict.fromkeys((f"gpt2.{name}", f"gpt2.{name}_backward"), L)
    assert found - Counter(products | ours) == {
        "aten.add.Tensor": 2,  # of the positions; in the backward, of both gradients of the first block's stream
        "aten.mul.Tensor": 1,  # dx of the cross-entropy times dloss / n, and its cast
        "prims.convert_element_type": 1,
        "aten.sum.dim_IntList": 2 * L + 1,  # gradients of the biases of both c_proj, and of wpe
    }


def test_no_code_that_is_generated_for_a_step_adds_by_atomics(graphs):
    """Which of two additions to one place comes first would be chance, and so would be the last bits."""
    none, every, every_but_our_embedding = graphs["atomic"]
    assert none == every == [] and "atomic_add" in every_but_our_embedding


PEAKS = """
import contextlib, dataclasses, gc, torch, weakref
import torch.distributed.tensor, torch._dynamo  # which cannot be imported within FakeTensorMode
import kernels, model as gpt, train_gpt2
from torch._library.custom_ops import OPDEFS
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from training import devices
from training.distributed import Distributed
from training.optimizer import make_optimizers
from training.plan import Plan

class Memory(TorchDispatchMode):
    "Count the bytes of storages on the GPU, also of those that our operators make within."
    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, WeakIdKeyDictionary()

    def add(self, bytes):
        self.now += bytes
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        within = OPDEFS[operator._schema.name]._init_fn if operator.namespace == "gpt2" else operator
        with self if operator.namespace == "gpt2" else contextlib.nullcontext():
            made = within(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) and tensor.is_cuda else None
            if storage is not None and storage not in self.known:
                self.known[storage] = True
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return made

fake_cuda.JITFunction.run = lambda *_, **__: None  # fake tensors have no addresses to specialize for
FakeTensor.tolist = lambda tensor: [1.0] * tensor.numel()
found = []
Distributed.all_reduce_max = lambda dist, number: number  # no other rank is there
for preset, n_layer, names, micro_batch, micro_steps, ranks in json.loads(sys.argv[1]):
    options = dict(n_layer=n_layer, kernels=names, batch_tokens=ranks * micro_batch * micro_steps * 1024)
    options |= dict(micro_batch="auto", parallel="zero1" if ranks > 1 else "ddp")
    config = dataclasses.replace(train_gpt2.PRESETS[preset][1], **options)
    with FakeTensorMode(), Memory() as memory, torch.device("cuda"):
        model = gpt.GPT(config.shape(50257), kernels.select(names, "cuda"))
        trainer = train_gpt2.Trainer(config, model, model, [], torch.device("cuda", 0), torch.bfloat16, micro_batch)
        devices.largest_that_fits = lambda sizes, attempt: attempt(micro_batch) or micro_batch
        plan, dist = Plan(config, 50257, ranks), Distributed(world_size=ranks, mode=config.parallel)
        assert devices.choose_micro_batch(config, model, dist, plan, trainer.autocast, None) == micro_batch
        probed = memory.peak - int(devices.MARGIN * fake_cuda.PROPERTIES.total_memory)
        gc.collect()
        trainer.optimizers = make_optimizers(model, config, Distributed(), torch.bfloat16)
        tokens = torch.zeros(micro_batch * micro_steps, 1024, dtype=torch.int64)
        for step in (1, 2) if ranks == 1 else ():  # the state comes with the first
            memory.peak = memory.now
            train_gpt2.train_step(trainer, tokens, tokens, step)
    found.append([probed, memory.peak if ranks == 1 else probed, plan.memory(micro_batch)])
    model = trainer = None
print(json.dumps(found))
"""
CASES = [  # preset, layers instead of its own, kernels, sequences in a micro-step, micro-steps, ranks under zero1
    ("gpt2-124m", 4, "all", 64, 1, 1),
    ("gpt2-124m", 4, "all", 64, 2, 1),
    ("gpt2-124m", 4, "attention", 16, 2, 1),
    ("gpt2-1558m", 4, "all", 4, 1, 1),
    ("gpt2-1558m", 4, "all", 1, 1, 1),  # the peak is at the end of the backward
    ("gpt2-1558m", 4, "all", 4, 2, 1),
    ("gpt2-1558m", 4, "all", 4, 2, 8),
    ("gpt2-1558m-fast", 4, "all", 1, 2, 1),  # in Muon's update
]


def test_the_search_for_a_micro_batch_and_the_plan_know_the_peak_of_a_step(on_gpu):
    for case, (probed, step, planned) in zip(CASES, on_gpu(PEAKS, json.dumps(CASES)), strict=True):
        assert probed == pytest.approx(step, rel=0.001), case
        assert sum(planned.values()) == pytest.approx(step, rel=0.03), case
