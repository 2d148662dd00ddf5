"""The model as a function: what depends on what, and that no way to run it changes the result.

That it equals PyTorch is tested in `test_check.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models

from medmoe_jax import losses
from medmoe_jax.config import ModelConfig, MoeConfig
from medmoe_jax.models import attention, clip, decoder, layers, medmoe

pytestmark = pytest.mark.usefixtures("quick_compile")

MODELS = {
    "phi": small_models.config("phi", MoeConfig(experts=3, top_k=2), layers=4),
    "stablelm": small_models.config(
        "stablelm", MoeConfig(2, placement="1,2", use_residual=True), layers=3
    ),
}
IMAGES = (1, 0, 2)


@functools.partial(jax.jit, static_argnames=("cfg", "dtype"))
def logits(p: Any, cfg: ModelConfig, batch: Any, dtype: Any = jnp.float32, key: Any = None) -> Any:
    """f32[B, T, V]."""
    return medmoe.logits(p, medmoe.forward(p, cfg, batch, dtype=dtype, noise_key=key)[0])


def on_device(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k: batch[k] for k in small_models.ON_DEVICE if k in batch}


@pytest.fixture(scope="module", params=MODELS)
def cfg(request: pytest.FixtureRequest) -> ModelConfig:
    """A small MoE model of either family."""
    return MODELS[request.param]


@pytest.fixture(scope="module")
def params(cfg: ModelConfig) -> dict[str, Any]:
    """Its random parameters."""
    return small_models.params(cfg)


@pytest.fixture(scope="module")
def batch(cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Rows with one, no and two images, every word of the batch another one."""
    batch = small_models.batch(cfg, IMAGES)
    words = batch["mask"] & (batch["image_pos"] < 0)
    batch["tokens"][words] = 1 + np.random.default_rng(0).permutation(words.sum())
    assert words.sum() < cfg.llm.vocab
    return on_device(batch)


@pytest.fixture(scope="module")
def expected(cfg: ModelConfig, params: Any, batch: Any) -> np.ndarray:
    """Its logits."""
    return np.asarray(logits(params, cfg, batch))


def test_modules_hold_the_described_parameters(
    cfg: ModelConfig, params: Any, batch: Any, expected: np.ndarray
) -> None:
    """Flax's init gives the tree of `leaves`, for dense models too, and apply the same logits."""
    for model in (cfg, dataclasses.replace(cfg, moe=None, projector="linear")):
        module = medmoe.MedMoE(model)
        made = jax.eval_shape(module.init, jax.random.key(0), batch)["params"]
        assert jax.tree.map(lambda a: (a.shape, a.dtype), made) == jax.tree.map(
            lambda a: (a.shape, a.dtype), medmoe.shapes(model)
        )
    if cfg.llm.family == "phi":
        applied = jax.jit(medmoe.MedMoE(cfg).apply)({"params": params}, batch)
        np.testing.assert_allclose(applied, expected, atol=1e-5)


def test_initial_weights() -> None:
    """Norms start as the identity, biases at zero, and no two kernels alike."""
    leaves = layers.mlp_leaves("phi", 6, 6) | {"ln": layers.norm_leaves(6)}
    made = layers.initialise(jax.random.key(0), leaves)
    assert (made["ln"]["scale"] == 1).all() and not made["fc1"]["bias"].any()
    assert not (made["fc1"]["kernel"] == made["fc2"]["kernel"]).any()


def test_a_row_alone_is_the_row_in_a_batch(
    cfg: ModelConfig, params: Any, batch: Any, expected: np.ndarray
) -> None:
    """Other rows, their images and the amount of padding change nothing."""
    length = int(batch["mask"][0].sum())
    assert length < batch["mask"].shape[1]
    row = {k: v[:1] if k == "images" else v[:1, : length + 1] for k, v in batch.items()}
    alone = logits(params, cfg, row | {"images": row["images"][:, :1]})
    np.testing.assert_allclose(alone[0, :length], expected[0, :length], atol=1e-5)


def test_padding_changes_nothing(
    cfg: ModelConfig, params: Any, batch: Any, expected: np.ndarray
) -> None:
    """Whatever ids lie in padding, and whatever images in slots that no place refers to."""
    tokens = np.where(batch["mask"], batch["tokens"], 7)
    images = batch["images"].copy()
    images[0, 1] = images[1] = 100.0
    other = logits(params, cfg, batch | {"tokens": tokens, "images": images})
    assert (np.asarray(other) == expected).all()
    images[0, 0] += 1.0
    changed = np.asarray(logits(params, cfg, batch | {"images": images}))
    assert (changed[1] == expected[1]).all() and not np.allclose(changed[0], expected[0], atol=0.1)


def test_who_sees_whom(cfg: ModelConfig, params: Any, batch: Any) -> None:
    """The gradient of one place reaches the words and images up to it in its row, and only them."""
    weights = np.random.default_rng(0).standard_normal(cfg.llm.width).astype(np.float32)

    @jax.jit
    @jax.grad
    def gradient(free: tuple[Any, Any], row: int, place: int) -> Any:
        p = params | {"llm": params["llm"] | {"embed": {"embedding": free[1]}}}
        hidden, _ = medmoe.forward(p, cfg, batch | {"images": free[0]})
        return hidden[row, place] @ weights

    per_image = cfg.vision.patches
    for row, place in ((0, 3), (0, 8), (1, 4), (2, 11), (2, 15)):
        free = (batch["images"], params["llm"]["embed"]["embedding"])
        of_images, of_words = (np.abs(g) for g in gradient(free, row, place))
        position = np.arange(batch["mask"].shape[1])
        seen = (position <= place) & batch["mask"][row]
        words = set(batch["tokens"][row][seen & (batch["image_pos"][row] < 0)].tolist())
        assert set(np.flatnonzero(of_words.max(1)).tolist()) == words
        patches = batch["image_pos"][row][seen & (batch["image_pos"][row] >= 0)]
        images = {(row, int(k)) for k in patches // per_image}
        touched = np.argwhere(of_images.max((2, 3, 4)) > 0)
        assert {tuple(pair) for pair in touched.tolist()} == images
        assert not images or min(of_images[i].max() for i in images) > 1e-4


def test_padding_does_not_count_in_the_load_balancing_loss() -> None:
    """Unless the official count is asked for."""
    cfg = small_models.config("stablelm", MoeConfig(experts=3, placement="dense"), layers=2)
    p = small_models.params(cfg)

    @functools.partial(jax.jit, static_argnums=2)
    def loss(p: Any, batch: Any, official: bool) -> Any:
        return medmoe.forward(p, cfg, batch, official_aux=official)[1]["aux"]

    aux = functools.partial(loss, p)
    short, long = (on_device(small_models.batch(cfg, (1, 0), length=n)) for n in (12, 20))
    np.testing.assert_allclose(aux(short, False), aux(long, False), rtol=1e-5)
    assert np.abs(aux(short, True) - aux(long, True)).min() > 1e-3


def test_noise_is_only_there_with_a_key() -> None:
    cfg = MODELS["phi"]
    p, batch = small_models.params(cfg), on_device(small_models.batch(cfg, (1, 0)))
    one, same, other = (logits(p, cfg, batch, key=jax.random.key(k)) for k in (0, 0, 1))
    assert (one == same).all() and not np.allclose(one, other, atol=0.1)


def test_bfloat16() -> None:
    """Half precision runs from end to end and stays near; logits and routing are float32."""
    cfg = MODELS["stablelm"]
    p, batch = small_models.params(cfg), on_device(small_models.batch(cfg, IMAGES))
    half = functools.partial(medmoe.forward, cfg=cfg, dtype=jnp.bfloat16)
    hidden, reports = jax.eval_shape(half, p, batch=batch)
    assert hidden.dtype == jnp.bfloat16 and reports["router_logits"].dtype == jnp.float32
    got = np.asarray(logits(p, cfg, batch, dtype=jnp.bfloat16))
    want = np.asarray(logits(p, cfg, batch))
    assert got.dtype == np.float32
    valid = batch["mask"]
    assert np.median(np.abs(got - want)[valid]) < 0.05 * want[valid].std()


def test_rematerialisation_changes_nothing() -> None:
    cfg = small_models.config("stablelm", MoeConfig(2), layers=2)
    batch = small_models.batch(cfg, (0, 0), text=40)
    arrays = {k: batch[k] for k in ("tokens", "image_pos", "mask")}
    p = small_models.params(cfg)

    def loss(free: Any, remat: str) -> Any:
        whole = {"llm": p["llm"] | free}
        hidden, _ = medmoe.forward(whole, cfg, arrays, remat=remat)
        rows, _ = losses.answer_loss(hidden, lambda h: medmoe.logits(whole, h), batch["labels"])
        return rows.sum()

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    free = {k: p["llm"][k] for k in ("layers", "mlp", "moe")}
    value, gradient = run(free, "none")
    for policy in ("dots", "experts", "full"):
        other, gradients = run(free, policy)
        np.testing.assert_allclose(other, value, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients, gradient)
    lowered = [
        str(jax.make_jaxpr(run, static_argnums=1)(free, n)) for n in ("none", "dots", "full")
    ]
    assert ["remat" in text or "checkpoint" in text for text in lowered] == [False, True, True]
    with pytest.raises(
        ValueError, match="remat 'some' is unknown; use 'none', 'dots', 'experts', 'attention' or"
    ):
        layers.remat(lambda x: x, "some")


def test_groups_cover_every_placement() -> None:
    """All placements of up to nine layers: each layer once, in order, of the right kind."""
    for n in range(1, 10):
        for is_moe in itertools.product((False, True), repeat=n):
            kinds: list[bool] = []
            for start, period, repeats in decoder.groups(is_moe):
                assert start == len(kinds)
                kinds += list(is_moe[start : start + period]) * repeats
            assert tuple(kinds) == is_moe
    assert decoder.groups((True, False) * 16) == [(0, 2, 16)]
    assert decoder.groups((False,) * 32) == [(0, 1, 32)]
    assert decoder.groups((False,) * 4 + (True,) * 4) == [(0, 1, 4), (4, 1, 4)]


def test_clip_selects_a_layer() -> None:
    """Layers above the selected one and the last norm have no influence; pixels may be bytes."""
    p = small_models.params(MODELS["phi"])["vision"]
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    features = jax.jit(clip.features, static_argnums=(1, 3))
    for select, used in ((-2, 1), (0, 0), (-1, 2)):
        cfg = small_models.config(select_layer=select).vision
        assert cfg.layers_run == used
        stacked = jax.tree.map(
            lambda a, n=used: np.concatenate([a[:n], a[n:] * np.nan]), p["layers"]
        )
        broken = p | {
            "layers": stacked,
            "post_ln": jax.tree.map(lambda a: a * np.nan, p["post_ln"]),
        }
        want = np.asarray(features(p, cfg, pixels))
        assert want.shape == (2, 4, 8) and (np.asarray(features(broken, cfg, pixels)) == want).all()
    mean, std = (np.array(v, np.float32) for v in (cfg.mean, cfg.std))
    normalised = (pixels.astype(np.float32) / 255 - mean) / std
    np.testing.assert_allclose(features(p, cfg, normalised), want, atol=1e-5)
    with pytest.raises(AssertionError, match="shape"):
        clip.features(p, cfg, pixels[:, :4])


def test_grouped_attention() -> None:
    """Four query heads share two key heads; against the formula."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 5, heads, 3)).astype(np.float32) for heads in (4, 2, 2))
    segments = np.array([[1, 1, 2, 2, 0], [1, 1, 1, 0, 0]], np.int32)
    seen = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 1, 1]])  # padding sees the sample before it
    got = np.asarray(jax.jit(attention.attend_causal)(q, k, v, segments))
    for b, t, n in itertools.product(range(2), range(5), range(4)):
        here = [s for s in range(t + 1) if segments[b, s] == seen[b, t]]
        weights = np.exp(k[b, here, n // 2] @ q[b, t, n] / np.sqrt(3))
        want = weights @ v[b, here, n // 2] / weights.sum()
        np.testing.assert_allclose(got[b, t, n], want, atol=1e-5)


def test_rotary_embedding() -> None:
    """Products depend on the distance alone; place 0 and the unrotated part stay as they are."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 8)), jnp.float32) for _ in range(2))

    @jax.jit
    def product(a: int, b: int) -> Any:
        turned = [layers.rope(x, jnp.full((1, 1), at), 6, 100.0) for x, at in ((q, a), (k, b))]
        return (turned[0] * turned[1]).sum()

    np.testing.assert_allclose(product(5, 2), product(23, 20), atol=1e-5)
    assert abs(product(5, 2) - product(5, 3)) > 1e-3
    rope = jax.jit(layers.rope, static_argnums=(2, 3))
    turned = rope(q, jnp.full((1, 1), 3), 6, 100.0)
    assert (turned[..., 6:] == q[..., 6:]).all() and not (turned[..., :6] == q[..., :6]).any()
    assert (rope(q, jnp.zeros((1, 1), int), 6, 100.0) == q).all()
    angle = 3 * 100.0 ** (-np.arange(3) / 3)
    want = q[0, 0, 0, :3] * np.cos(angle) - q[0, 0, 0, 3:6] * np.sin(angle)
    np.testing.assert_allclose(turned[0, 0, 0, :3], want, atol=1e-6)
