"""Published figures of accelerators, for model FLOPs utilisation and for plans.

Products are dense (no structured sparsity). float32 on a GPU is TF32, which XLA uses for float32
products there; TPUs have no figure for float32. `network` is what one chip can send over all of its
links at once, one direction; a program that uses some links only gets less.

Sources: Google's pages of each TPU (docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e), whose
interconnect is the sum of both directions, or half of it in Gbps. That of the v4 names none: its
six links of 50 GB/s are those of Jouppi et al., "TPU v4: An Optically Reconfigurable Supercomputer
for Machine Learning", 2023. Earlier versions of the page of the v6e said 1640 GB/s and 3584 Gbps.
NVIDIA's data sheets "A100 Tensor Core GPU", "H100 Tensor Core GPU" (SXM), "H200 Tensor Core GPU"
(SXM) and "L4 Tensor Core GPU": FLOP/s marked "with sparsity" are halved here, and so is the
bandwidth of NVLink and PCIe, which is the sum of both directions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

GIB = 2**30
TERA = 1e12
GB = 1e9


@dataclass(frozen=True)
class Chip:
    """One device, as JAX counts them."""

    name: str
    kinds: tuple[str, ...]  # what `jax.Device.device_kind` may say
    memory: float  # bytes
    reserve: float  # bytes that a program cannot use
    bandwidth: float  # bytes of memory traffic a second
    network: float  # bytes sent to other chips a second
    peak: dict[str, float] = field(default_factory=dict)  # dtype of products -> FLOP/s


# The reserve of a TPU is what libtpu keeps of the memory when it compiles; that of a GPU, 1 GiB, is
# for the driver's context and the workspaces of cuBLAS, cuDNN and NCCL. Of a GPU's memory 1 GB is
# taken as 10^9 bytes, which is a little less than its driver reports.
CHIPS = (
    Chip(
        "v4",
        ("TPU v4",),
        memory=32 * GIB,
        reserve=1.25 * GIB,
        bandwidth=1200 * GB,
        network=6 * 50 * GB,
        peak={"bfloat16": 275 * TERA},
    ),
    Chip(
        "v5e",
        ("TPU v5 lite", "TPU v5e"),
        memory=16 * GIB,
        reserve=0.25 * GIB,
        bandwidth=819 * GB,
        network=400 / 2 * GB,
        peak={"bfloat16": 197 * TERA},
    ),
    Chip(
        "v5p",
        ("TPU v5", "TPU v5p"),
        memory=95 * GIB,
        reserve=0,
        bandwidth=2765 * GB,
        network=1200 / 2 * GB,
        peak={"bfloat16": 459 * TERA},
    ),
    Chip(
        "v6e",
        ("TPU v6 lite", "TPU v6e"),
        memory=32 * GIB,
        reserve=0.76 * GIB,
        bandwidth=1600 * GB,
        network=800 / 2 * GB,
        peak={"bfloat16": 918 * TERA},
    ),
    Chip(
        "a100-40g",
        ("NVIDIA A100-SXM4-40GB",),
        memory=40 * GB,
        reserve=GIB,
        bandwidth=1555 * GB,
        network=600 / 2 * GB,
        peak={"bfloat16": 312 * TERA, "float32": 156 * TERA},
    ),
    Chip(
        "a100-80g",
        ("NVIDIA A100-SXM4-80GB",),
        memory=80 * GB,
        reserve=GIB,
        bandwidth=2039 * GB,
        network=600 / 2 * GB,
        peak={"bfloat16": 312 * TERA, "float32": 156 * TERA},
    ),
    Chip(
        "h100",
        ("NVIDIA H100 80GB HBM3",),
        memory=80 * GB,
        reserve=GIB,
        bandwidth=3350 * GB,
        network=900 / 2 * GB,
        peak={"bfloat16": 989.5 * TERA, "float32": 494.7 * TERA},
    ),
    Chip(
        "h200",
        ("NVIDIA H200",),
        memory=141 * GB,
        reserve=GIB,
        bandwidth=4800 * GB,
        network=900 / 2 * GB,
        peak={"bfloat16": 989.5 * TERA, "float32": 494.7 * TERA},
    ),
    Chip(
        "l4",
        ("NVIDIA L4",),
        memory=24 * GB,
        reserve=GIB,
        bandwidth=300 * GB,
        network=64 / 2 * GB,
        peak={"bfloat16": 121 * TERA, "float32": 60 * TERA},
    ),
)


def by_kind(kind: str) -> Chip | None:
    """The chip that calls itself `kind` (`jax.Device.device_kind`); None if it is not known."""
    return next((chip for chip in CHIPS if kind in chip.kinds), None)


def by_name(name: str) -> Chip | None:
    """The chip of a name such as v5e or h100; None if it is not known."""
    return next((chip for chip in CHIPS if chip.name == name), None)


def peak(kind: str, dtype: str) -> float | None:
    """FLOP/s of products in `dtype` on the device `kind`; None where there is no figure."""
    chip = by_kind(kind)
    return None if chip is None else chip.peak.get(dtype)
