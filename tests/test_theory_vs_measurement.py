"""What `predict` says of every layer against what `sweep` measures: every activation, three initializers, three points each.

One compiled sweep serves for all: activation, initializer and loss are chosen by number. The tolerance of each reading is 4 standard
errors of the seeds plus a term for the finite width N, written where it is used.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vgrad
from vgrad import activations, fit, initializers, losses
from vgrad.meanfield import predict

WIDTH, DEPTH, SEEDS, IN_DIM, OUT_DIM = 64, 10, 12, 20, 4
PHIS = list(activations.REGISTRY)
WEIGHTS = ["normal", "orthogonal", "positive_uniform"]
X = np.random.default_rng(0).uniform(0.2, 1.5, (3, IN_DIM)) * np.array([[1.0], [1.0], [0.6]])
X = np.float32(X * np.array([1, 1, -1, 1] * 5))  # samples of different lengths that are neither parallel nor orthogonal
LABELS, TARGETS = np.array([0, 1, 0]), np.float32(np.random.default_rng(1).standard_normal((3, OUT_DIM)))


def loss(y, t):
    labels, targets, which = t
    return jnp.where(which == 0, losses.cross_entropy(y, labels), losses.squared_error(y, targets))


def choose(options, number, *args):
    return jax.lax.switch(jnp.asarray(number).astype(jnp.int32), options, *args)


@jax.jit  # traced once for each shape
def phi_by_number(number, z):
    return choose([a.phi for a in activations.REGISTRY.values()], number, z)


def by_number(number):
    return partial(phi_by_number, number)


def family(point):
    draws = [initializers.get(name) for name in WEIGHTS]
    draw = lambda key, *a: choose([lambda k, d=d: d(k, *a) for d in draws], point["weights"], key)  # noqa: E731
    options = dict(sigma_w=point["sigma_w"], sigma_b=point["sigma_b"], weights=draw)
    return vgrad.mlp(WIDTH, by_number(point["phi"]), IN_DIM, OUT_DIM, **options)


def critical(phi):
    """sigma_w that keeps the gradient at q = 1, on a plain grid."""
    g = np.linspace(-8, 8, 2001, dtype=np.float32)
    slope = jax.vmap(jax.grad(activations.get(phi)))(jnp.asarray(g))
    return float(np.sum(np.square(slope) * np.exp(-(g**2) / 2)) * (g[1] - g[0]) / np.sqrt(2 * np.pi)) ** -0.5


# Below, at and above the point where gradients are kept; the recipe of the tutorials has no such point.
FACTORS = {"ordered": 0.75, "critical": 1.0, "chaotic": 1.4}
CASES = [
    {"phi": PHIS.index(phi), "weights": WEIGHTS.index(weights), "sigma_w": factor * base, "sigma_b": 0.1}
    for phi, base in ((phi, critical(phi)) for phi in PHIS)
    for weights in WEIGHTS
    for factor in (FACTORS.values() if weights != "positive_uniform" else (0.5 / base, 1.0 / base, 2**0.5 / base))
]


def measure(which, cases):
    swept = vgrad.sweep(
        family, cases, key=jax.random.key(0), num_seeds=SEEDS, depths=[DEPTH], loss=loss,
        batch=(X, (LABELS, TARGETS, np.int32(which))),
    )  # fmt: skip
    return [[np.asarray(f[i, :, 0]) for f in swept[:4]] for i in range(len(cases))]


@partial(jax.jit, static_argnums=(0, 1))
def theory(weights, which, phi, sigma_w, sigma_b):
    act = activations.facts("tanh")._replace(phi=by_number(phi), breakpoints=(-1.0, 0.0, 1.0))
    how = dict(width=WIDTH, depth=DEPTH, out_dim=OUT_DIM, sigma_w=sigma_w, sigma_b=sigma_b, weights=weights)
    t, loss = [(LABELS, "cross_entropy"), (TARGETS, "squared_error")][which]
    return predict(act, (X, t), **how, loss=loss)


def predictions(which, cases):
    return [jax.device_get(theory(WEIGHTS[c["weights"]], which, c["phi"], c["sigma_w"], c["sigma_b"])) for c in cases]
