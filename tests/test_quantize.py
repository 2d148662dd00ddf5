"""Models with weights of 8 and 4 bits: what changes, what they answer, and what they take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
import tiny_runs

from medmoe_jax import generate, losses, presets, quantize, sampling
from medmoe_jax.config import ConfigError, MoeConfig
from medmoe_jax.models import decoder, medmoe, moe, quantized
from medmoe_jax.placement import in_dtype
from medmoe_jax.quantize import __main__ as command

NEW = 3  # ids of an answer
GROUP = 6  # divides none of the small model's widths


@pytest.fixture
def quick() -> Iterator[None]:
    """Halves the time to compile, for tests that do not look at the program."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def names(tree: Any) -> set[str]:
    """Paths of the quantized leaves."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=quantize.is_quantized)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in flat
        if quantize.is_quantized(leaf)
    }


def model(family: str) -> tuple[Any, Any]:
    """A small model with two MoE layers, a deep router and a coefficient."""
    moe = MoeConfig(experts=3, top_k=2, router_layers=2, use_residual=True)
    cfg = small_models.config(family, moe, layers=3)
    return cfg, small_models.params(cfg, seed=2)


@pytest.mark.usefixtures("quick")
def test_what_is_quantized() -> None:
    """Matrices of the language model; of the tower and the projector if wanted; nothing else."""
    params = model("stablelm")[1]
    small = quantize.quantize(params, 8, parts=("llm",))
    attention = {f"llm/layers/attn/{n}/kernel" for n in ("q", "k", "v", "out")}
    ffns = {
        f"llm/{where}/{n}/kernel"
        for where in ("mlp", "moe/experts", "moe/meta")
        for n in ("gate", "up", "down")
    }
    llm = attention | ffns | {"llm/lm_head/kernel"}
    assert names(small) == llm
    tower = {f"vision/layers/{n}/kernel" for n in ("fc1", "fc2")}
    tower |= {f"vision/layers/attn/{n}/kernel" for n in ("q", "k", "v", "out")}
    extra = tower | {f"projector/fc{i}/kernel" for i in range(2)}
    assert names(quantize.quantize(params, 4)) == llm | extra
    # what is left alone is the very same array
    flat = jax.tree_util.tree_leaves_with_path(params)
    after = dict(jax.tree_util.tree_leaves_with_path(small, is_leaf=quantize.is_quantized))
    kept = [after[path] is leaf for path, leaf in flat]
    assert sum(not same for same in kept) == len(llm)
    router = small["llm"]["moe"]["router"]["fc1"]
    assert router["kernel"] is params["llm"]["moe"]["router"]["fc1"]["kernel"]
    phi = model("phi")[1]
    assert names(quantize.quantize(phi, 8, parts=("projector",))) == {
        f"projector/fc{i}/kernel" for i in range(2)
    }


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("bits", quantize.BITS)
def test_stacked_and_unstacked_are_the_same(bits: int) -> None:
    cfg, params = model("phi")
    stacked = quantize.quantize(params, bits, group=GROUP)
    first = jax.tree.map(np.asarray, generate.for_generation(stacked, cfg))
    second = quantize.quantize(generate.for_generation(params, cfg), bits, group=GROUP)
    jax.tree.map(np.testing.assert_array_equal, first, jax.tree.map(np.asarray, second))
    w = params["llm"]["moe"]["experts"]["fc2"]["kernel"][1, 2]
    mine = decoder.unstack(stacked["llm"], cfg)["blocks"][2]["moe"]["experts"][2]["fc2"]["kernel"]
    alone = quantized.to_int8(w) if bits == 8 else quantized.to_int4(w, GROUP)
    jax.tree.map(np.testing.assert_array_equal, mine, alone)


def floats(small: Any, like: Any) -> Any:
    """The quantized model's weights as floats, for a model that does not know of them."""

    def one(leaf: Any, old: Any) -> Any:
        if not quantize.is_quantized(leaf):
            return leaf
        return quantized.dequantize(leaf)[..., : old.shape[-2], :]

    def whole(small: Any) -> Any:
        return jax.tree.map(one, small, like, is_leaf=quantize.is_quantized)

    return jax.jit(whole)(small)


@pytest.mark.parametrize(("family", "bits"), [("phi", 4), ("stablelm", 8)])
@pytest.mark.usefixtures("quick")
def test_generation(family: str, bits: int) -> None:
    """A quantized model answers as one with the same weights in floats, and so does the stacked
    form."""
    cfg = small_models.config(family, MoeConfig(experts=2), layers=1)
    params = small_models.params(cfg, seed=2)
    batch = small_models.batch(cfg, (1, 0))
    small = quantize.quantize(params, bits, group=GROUP)
    left = generate.left_padded({k: batch[k] for k in small_models.ON_DEVICE})
    knobs = sampling.knobs(sampling.Sampling(), [0, 0])

    ready = generate.for_generation(small, cfg)
    state, posterior = generate.read(ready, cfg, left, dtype=jnp.float32, room=NEW)
    settings: dict[str, Any] = {"max_new": NEW, "every": NEW, "dtype": jnp.float32}
    *_, (_, found) = generate.answers(ready, cfg, state, jnp.int32(-1), knobs, **settings)
    ids, log_probs = np.asarray(found.ids[:, :NEW]), np.asarray(found.log_probs[:, :NEW])

    @jax.jit
    def scores(p: Any, batch: Any) -> tuple[Any, Any]:
        hidden, reports = medmoe.forward(p, cfg, batch)
        return medmoe.logits(p, hidden), losses.posterior(reports["router_logits"], batch["prompt"])

    # prompts and answers at once
    size = batch["mask"].sum(-1)
    longer = {k: np.pad(batch[k], ((0, 0), (0, NEW))) for k in ("tokens", "mask", "image_pos")}
    longer["prompt"] = longer["mask"].copy()
    for row in range(2):
        new = slice(size[row], size[row] + NEW)
        longer["tokens"][row, new] = ids[row]
        longer["image_pos"][row, new] = -1
        longer["mask"][row, new] = True
    longer["images"] = batch["images"]
    places = size[:, None] - 1 + np.arange(NEW)
    for p in (small, floats(small, params)):
        logits, routed = jax.device_get(scores(p, longer))
        shares = jax.nn.log_softmax(logits[np.arange(2)[:, None], places])
        np.testing.assert_array_equal(shares.argmax(-1), ids)
        np.testing.assert_allclose(shares.max(-1), log_probs, atol=1e-4)
        np.testing.assert_allclose(routed, np.asarray(posterior), atol=1e-5)
    moved = np.abs(np.asarray(scores(params, longer)[0]) - logits)[longer["mask"]].max()
    assert 1e-4 < moved < (0.5 if bits == 8 else 5)


@pytest.mark.usefixtures("quick")
def test_the_router_is_bit_equal() -> None:
    """The same scores for the same input."""
    params = model("phi")[1]
    small = quantize.quantize(params, 4)
    x = np.random.default_rng(0).standard_normal((1, 4, 16)).astype(np.float32)

    def logits(p: Any) -> np.ndarray:
        router = jax.tree.map(lambda a: a[0], p["llm"]["moe"]["router"])
        return np.asarray(moe.router_logits(router, jnp.asarray(x)))

    np.testing.assert_array_equal(logits(small), logits(params))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "bits is 3; weights can have 8 or 4 bits"),
        ({"bits": 0}, "bits is 0"),
        ({"bits": 4, "group": 7}, "group is 7; it must be even"),
        ({"bits": 4, "group": 0}, "group is 0"),
        ({"bits": 8, "parts": ("llm", "router")}, r"\['router'\] cannot be quantized; use llm"),
        ({"bits": 8, "parts": ()}, "cannot be quantized"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize.quantize(model("phi")[1], **settings)


def test_quantized_twice() -> None:
    params = quantize.quantize(model("phi")[1], 8)
    with pytest.raises(ConfigError, match="quantized already"):
        quantize.quantize(params, 4)


@pytest.mark.parametrize(
    ("name", "whole", "int8", "int4"),
    [
        ("phi2", 12_897_820_928, 6_590_894_336, 3_623_747_840),
        ("stablelm", 7_230_918_848, 3_828_969_664, 2_225_606_848),
    ],
)
def test_bytes_of_the_full_models(name: str, whole: int, int8: int, int4: int) -> None:
    """Stage 3 (four experts and the meta expert), the rest in bfloat16; nothing is allocated."""
    cfg = presets.model(name, MoeConfig())
    assert sum(quantize.sizes(cfg, 0).values()) == whole
    assert sum(quantize.sizes(cfg, 8).values()) == int8 < (7e9 if "phi" in name else 4e9)
    assert sum(quantize.sizes(cfg, 4).values()) == int4
    parts = quantize.sizes(cfg, 8)
    before = quantize.sizes(cfg, 0)
    assert parts.keys() == before.keys()
    for kept in ("embedding", "router"):
        assert parts[kept] == before[kept]
    for smaller in ("experts", "meta expert", "plain FFNs", "language-model head"):
        assert 0.5 <= parts[smaller] / before[smaller] < 0.502


@pytest.mark.usefixtures("quick")
def test_sizes_are_those_of_the_arrays() -> None:
    cfg, params = model("phi")
    for bits in (8, 4):
        real = quantize.nbytes(quantize.quantize(params, bits, group=GROUP))
        told = quantize.sizes(cfg, bits, dtype=jnp.float32, group=GROUP)
        assert real == told
        unstacked = quantize.quantize(generate.for_generation(params, cfg), bits, group=GROUP)
        assert quantize.nbytes(unstacked) == told
        arrays = [np.asarray(a).nbytes for a in jax.tree.leaves(unstacked)]
        assert sum(arrays) == sum(told.values())
    rows = quantize.size_table({"a": {"router": 2_000_000}, "b": {"router": 500_000}})
    assert rows == [["MB", "a", "b"], ["router", "2.00", "0.50"], ["all", "2.00", "0.50"]]
    with pytest.raises(ConfigError, match="'head/kernel' belongs to no part"):
        quantize.nbytes({"head": {"kernel": np.zeros(2)}})


def test_weights_in_bfloat16() -> None:
    """What the command compares with: all but the router."""
    params = jax.eval_shape(lambda p: in_dtype(p, jnp.bfloat16), model("phi")[1])
    flat = jax.tree_util.tree_leaves_with_path(params)
    routing = ["'router'" in jax.tree_util.keystr(path) for path, _ in flat]
    assert any(routing)
    assert [leaf.dtype == jnp.bfloat16 for _, leaf in flat] == [not each for each in routing]


@pytest.mark.usefixtures("quick")
def test_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One table, the same figures as JSON."""
    folder = tiny_runs.save_start(tmp_path / "model")
    file = tiny_runs.save_questions(tmp_path / "d", 4)
    out = tmp_path / "figures" / "q.json"
    line = f"quantize --model-path {folder} --question-file {file} --image-folder {file.parent}"
    line += f"/images --limit 2 --bits 8 --max-new-tokens 3 --dtype bfloat16 --json {out}"
    monkeypatch.setattr("sys.argv", line.split())
    command.main()
    shown = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["questions"] == 2 and list(found["weights"]) == ["bfloat16", "int8"]
    whole, small = found["weights"].values()
    assert sum(small["bytes"].values()) < sum(whole["bytes"].values())
    assert 0 < small["logit_error_mean"] < small["logit_error_max"] < 0.1 * small["logit_spread"]
    assert small["tokens"] > 100 and 0.9 < small["same_next_token"] <= 1
    assert small["same_answers"] in (0, 0.5, 1) and whole["closed_accuracy"] in (0, 100)
    assert "| int8 " in shown and "largest logit error" in shown and "plain FFNs" in shown
    monkeypatch.setattr("sys.argv", [*line.split(), "--group", "5"])
    with pytest.raises(SystemExit, match="error: group is 5"):
        command.main()
