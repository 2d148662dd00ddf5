"""Devices that need not exist: TPU slices, GPUs of one node, virtual CPU devices."""

from __future__ import annotations

import importlib.util
import os
import re
from math import prod
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from medmoe_jax import hardware
from medmoe_jax.config import ConfigError

NODE = 8  # GPUs that NVLink (or PCIe) joins
HOST = 2  # chips of a TPU host along its first two axes
EXAMPLES = "v5e:2x4, v5p:2x2x1, v6e:2x4, h100:8, h200:1, a100-40g:8, cpu:8"


class Target(NamedTuple):
    """Devices to compile for."""

    name: str  # as given, v5e:2x4
    platform: str  # tpu | cuda | cpu
    chip: hardware.Chip | None  # None: no published figures
    devices: list[Any]


class _Gpu(NamedTuple):
    """What XLA wants to know of a GPU. Source: NVIDIA's CUDA C++ Programming Guide, "Compute
    Capabilities", and the data sheets."""

    title: str
    capability: tuple[int, int]
    cores: int  # multiprocessors
    lanes: int  # float32 units of a multiprocessor
    shared: int  # bytes of shared memory a multiprocessor; a block may have 1 KiB less
    threads: int  # most threads of a multiprocessor
    l2: int  # MiB
    clock: float  # GHz


_GPUS = {
    "a100-40g": _Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 164 << 10, 2048, 40, 1.41),
    "a100-80g": _Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164 << 10, 2048, 40, 1.41),
    "h100": _Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228 << 10, 2048, 50, 1.98),
    "h200": _Gpu("NVIDIA H200", (9, 0), 132, 128, 228 << 10, 2048, 50, 1.98),
    "l4": _Gpu("NVIDIA L4", (8, 9), 58, 128, 100 << 10, 1536, 48, 2.04),
}


def prepare(name: str) -> None:
    """Sets up JAX for the target; to be called before JAX looks for devices.

    Raises:
      ConfigError: `name` is no target.
    """
    chip, shape = _parse(name)
    if chip == "cpu":
        jax.config.update("jax_num_cpu_devices", prod(shape))
    # The programs are compiled only; no device of this machine is taken.
    jax.config.update("jax_platforms", "cpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # or libtpu reports an error
    # So libtpu leaves the lock alone that is for those who use a TPU: several plans can be made at
    # a time, and beside a process that does use one.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"


def load(name: str) -> Target:
    """The devices of a target such as v5e:2x4, h100:8 or cpu:8 (see `prepare`).

    Raises:
      ConfigError: unknown target, a topology that does not exist, or the compiler is not installed.
    """
    chip, shape = _parse(name)
    if chip == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < prod(shape):
            raise ConfigError(
                f"target {name}: JAX has started with {len(devices)} CPU device(s) already"
            )
        return Target(name, "cpu", None, devices[: prod(shape)])
    if chip in _GPUS:
        return Target(name, "cuda", hardware.by_name(chip), _gpus(chip, prod(shape)))
    return Target(name, "tpu", hardware.by_name(chip), _tpus(name, chip, shape))


def _parse(name: str) -> tuple[str, tuple[int, ...]]:
    """Chip and shape. Raises ConfigError."""
    chip, _, rest = name.partition(":")
    tpus = [c.name for c in hardware.CHIPS if c.name not in _GPUS]
    flat = chip in _GPUS or chip == "cpu"
    if not flat and chip not in tpus:
        known = ", ".join([*tpus, *_GPUS, "cpu"])
        raise ConfigError(f"target {name!r}: unknown chip; use one of {known}, as in {EXAMPLES}")
    axes = 1 if flat else 2 if chip in ("v5e", "v6e") else 3
    if not re.fullmatch(r"\d+(x\d+)*", rest) or len(shape := rest.split("x")) != axes:
        form = {1: "a number of devices", 2: "X x Y chips", 3: "X x Y x Z chips"}[axes]
        raise ConfigError(f"target {name!r}: {chip} takes {form}, as in {EXAMPLES}")
    sizes = tuple(int(n) for n in shape)
    if prod(sizes) < 1 or (chip in _GPUS and sizes[0] > NODE):
        most = f"1 to {NODE} GPUs, those of one node" if chip in _GPUS else "at least one device"
        raise ConfigError(f"target {name!r}: give {most}")
    return chip, sizes


def _tpus(name: str, chip: str, shape: tuple[int, ...]) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"target {name} needs libtpu, the compiler of TPUs: pip install 'medmoe_jax[plan]'"
        )
    host = [min(HOST, shape[0]), min(HOST, shape[1]), 1]
    config = "megacore" if chip == "v4" else "default"
    try:
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=name,
            chip_config_name=config,
            chips_per_host_bounds=host,
        )
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"target {name}: there is no such slice ({first})") from error
    return list(found.devices)


def _gpus(chip: str, number: int) -> list[Any]:
    if not any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (13, 12)):
        raise ConfigError(
            f"target {chip} needs JAX's CUDA plugin (no driver and no GPU): "
            "pip install 'medmoe_jax[plan-cuda]'"
        )
    try:
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name=chip,
            topology=f"1x1x{number}",
            target_config=_description(chip),
        )
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"target {chip}:{number}: JAX's CUDA plugin does not load ({first}); its version must "
            f"be that of jax, {jax.__version__}"
        ) from error
    return list(found.devices)


def _description(name: str) -> str:
    """XLA's GpuTargetConfigProto, as text."""
    gpu, chip = _GPUS[name], hardware.by_name(name)
    assert chip is not None
    return f"""gpu_device_info {{
      threads_per_block_limit: 1024
      threads_per_warp: 32
      shared_memory_per_block: {48 << 10}
      shared_memory_per_core: {gpu.shared}
      shared_memory_per_block_optin: {gpu.shared - (1 << 10)}
      threads_per_core_limit: {gpu.threads}
      core_count: {gpu.cores}
      fpus_per_core: {gpu.lanes}
      block_dim_limit_x: {2**31 - 1}
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
      memory_bandwidth: {int(chip.bandwidth)}
      l2_cache_size: {gpu.l2 << 20}
      clock_rate_ghz: {gpu.clock}
      device_memory_size: {int(chip.memory)}
      registers_per_core_limit: 65536
      registers_per_block_limit: 65536
      cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 }}
    device_description_str: "{gpu.title}"
    """
