"""
Check what a machine with an NVIDIA GPU must have, before the first launch; report what is missing in one sentence.

    driver          new enough for the CUDA of the PyTorch wheel: with an older one, PyTorch reports no GPU at all
    C compiler      and Python.h: at its first launch, Triton compiles a small library for this Python with them

Oldest drivers: https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
"""

import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}  # by major version of CUDA
SYSTEM = Path("/")


def missing_for_triton() -> str:
    """Return what Triton lacks for its first launch on a GPU, "" if nothing. Check on Linux only."""
    if sys.platform != "linux":
        return ""
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"Triton needs a C compiler, and {' or '.join(compilers)} is not in PATH (install gcc, or set CC)"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does, for Debian
    include = sysconfig.get_paths(scheme)["include"]
    others = [folder for name in ("CPATH", "C_INCLUDE_PATH") for folder in os.environ.get(name, "").split(":")]
    if not any(Path(folder, "Python.h").exists() for folder in filter(None, [include, *others])):
        return f"Triton needs Python.h, and {include} lacks it (install python3-dev, or python3-devel)"
    return ""


def driver_version() -> str:
    """Return the version of NVIDIA's driver on Linux, such as "580.65.06", "" if unknown."""
    try:
        text = (SYSTEM / "proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"Kernel Module\D*?(\d+\.[\d.]+)", text)
    return found[1] if found else ""


def unseen_gpu() -> str:
    """Return why PyTorch finds no GPU although the machine has one that is not hidden from it; else ""."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or not torch.version.cuda or torch.cuda.is_available() or not [*(SYSTEM / "dev").glob("nvidia[0-9]*")]:
        return ""
    driver, needed = driver_version(), OLDEST_DRIVER.get(int(torch.version.cuda.partition(".")[0]), 0)
    if driver and int(driver.partition(".")[0]) < needed:
        wheel = f"PyTorch {torch.__version__} is built for CUDA {torch.version.cuda}"
        return f"{wheel} and needs NVIDIA's driver {needed} or newer, but this machine has {driver}: update the driver"
    return f"PyTorch cannot use this machine's GPU (driver {driver or 'unknown'}): see what nvidia-smi reports"
