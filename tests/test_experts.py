"""The forms of the expert sum against the obvious one: values, gradients, sizes, programs."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models

from medmoe_jax.models import buckets, experts, grouped, layers, tiles

pytestmark = pytest.mark.usefixtures("quick_compile")

WIDTH, FFN = 8, 12


def parameters(n_experts: int, family: str = "phi") -> Any:
    leaves = layers.mlp_leaves(family, WIDTH, FFN, (n_experts,))
    return small_models.fill(leaves, seed=n_experts)


def inputs(tokens: int, n_experts: int, top_k: int, kind: str) -> tuple[Any, Any, Any]:
    """x f32[B, T, D], choice i32[B, T, K] and weight f32[B, T, K] of `tokens` tokens."""
    rng = np.random.default_rng(tokens)
    rows = 3 if tokens % 3 == 0 else 1
    shape = (rows, tokens // rows)
    if kind == "one":
        choice = np.tile(np.arange(top_k) + n_experts - top_k, (*shape, 1))
    else:
        order = rng.permuted(np.tile(np.arange(n_experts), (*shape, 1)), axis=-1)
        choice = order[..., :top_k]
    weight = rng.uniform(0.1, 1, (*shape, top_k)).astype(np.float32)
    x = rng.standard_normal((*shape, WIDTH)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(choice, jnp.int32), jnp.asarray(weight)


def value_and_gradient(form: Any, n_experts: int) -> Any:
    """A jitted function of parameters and inputs: the sum's output and the gradient of a random
    weighting of it in parameters, x and weight."""

    def total(p: Any, x: Any, weight: Any, choice: Any) -> Any:
        y = form(p, x, choice, weight, n_experts)
        slopes = jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        return (y * slopes).sum(), y

    fast = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))

    def run(p: Any, x: Any, choice: Any, weight: Any) -> Any:
        (_, y), gradient = fast(p, x, weight, choice)
        return y, gradient

    return run


# On and around the sizes at which the buckets change: FEW pairs and multiples of BUCKET.
@pytest.mark.parametrize(
    ("tokens", "n_experts", "top_k", "family"),
    [
        (1, 4, 1, "phi"),
        (1, 3, 2, "stablelm"),
        (63, 4, 1, "stablelm"),
        (64, 3, 1, "phi"),
        (65, 3, 1, "phi"),
        (32, 3, 2, "phi"),
        (33, 2, 2, "stablelm"),
        (128, 2, 1, "phi"),
        (99, 2, 2, "phi"),
    ],
)
def test_grouped_is_the_obvious_sum(tokens: int, n_experts: int, top_k: int, family: str) -> None:
    p = parameters(n_experts, family)
    slow = value_and_gradient(experts.reference, n_experts)
    fast = value_and_gradient(experts.grouped, n_experts)
    for kind in ("mixed", "one"):
        found = inputs(tokens, n_experts, top_k, kind)
        want, have = slow(p, *found), fast(p, *found)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), have, want
        )
    for leaf in jax.tree.leaves(have[1][0]):  # nobody chose the first experts
        assert not np.any(leaf[: n_experts - top_k]) and np.any(leaf[n_experts - top_k :])


def test_a_tuple_of_experts_is_the_stack() -> None:
    p = parameters(4)
    each = tuple(experts.expert(p, e) for e in range(4))
    found = inputs(20, 4, 2, "mixed")
    slow, fast = (value_and_gradient(f, 4) for f in (experts.reference, experts.grouped))
    want, stacked = slow(p, *found)
    for y, gradient in (slow(each, *found), fast(each, *found)):
        np.testing.assert_allclose(y, want, atol=1e-5)
        together = jax.tree.map(lambda *a: np.stack(a), *gradient[0])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), together, stacked[0])


@pytest.mark.parametrize("pairs", [1, 2, 63, 64, 65, 127, 128, 129, 511, 512, 513, 4096, 5001])
@pytest.mark.parametrize("n_experts", [1, 2, 4, 8])
def test_sizes(pairs: int, n_experts: int) -> None:
    """They rise from nothing to all, few of them; those near the mean group waste little."""
    sizes = grouped.group_sizes(pairs, n_experts)
    assert sizes[0] == 0 and sizes[-1] == pairs and sizes == sorted(set(sizes))
    assert len(sizes) <= grouped.BUCKETS + 4
    if pairs <= grouped.FEW:
        assert len(sizes) == 2
    else:
        mean = pairs / n_experts
        fine = [s for s in sizes if s <= grouped.LIKELY * mean]
        assert max(np.diff(fine), default=0) <= max(grouped.BUCKET, mean / 4 + 1)
        assert fine[-1] >= mean or sizes[1] == grouped.BUCKET


def test_counts_on_every_border() -> None:
    """An expert that gets exactly as many tokens as a size holds, one fewer and one more."""
    tokens, p = 192, parameters(2)
    sizes = grouped.group_sizes(tokens, 2)
    assert len(sizes) == 7
    x, _, weight = inputs(tokens, 2, 1, "mixed")
    training = partial(tiles.tiled, product=buckets.cpu, tile=1)
    slow, *fast = (
        jax.jit(f, static_argnums=4) for f in (experts.reference, experts.grouped, training)
    )
    for count in sorted({s + d for s in sizes for d in (-1, 0, 1)} & set(range(tokens + 1))):
        rng = np.random.default_rng(count)
        choice = rng.permutation(np.arange(tokens) >= count).astype(np.int32)
        choice = jnp.asarray(choice.reshape(*x.shape[:2], 1))
        assert int((choice == 0).sum()) == count
        want = slow(p, x, choice, weight, 2)
        for form in fast:
            np.testing.assert_allclose(form(p, x, choice, weight, 2), want, atol=1e-5)


def test_one_program_whatever_is_chosen() -> None:
    traces = []
    p = parameters(3)

    @jax.jit
    def counted(x: Any, choice: Any, weight: Any) -> Any:
        traces.append(1)
        return experts.mixture(p, x, choice, weight, 3)

    for kind in ("mixed", "one", "mixed"):
        found = inputs(96, 3, 2, kind)
        want = experts.reference(p, *found, 3)
        np.testing.assert_allclose(counted(*found), want, atol=1e-5)
    assert len(traces) == 1


@pytest.mark.parametrize("n_experts", [1, 2, 3])
def test_all_chosen_are_not_sorted(n_experts: int) -> None:
    p, found = parameters(n_experts), inputs(96, n_experts, n_experts, "mixed")
    mixture, sorting = (
        value_and_gradient(form, n_experts) for form in (experts.mixture, experts.grouped)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5),
        mixture(p, *found),
        sorting(p, *found),
    )
    ways = jax.make_jaxpr(lambda *a: experts.mixture(p, *a, n_experts))(*found)
    assert "sort" not in str(ways)


def test_half_precision_stays() -> None:
    p = parameters(2)
    x, choice, weight = inputs(6, 2, 1, "mixed")
    got = jax.jit(experts.grouped, static_argnums=4)(p, x.astype(jnp.bfloat16), choice, weight, 2)
    assert got.dtype == jnp.bfloat16
    want = experts.reference(p, x, choice, weight, 2)
    np.testing.assert_allclose(got.astype(np.float32), want, atol=0.1, rtol=0.05)
