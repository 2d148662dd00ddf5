"""The tiled form of the expert sum against the obvious one, with every product, and its layout."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models

from medmoe_jax.models import buckets, experts, layers, products, tiles

pytestmark = pytest.mark.usefixtures("quick_compile")

WIDTH, FFN = 128, 144  # a width in whole blocks, and one that ends in a part of a TPU's block
# What separate experts write ends with a whole block: JAX 0.11 and 0.12 cannot interpret a part of
# one in memory that several kernels write.
WHOLE = 256
TPU, GPU = (partial(product, interpret=True) for product in (products.tpu, products.gpu))


# Around a tile of 128 rows; one expert, as on a device that holds one of many.
@pytest.mark.parametrize(
    ("product", "family", "tokens", "n_experts", "top_k"),
    [
        (products.plain, "phi", 70, 4, 1),
        (products.plain, "stablelm", 129, 3, 2),
        (buckets.cpu, "phi", 129, 3, 2),
        (buckets.cpu, "stablelm", 300, 4, 1),
        (TPU, "phi", 128, 1, 1),
        (TPU, "phi", 129, 3, 2),
        (GPU, "phi", 129, 3, 2),
        pytest.param(GPU, "stablelm", 300, 4, 1, marks=pytest.mark.slow),
        pytest.param(TPU, "stablelm", 300, 4, 1, marks=pytest.mark.slow),
    ],
)
def test_tiled_is_the_obvious_sum(
    product: Any, family: str, tokens: int, n_experts: int, top_k: int
) -> None:
    p = small_models.fill(layers.mlp_leaves(family, WIDTH, FFN, (n_experts,)))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, tokens, WIDTH)), jnp.float32)
    weight = jnp.asarray(rng.uniform(0.1, 1, (1, tokens, top_k)), jnp.float32)

    def gradient(form: Any) -> Any:
        def total(p: Any, x: Any, weight: Any, choice: Any) -> Any:
            y = form(p, x, choice, weight, n_experts)
            return (y * jnp.sin(jnp.arange(y.size)).reshape(y.shape)).sum(), y

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))

    slow = gradient(experts.reference)
    tile = 1 if product is buckets.cpu else 0
    fast = gradient(partial(tiles.tiled, product=product, tile=tile))
    for kind in ("mixed", "one", "none"):
        found = p, x, weight, small_models.choices(kind, tokens, n_experts, top_k)
        (_, want), want_gradient = slow(*found)
        (_, have), have_gradient = fast(*found)
        np.testing.assert_allclose(have, want, atol=1e-5, rtol=1e-5, err_msg=kind)
        for a, b in zip(*map(jax.tree.leaves, (have_gradient, want_gradient)), strict=True):
            scale = max(1.0, np.abs(b).max())
            np.testing.assert_allclose(a / scale, b / scale, atol=1e-5, err_msg=kind)
        if kind == "one":  # nobody chose the first experts
            for leaf in jax.tree.leaves(have_gradient[0]):
                assert not np.any(leaf[: n_experts - top_k])


@pytest.mark.parametrize(
    ("product", "family", "dtype"),
    [
        (TPU, "phi", "float32"),
        (GPU, "phi", "float32"),
        (products.plain, "stablelm", "float32"),
        pytest.param(TPU, "stablelm", "bfloat16", marks=pytest.mark.slow),
        pytest.param(GPU, "stablelm", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_separate_experts_are_read_where_they_lie(product: Any, family: str, dtype: str) -> None:
    """As in generation: the sum is the obvious one, and no expert's kernel is copied."""
    n_experts, tokens, top_k = 2, 140, 1
    p = small_models.fill(layers.mlp_leaves(family, WIDTH, WHOLE, (n_experts,)))
    p = jax.tree.map(lambda a: a.astype(dtype), p)
    each = experts.separate(p, n_experts, 1)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, tokens, WIDTH)), dtype)
    weight = jnp.asarray(rng.uniform(0.1, 1, (1, tokens, top_k)), jnp.float32)

    def form(each: Any, x: Any, choice: Any) -> Any:
        return experts._tiled(each, x, choice, weight, n_experts, product)

    fast, exact = jax.jit(form), jax.tree.map(lambda a: a.astype(jnp.float32), p)
    for kind in ("mixed", "one", "none"):
        choice = small_models.choices(kind, tokens, n_experts, top_k)
        want = experts.reference(exact, x.astype(jnp.float32), choice, weight, n_experts)
        tolerance = 1e-5 if dtype == "float32" else 0.02 * np.abs(want).max()
        have = fast(each, x, choice).astype(jnp.float32)
        np.testing.assert_allclose(have, want, atol=tolerance, rtol=1e-5, err_msg=kind)
    if product is not products.plain:
        text = str(jax.make_jaxpr(form)(each, x, choice))
        assert f"[{n_experts},{WIDTH},{WHOLE}]" not in text and f"[{WIDTH},{WHOLE}]" in text


@pytest.mark.parametrize("product", [TPU, GPU, products.plain])
def test_separate_experts_have_derivatives(product: Any) -> None:
    """As `analyse` takes them, by the tokens and by the weights."""
    n_experts, tokens = 2, 140
    p = small_models.fill(layers.mlp_leaves("phi", WIDTH, WHOLE, (n_experts,)))
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((1, tokens, WIDTH)), jnp.float32)
    choice, weight = (
        small_models.choices("mixed", tokens, n_experts, 1),
        jnp.full((1, tokens, 1), 0.7),
    )

    def gradient(form: Any, p: Any) -> Any:
        def total(p: Any, x: Any) -> Any:
            y = form(p, x, choice, weight, n_experts)
            return (y * jnp.sin(jnp.arange(y.size)).reshape(y.shape)).sum()

        return jax.jit(jax.grad(total, (0, 1)))(p, x)

    want, want_x = gradient(experts.reference, p)
    fast = partial(experts._tiled, product=product)
    have, have_x = gradient(fast, experts.separate(p, n_experts, 1))
    np.testing.assert_allclose(have_x, want_x, atol=1e-5)
    for e, found in enumerate(have):
        for a, b in zip(*map(jax.tree.leaves, (found, experts.expert(want, e))), strict=True):
            scale = max(1.0, np.abs(b).max())
            np.testing.assert_allclose(a / scale, b / scale, atol=1e-5)


def test_in_a_scan_that_recomputes_and_in_half_precision() -> None:
    """As in the decoder of a large model."""
    stack, n_experts, tokens = 2, 2, 140
    p = small_models.fill(layers.mlp_leaves("phi", WIDTH, FFN, (stack, n_experts)))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, tokens, WIDTH)), jnp.float32)
    choice, weight = (
        small_models.choices("mixed", tokens, n_experts, 1),
        jnp.full((1, tokens, 1), 0.7),
    )

    def run(form: Any, dtype: Any) -> Any:
        def total(p: Any) -> Any:
            def layer(x: Any, p: Any) -> Any:
                return x + form(p, x, choice, weight, n_experts), None

            y, _ = jax.lax.scan(layers.remat(layer, "full"), x.astype(dtype), p)
            assert y.dtype == dtype
            return jnp.sin(y.astype(jnp.float32)).sum()

        return jax.jit(jax.value_and_grad(total))(p)

    form = partial(tiles.tiled, product=TPU)
    want = run(experts.reference, jnp.float32)
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.05)):
        have = run(form, dtype)
        for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
            scale = max(1.0, np.abs(b).max())
            np.testing.assert_allclose(a / scale, b / scale, atol=tolerance)


@pytest.mark.parametrize("family", ["phi", "stablelm"])
def test_the_form_that_saves_memory(family: str) -> None:
    """That of 16 bits has the gradients of the obvious sum, by the weights of the choice too."""
    n_experts, tokens, top_k = 3, 140, 2
    p = small_models.fill(layers.mlp_leaves(family, WIDTH, FFN, (n_experts,)))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, tokens, WIDTH)), jnp.float32)
    choice = small_models.choices("mixed", tokens, n_experts, top_k)
    weight = jnp.asarray(rng.uniform(0.1, 1, choice.shape), jnp.float32)

    def gradient(form: Any, dtype: Any) -> Any:
        def total(p: Any, x: Any, weight: Any) -> Any:
            y = form(p, x.astype(dtype), choice, weight, n_experts).astype(jnp.float32)
            return (y * jnp.sin(jnp.arange(y.size)).reshape(y.shape)).sum()

        return jax.jit(jax.grad(total, (0, 1, 2)))(p, x, weight)

    want = gradient(experts.reference, jnp.float32)
    have = gradient(partial(tiles.tiled, product=products.plain), jnp.bfloat16)
    for a, b in zip(*map(jax.tree.leaves, (have, want)), strict=True):
        np.testing.assert_allclose(a / np.abs(b).max(), b / np.abs(b).max(), atol=0.02)


@pytest.mark.parametrize("arguments", [1, 2])
def test_thrifty_derivatives(arguments: int) -> None:
    rng = np.random.default_rng(0)
    share = jnp.asarray(rng.uniform(0.1, 1, (6, 1)), jnp.float32)
    before = [jnp.asarray(rng.standard_normal((6, 20)), jnp.float32) for _ in range(arguments)]

    def gradient(form: Any) -> Any:
        return jax.grad(lambda *a: jnp.sin(form(*a)).sum(), tuple(range(1 + arguments)))

    have, want = (gradient(f)(share, *before) for f in (tiles._thrifty_hidden, tiles._hidden))
    for a, b in zip(have, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("counts", [(0, 5, 0), (4, 4, 4), (1, 0, 11), (0, 0, 0), (12, 0, 0)])
def test_layout(counts: tuple[int, ...]) -> None:
    """Every pair has a row of its own among those of its expert, which begin at a tile."""
    pairs, tile = 12, 4
    rest = pairs - sum(counts)
    choice = np.repeat(np.arange(4, dtype=np.int32), (*counts, rest))
    choice = np.random.default_rng(0).permutation(choice)
    where = jax.tree.map(np.asarray, tiles.layout(jnp.asarray(choice), 3, tile))
    assert len(where.source) % tile == 0
    assert where.sizes.tolist() == [-(-count // tile) * tile for count in counts]
    ends = np.cumsum(where.sizes)
    for pair, (row, e) in enumerate(zip(where.place, choice, strict=True)):
        if e == 3:
            assert row == len(where.source)
        else:
            assert ends[e] - where.sizes[e] <= row < ends[e] and where.source[row] == pair
    assert (where.source == pairs).sum() == len(where.source) - sum(counts)


def test_tiles_shrink_with_the_number_of_tokens() -> None:
    """So that what they are padded with stays a small share."""
    assert tiles.tile_rows(8192, 1) == 512
    assert tiles.tile_rows(4096, 4) == 256
    assert tiles.tile_rows(65, 4) == 128
    for pairs in (4096, 5000, 16384):
        assert 4 * tiles.tile_rows(pairs, 4) <= tiles.WASTE * pairs
