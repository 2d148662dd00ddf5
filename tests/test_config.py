"""Configurations, presets, the phase files, parameter counts and the sharding table."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import pytest
import small_models
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh, NamedSharding

from medmoe_jax import info, optim, presets, sharding
from medmoe_jax.config import (
    ConfigError,
    LlmConfig,
    MeshConfig,
    ModelConfig,
    MoeConfig,
    RunConfig,
    VisionConfig,
    model_from_dict,
    model_to_dict,
    natural,
)
from medmoe_jax.models import medmoe, moe

ROOT = Path(__file__).resolve().parents[1]
SIZES = ("phi2", "stablelm", "tiny", "tiny_stablelm")
PHASES = ("stage1", "stage2", "router", "stage3")
FULL = MoeConfig(experts=4, top_k=1, placement="sparse")


def shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of all parameters."""
    return {k: v.shape for k, v in flatten_dict(medmoe.shapes(cfg), sep="/").items()}


def phase(name: str, size: str) -> RunConfig:
    """What configs/NAME.py gives for a size."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"configs/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(size)


def test_numbers_on_command_lines() -> None:
    assert natural("0") == 0 and natural("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match="-1 is below 0; give 0 or more"):
        natural("-1")
    with pytest.raises(ValueError, match=r"1\.5"):
        natural("1.5")


def test_placements() -> None:
    for placement, layers in (
        ("sparse", (0, 2, 4, 6)),
        ("first_half", (0, 1, 2)),
        ("second_half", (3, 4, 5, 6)),
        ("dense", (0, 1, 2, 3, 4, 5, 6)),
        ("5,0,3", (0, 3, 5)),
        ("6", (6,)),
    ):
        assert MoeConfig(placement=placement).layers(7) == layers
    for wrong in ("0,0", "0,7", "-1", "some", "1;2"):
        with pytest.raises(ConfigError, match=f"moe.placement '{wrong}'"):
            MoeConfig(placement=wrong).layers(7)
    with pytest.raises(ConfigError, match=r"'first_half' is none of 1 layer\(s\)"):
        small_models.config("phi", MoeConfig(placement="first_half"), layers=1)
    cfg = small_models.config("phi", MoeConfig(placement="1"), layers=3)
    assert cfg.moe_layers == (1,) and cfg.dense_layers == (0, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision": VisionConfig(image_size=30)}, "image_size 30 is not a multiple"),
        ({"vision": VisionConfig(heads=5)}, "width 1024 is not a multiple of heads 5"),
        ({"vision": VisionConfig(select_layer=-26)}, "select_layer -26 does not exist"),
        ({"llm": LlmConfig(family="gpt")}, "family 'gpt' is unknown"),
        ({"llm": LlmConfig(kv_heads=5)}, "kv_heads 5 must divide"),
        ({"llm": LlmConfig(rotary_fraction=0.39)}, r"odd number \(31\)"),
        ({"projector": "mlpx_gelu"}, "projector 'mlpx_gelu' is unknown"),
        ({"moe": MoeConfig(experts=1)}, "experts is 1"),
    ],
)
def test_models_that_cannot_work(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**change).validate()


def test_projector_names() -> None:
    for name, depth in (("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp12x_gelu", 12)):
        assert ModelConfig(projector=name).projector_layers == depth


@pytest.mark.parametrize("size", SIZES)
def test_presets(size: str) -> None:
    for mixture in (None, FULL):
        cfg = presets.model(size, mixture)
        text = json.dumps(model_to_dict(cfg))
        assert model_from_dict(json.loads(text)) == cfg
        assert hash(cfg) == hash(presets.model(size, mixture))
    with pytest.raises(ConfigError, match="unknown model size 'phi3'; use one of phi2"):
        presets.model("phi3")


def test_broken_descriptions() -> None:
    whole = model_to_dict(presets.model("tiny"))
    for wrong in ({"llm": whole["llm"]}, whole | {"llm": whole["llm"] | {"depth": 3}}):
        with pytest.raises(ConfigError, match="not a medmoe_jax model description"):
            model_from_dict(wrong)


def test_real_sizes() -> None:
    """Of reference checkpoints: CLIP ViT-L/14 at 336 pixels, Phi-2, StableLM-2-1.6B."""
    phi, stablelm = presets.model("phi2", FULL), presets.model("stablelm", FULL)
    assert phi.vision.patches == stablelm.vision.patches == 576
    assert phi.vision.layers_run == 23
    assert (phi.llm.head_dim, phi.llm.rotary_dim, len(phi.moe_layers)) == (80, 32, 16)
    assert (stablelm.llm.head_dim, stablelm.llm.rotary_dim) == (64, 16)
    assert len(stablelm.moe_layers) == 12


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PHASES)
def test_phase_files(name: str, size: str) -> None:
    """Every phase is valid for every size and trains what it says and nothing else."""
    cfg = phase(name, size)
    assert cfg.phase == name
    model = cfg.model.validate()
    if name == "router":
        assert model.moe
        paths = list(shapes(dataclasses.replace(model, moe=None)))
        routers = moe.router_leaves(model.llm.width, model.moe.experts, model.moe.router_layers)
        paths += [f"router/{key}" for key in flatten_dict(routers, sep="/")]
    else:
        paths = list(shapes(model))
    label = optim.labels(paths, cfg.train)
    trained = {path for path in paths if label[path] == optim.TRAIN}
    expected = {
        "stage1": lambda p: p.startswith("projector/"),
        "stage2": lambda p: not p.startswith("vision/"),
        "router": lambda p: p.startswith("router/"),
        "stage3": lambda p: p.startswith(("llm/moe/experts/", "llm/moe/meta/")),
    }[name]
    assert trained == {path for path in paths if expected(path)}
    assert presets.is_tiny(size) == (cfg.compute_dtype == "float32")


def test_paper_settings() -> None:
    """Learning rates and epochs of Tables 12 and 13; 2 experts active: top-1 and meta."""
    found = {name: phase(name, "phi2") for name in PHASES}
    assert [found[n].optim.lr for n in ("stage1", "stage2", "stage3")] == [1e-3, 2e-5, 2e-5]
    assert [found[n].optim.epochs for n in ("stage1", "stage2")] == [1.0, 3.0]
    assert found["router"].data.labels_per_modality == 200
    mixture = found["stage3"].model.moe
    assert mixture and (mixture.experts, mixture.top_k, mixture.meta) == (4, 1, True)
    assert mixture.placement == "sparse" and mixture.aux_coef == 0 and not mixture.noise
    for cfg in found.values():
        assert (cfg.optim.warmup, cfg.optim.schedule, cfg.optim.weight_decay) == (0.03, "cosine", 0)


@pytest.mark.parametrize(
    ("size", "total", "without_meta", "activated"),
    [
        ("phi2", 6_136_058_944, 5_296_993_344, 3_618_862_144),
        ("stablelm", 3_305_558_064, 2_890_321_968, 2_059_849_776),
    ],
)
def test_parameter_counts(size: str, total: int, without_meta: int, activated: int) -> None:
    """The language model's numbers, from shapes alone: nothing is allocated."""
    cfg = presets.model(size, FULL)
    held = len(jax.live_arrays())
    tracemalloc.start()
    parts = info.components(cfg)
    text = info.report(cfg)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(jax.live_arrays()) == held and peak < 2**20
    language = {k: v for k, v in parts.items() if k not in ("vision tower", "projector")}
    assert sum(t for t, _ in language.values()) == total
    assert sum(a for _, a in language.values()) == activated
    assert total - parts["meta expert"][0] == without_meta
    assert sum(t for t, _ in parts.values()) == sum(map(math.prod, shapes(cfg).values()))
    for number in (total, without_meta, activated):
        assert f"{number:,}" in text
    paper = info.PAPER[cfg.llm.family]
    assert abs(activated / 1e9 - paper[0]) < 0.1 and abs(without_meta / 1e9 - paper[1]) < 0.1
    assert "Table 14" in text
    top2 = info.components(presets.model(size, dataclasses.replace(FULL, top_k=2, meta=False)))
    assert "meta expert" not in top2 and top2["experts"][1] == 2 * parts["experts"][1]
    assert "Table 14" not in info.report(presets.model(size))


def test_info_command() -> None:
    command = [sys.executable, "-m", "medmoe_jax.info", "--config", "configs/stage3.py:stablelm"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "3,305,558,064" in done.stdout and "2.06B" in done.stdout


@pytest.mark.parametrize("size", SIZES)
def test_sharding_covers_every_parameter(size: str) -> None:
    """Every path has a rule that fits; eight devices hold an eighth of what is large."""
    mesh = AbstractMesh((1, 2, 4), sharding.AXES)
    mixture = dataclasses.replace(FULL, use_residual=True)
    for cfg in (presets.model(size), presets.model(size, mixture)):
        everything = shapes(cfg) | {
            "router/fc1/kernel": (cfg.llm.width, 4),
            "router/fc1/bias": (4,),
        }
        held = 0
        for path, shape in everything.items():
            spec = sharding.spec(path, shape, mesh)
            part = NamedSharding(mesh, spec).shard_shape(shape)
            held += math.prod(part)
            if math.prod(shape) > 2**21:
                assert math.prod(part) * 8 == math.prod(shape), path
        if not presets.is_tiny(size):
            assert held < 1.02 / 8 * sum(map(math.prod, everything.values()))
    with pytest.raises(
        ConfigError, match="no sharding rule matches the parameter 'llm/new/kernel'"
    ):
        sharding.spec("llm/new/kernel", (4, 4), mesh)
    odd = sharding.spec("projector/fc0/kernel", (12, 7), mesh)
    assert NamedSharding(mesh, odd).shard_shape((12, 7)) == (3, 7)


def test_mesh() -> None:
    devices = jax.devices()[:1]
    mesh = sharding.make_mesh(MeshConfig(), devices)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "expert": 1}
    for cfg, message in (
        (MeshConfig(data=2), "does not divide 1 device"),
        (MeshConfig(data=-1, fsdp=-1), "does not divide"),
        (MeshConfig(data=0), "does not divide"),
    ):
        with pytest.raises(ConfigError, match=message):
            sharding.make_mesh(cfg, devices)
