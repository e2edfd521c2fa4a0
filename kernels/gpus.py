"""The one table of GPUs: peak rates and memory from the makers' data sheets, with sources."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class GPU:
    flops: float  # FLOP/s of dense bf16 matrix products with float32 accumulation
    bandwidth: float  # bytes/s of its memory
    memory: float  # bytes; drivers report about 5% more than 10^9 bytes per GB
    arithmetic: float  # float32 FLOP/s outside the tensor cores
    architecture: str
    source: str  # key of SOURCES; with "?": unconfirmed for the numbers named in the comment


SOURCES = {  # read in copies and citing tables; data sheets print bf16 with sparsity, twice the dense figure
    "blackwell": "NVIDIA Blackwell data sheet, column HGX B200 or GB200, https://nvdam.widen.net/s/wwnsxrhm2w",
    "hopper": "NVIDIA H100 and H200 data sheets, https://resources.nvidia.com/en-us-tensor-core",
    "a100": "NVIDIA A100 data sheet, https://www.nvidia.com/en-us/data-center/a100",
    "ampere": "NVIDIA A40 and A10 data sheets, https://www.nvidia.com/en-us/data-center/a40",
    "a10g": "AWS, Amazon EC2 G5 instances, https://aws.amazon.com/ec2/instance-types/g5",
    "ada": "NVIDIA L40S and L4 data sheets, https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413",
    "rtx": "NVIDIA architecture white papers: RTX Blackwell, Ada, GA102, https://www.nvidia.com/en-us/technologies",
    "mi300x": "AMD Instinct MI300X data sheet, https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html",
}
# words of a GPU's name -> figures. Memory was checked against a page for the A100, H100 and H200 only (B200: some pages
# say 192 GB; the smaller figure counts).
GPUS = {
    "B200": GPU(2250e12, 7700e9, 180e9, 75e12, "sm_100", "blackwell"),
    "GB200": GPU(2500e12, 8000e9, 186e9, 80e12, "sm_100", "blackwell"),
    "H200 NVL": GPU(836e12, 4800e9, 141e9, 60e12, "sm_90", "hopper?"),  # arithmetic. Must precede the SXM's plain name
    "H200": GPU(989e12, 4800e9, 141e9, 67e12, "sm_90", "hopper"),
    "H100 PCIe": GPU(756e12, 2000e9, 80e9, 51e12, "sm_90", "hopper"),  # likewise
    "H100 NVL": GPU(835e12, 3900e9, 94e9, 60e12, "sm_90", "hopper?"),  # arithmetic
    "H100": GPU(989e12, 3350e9, 80e9, 67e12, "sm_90", "hopper"),
    "A100 SXM4 40GB": GPU(312e12, 1555e9, 40e9, 19.5e12, "sm_80", "a100?"),  # bandwidth
    "A100 PCIE 40GB": GPU(312e12, 1555e9, 40e9, 19.5e12, "sm_80", "a100?"),  # bandwidth
    "A100 80GB PCIe": GPU(312e12, 1935e9, 80e9, 19.5e12, "sm_80", "a100?"),  # bandwidth
    "A100": GPU(312e12, 2039e9, 80e9, 19.5e12, "sm_80", "a100"),
    "A40": GPU(149.7e12, 696e9, 48e9, 37.4e12, "sm_86", "ampere"),
    "A10G": GPU(70e12, 600e9, 24e9, 31.5e12, "sm_86", "a10g?"),  # flops and arithmetic
    "A10": GPU(125e12, 600e9, 24e9, 31.2e12, "sm_86", "ampere?"),  # flops
    "L40S": GPU(362e12, 864e9, 48e9, 91.6e12, "sm_89", "ada"),
    "L4": GPU(121e12, 300e9, 24e9, 30.3e12, "sm_89", "ada?"),  # arithmetic
    "RTX 5090": GPU(209.5e12, 1792e9, 32e9, 104.8e12, "sm_120", "rtx"),
    "RTX 4090": GPU(165.2e12, 1008e9, 24e9, 82.6e12, "sm_89", "rtx"),
    "RTX 3090": GPU(71e12, 936e9, 24e9, 35.6e12, "sm_86", "rtx"),
    "MI300X": GPU(1307.4e12, 5300e9, 192e9, 163.4e12, "gfx942", "mi300x"),
}
OTHER_CHIPS = {"Laptop", "Ti", "SUPER", "D", "Max", "MIG"}  # in the names of other GPUs, or of a slice of one


def named_gpu(name: str) -> GPU | None:
    """Return the row of GPUS for a name as the driver spells it ("NVIDIA A100-SXM4-80GB"), None for an unknown GPU."""
    words = f" {name.replace('-', ' ')} "
    if OTHER_CHIPS & set(words.split()):
        return None
    return next((gpu for known, gpu in GPUS.items() if f" {known} " in words), None)
