"""The grouped product of a CPU against one product after the other, and the sizes of its pieces."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.models import buckets, grouped

pytestmark = pytest.mark.usefixtures("quick_compile")

K, N = 5, 7


@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, 65, 128, 257, 768, 5001])
@pytest.mark.parametrize("n_experts", [1, 2, 4, 9, 64])
def test_sizes(rows: int, n_experts: int) -> None:
    """They are multiples of the first, up to all rows or to a likely group."""
    sizes = buckets.piece_sizes(rows, n_experts)
    assert sizes == [sizes[0] * i for i in range(1, len(sizes) + 1)]
    assert len(sizes) <= grouped.BUCKETS
    assert sizes[-1] >= min(rows, grouped.LIKELY * rows / n_experts)
    assert sizes[0] <= max(grouped.BUCKET, rows / n_experts / 4 + 1)


def test_products_of_all_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and derivatives; groups that are empty, that end on a border of a size and around it,
    that take several pieces or all rows; rows of nobody behind them."""
    monkeypatch.setattr(grouped, "BUCKET", 4)
    monkeypatch.setattr(grouped, "BUCKETS", 2)
    rows, n_experts = 40, 5
    assert buckets.piece_sizes(rows, n_experts) == [8, 16]
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((rows, K)), rng.standard_normal((rows, N))
    kernels = rng.standard_normal((n_experts, K, N))

    @jax.jit
    def fast(x: Any, kernels: Any, counts: Any, dy: Any) -> Any:
        y, pull = jax.vjp(lambda x, w: buckets.cpu(x, w, counts, tile=1), x, kernels)
        return y, *pull(dy)

    given = [jnp.asarray(a, jnp.float32) for a in (x, kernels, dy)]
    for counts in (
        *((0, 0, 0, 0, 0), (0, 0, 40, 0, 0), (40, 0, 0, 0, 0), (1, 1, 1, 1, 1), (8, 8, 8, 8, 8)),
        *(
            (7, 9, 15, 1, 8),
            (0, 17, 0, 0, 23),
            (0, 33, 7, 0, 0),
            (16, 0, 16, 0, 8),
            (2, 32, 0, 5, 0),
        ),
    ):
        y, dx, dw = (np.zeros(a.shape) for a in (dy, x, kernels))
        for e, end in enumerate(np.cumsum(counts)):
            mine = slice(end - counts[e], end)
            y[mine], dx[mine] = x[mine] @ kernels[e], dy[mine] @ kernels[e].T
            dw[e] = x[mine].T @ dy[mine]
        have = fast(given[0], given[1], jnp.asarray(counts, jnp.int32), given[2])
        for a, b in zip(have, (y, dx, dw), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=str(counts))
