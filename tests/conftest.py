"""One thread, so that a busy machine slows the tests little; Triton's interpreter where there is no GPU."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # also in the processes that tests start, so that all give the same bits

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it as each kernel is defined


def pytest_collection_modifyitems(items):
    """Skip, where no GPU is present, the tests marked with it."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """The folder of Python's documentation as characters."""
    from data import pydocs

    folder = tmp_path_factory.mktemp("datasets") / "pydocs"
    pydocs.prepare(folder)
    return folder
