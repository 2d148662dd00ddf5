"""Weights on disk with adapters in them: W + scale A B, added up of the part that is read."""

from __future__ import annotations

from typing import Any

import numpy as np

from medmoe_jax.stored import Stored


class Merged(Stored):
    """A kernel on disk and the adapter beside it, in the dtype of the kernel.

    Indexed as `Stored` is, but along the two axes of the matrix by slices alone.
    """

    def __init__(
        self, kernel: Stored, a: np.ndarray, b: np.ndarray, scale: float, factor: Any = None
    ) -> None:
        """Args:
        kernel: [*stack, d_in, d_out].
        a: f32[*stack, d_in, r].
        b: f32[*stack, r, d_out].
        scale: of their product.
        factor: what the sum is multiplied by; None: nothing.
        """
        super().__init__(kernel._path, kernel._store, factor)
        self._kernel, self._a, self._b, self._scale = kernel, a, b, scale

    def __getitem__(self, index: Any) -> Merged:
        parts = index if isinstance(index, tuple) else (index,)
        *stack, rows, columns = (*parts, *(slice(None),) * (self.ndim - len(parts)))
        assert isinstance(rows, slice) and isinstance(columns, slice), index
        a, b = self._a[(*stack, rows)], self._b[(*stack, slice(None), columns)]
        return Merged(self._kernel[index], a, b, self._scale, self._factor)

    def __mul__(self, factor: Any) -> Merged:
        return Merged(self._kernel, self._a, self._b, self._scale, self._times(factor))

    def repeated(self, times: int) -> Merged:
        """As in `Stored`."""

        def more(array: np.ndarray) -> np.ndarray:
            return np.broadcast_to(array[:, None], (len(array), times, *array.shape[1:]))

        return Merged(
            self._kernel.repeated(times), more(self._a), more(self._b), self._scale, self._factor
        )

    def _read(self) -> np.ndarray:
        """The sums, matrix by matrix in float32, rounded to the kernel's dtype."""
        found = np.asarray(self._kernel)
        for at in np.ndindex(*self.shape[:-2]):
            product = np.float32(self._scale) * (self._a[at] @ self._b[at])
            found[at] = (found[at].astype(np.float32) + product).astype(self.dtype)
        return found
