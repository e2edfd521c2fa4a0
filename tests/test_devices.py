"""The hardware at hand: peaks by name, devices that are missing, dtypes."""

import pytest
import torch

from data.files import UserError
from training import devices


def test_the_peak_of_a_gpu_is_found_by_its_name():
    assert devices.named_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert devices.named_peak("NVIDIA A10G") == 70e12
    assert devices.named_peak("NVIDIA H100 PCIe") == 756e12
    assert devices.named_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert devices.named_peak("NVIDIA L40S") == 362e12
    assert devices.named_peak("NVIDIA GeForce GT 710") is None


def test_devices_that_are_not_there_are_named():
    with pytest.raises(UserError, match="--device bogus cannot be used"):
        devices.choose_device("bogus")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda"):
            devices.choose_device("cuda")
    assert devices.choose_dtype("float32", torch.device("cpu")) == torch.float32
