"""What is minimised: a different quadratic on each of m replicas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .inner import Array


@dataclass(frozen=True)
class Quadratics:
    """f_i(x) = 0.5 (x - b_i)ᵀ A_i (x - b_i) for replica i.

    ``a`` has the shape (m, d, d), symmetric with eigenvalues in [0.05, 1]; ``b`` (m, d).
    ``noise`` (steps, m), repeated, is added to the losses, as if by the samples of a batch: what
    is lowest changes from round to round, and differs between a round's mean and its last step.
    """

    a: Array
    b: Array
    x0: Array
    noise: Array

    @classmethod
    def make(cls, m: int, d: int, seed: int = 0) -> Quadratics:
        rng = np.random.default_rng(seed)
        orthogonal = np.linalg.qr(rng.normal(size=(m, d, d)))[0]
        eigenvalues = rng.uniform(0.05, 1.0, size=(m, 1, d))
        a = (orthogonal * eigenvalues) @ orthogonal.transpose(0, 2, 1)
        b, x0 = rng.normal(size=(m, d)), rng.normal(size=d)
        return cls(a, b, x0, 25 * rng.normal(size=(23, m)))

    def losses(self, x: Array, step: int) -> Array:
        e = x - self.b
        quadratic = 0.5 * np.einsum("mi,mij,mj->m", e, self.a, e)
        return quadratic + self.noise[step % len(self.noise)]

    def gradients(self, x: Array) -> Array:
        return np.einsum("mij,mj->mi", self.a, x - self.b)
