"""
Hermetic tests: none reads or writes the checkout, the user's files or those of another test.

Every test runs in an empty folder of its own, with HOME, TMPDIR and the other caches beside it. Processes that tests
start inherit all that, and find our modules by PYTHONPATH. Only what is slow to make is made once per session:
Triton's and Inductor's compiled code and matplotlib's list of fonts.

One thread, so that a busy machine slows the tests little; Triton's interpreter if there is no GPU.
"""

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORKER = "PYTEST_XDIST_WORKER" in os.environ  # which inherits the environment of the process that started it
if not WORKER:  # before any library is imported: they read these once
    SHARED = tempfile.mkdtemp(prefix="gpt2-tests-")
    CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR", "HF_HOME", "XDG_CACHE_HOME")
    os.environ |= {name: str(Path(SHARED, name.lower())) for name in CACHES}
    os.environ |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_VEC_ISA_OK": "0"}  # either takes seconds
    if "FAKE_CUDA" in os.environ:  # a GPU that is not there, also in the processes that tests start: see fake_cuda.py
        Path(SHARED, "sitecustomize.py").write_text("import fake_cuda\n", encoding="utf-8")
        os.environ["PYTHONPATH"] += os.pathsep.join(["", SHARED, str(ROOT / "tests")])
    os.environ["OMP_NUM_THREADS"] = "1"  # also in the processes that tests start, so that all give the same bits
sys.dont_write_bytecode = True
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a script's background job; its children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "FAKE_CUDA" in os.environ:
    import fake_cuda  # noqa: E402, F401  before torch

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
LONGEST = ["train_gpt2", "distributed", "report", "cuda_paths", "first_run", "fineweb", "bench", "model_with_kernels"]
LONGEST += ["sweep", "optimizer", "ladder", "faults", "find_lr", "chat"]
EMULATED = os.environ.get("EMULATE")  # an NVIDIA GPU, such as sm_80: kernels are compiled for it and emulated
if not torch.cuda.is_available() and not EMULATED:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it as each kernel is defined


def pytest_unconfigure():
    if not WORKER:
        shutil.rmtree(SHARED, ignore_errors=True)


def pytest_configure(config):
    config.option.loadscopereorder = False  # of xdist: files stay in the order below


def pytest_collection_modifyitems(items):
    """Put the files that take longest first; skip the tests marked `gpu` if no GPU is present or emulated."""
    names = [f"test_{name}" for name in LONGEST]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))
    if not torch.cuda.is_available() and not EMULATED:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def in_an_empty_folder(tmp_path_factory):
    """Stand in a new empty folder; HOME, TMPDIR and the caches of Hugging Face and others are new folders beside it."""
    new = tmp_path_factory.mktemp("t")  # a short name: sockets in TMPDIR have paths of at most 107 bytes
    folders = {name: str(new / name) for name in ("here", "home", "tmp")}
    with pytest.MonkeyPatch.context() as patch:
        for folder in folders.values():
            os.mkdir(folder)
        for name in ("HOME", "USERPROFILE"):  # Windows has the second
            patch.setenv(name, folders["home"])
        for name in ("HF_HOME", "XDG_CACHE_HOME"):
            patch.setenv(name, f"{folders['home']}/{name.lower()}")
        for name in ("TMPDIR", "TEMP", "TMP"):
            patch.setenv(name, folders["tmp"])
        patch.setattr(tempfile, "tempdir", folders["tmp"])
        patch.chdir(folders["here"])
        yield


@pytest.fixture(scope="session", autouse=True)
def session_folder(tmp_path_factory):
    """Give the fixtures that serve several tests an empty folder to run in."""
    yield from in_an_empty_folder(tmp_path_factory)


@pytest.fixture(autouse=True)
def own_folder(tmp_path_factory, session_folder):
    yield from in_an_empty_folder(tmp_path_factory)


@pytest.fixture(autouse=True)
def own_precision():
    """Undo --tf32, which a run sets for the whole process."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="session", autouse=bool(EMULATED))
def emulated_gpu():
    from kernels.emulator import driver

    with driver.emulated(EMULATED, errors=os.environ.get("EMULATE_ERRORS", "uniform")):
        yield


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """The folder of Python's documentation as characters."""
    from data import pydocs

    folder = tmp_path_factory.mktemp("datasets") / "pydocs"
    pydocs.prepare(folder)
    return folder
