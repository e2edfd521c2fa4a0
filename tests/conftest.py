"""Where no GPU is present, Triton kernels run in the interpreter: Triton reads this as each kernel is defined."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
