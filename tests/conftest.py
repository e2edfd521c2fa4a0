"""One thread, so that a busy machine slows the tests little; Triton's interpreter where there is no GPU."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # also in the processes that tests start, so that all give the same bits

import torch  # noqa: E402

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it as each kernel is defined
