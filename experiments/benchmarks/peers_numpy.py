"""Nested depths by hand in NumPy: one forward pass a seed, then all depths as stacked lanes of one backward pass."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from workloads import Size, Weights


def nested(size: Size, weights: Weights):
    """Seeds one after the other; the products are as parallel as the BLAS makes them."""
    return lambda: np.stack([_log_norms(size, weights, s) for s in range(len(weights.w))])


def nested_threads(size: Size, weights: Weights):
    """A thread per core, each with seeds of its own: NumPy lets go of the interpreter in its loops. Wants a BLAS of one thread."""
    pool = ThreadPoolExecutor(int(os.environ["BENCH_CORES"]))
    return lambda: np.stack(list(pool.map(lambda s: _log_norms(size, weights, s), range(len(weights.w)))))


def _log_norms(size, weights, seed):
    x, t, w, b = weights.x, weights.t, weights.w[seed], weights.b[seed]
    (batch, width), depths, num_layers = x.shape, np.asarray(size.depths), len(w)
    out = np.full((len(depths), num_layers), np.nan, np.float32)

    h = np.empty((num_layers, batch, width), np.float32)  # h[l] is what layer l takes in, counted from 0
    h[0] = x
    for l in range(num_layers - 1):
        np.tanh(h[l] @ w[l] + b[l], out=h[l + 1])

    tops = h[depths - 1]  # what the readout of each depth takes in, [D, B, N]
    y = tops.reshape(-1, width) @ w[-1] + b[-1]
    delta = (y.reshape(tops.shape) - t) / np.float32(batch)
    for i, d in enumerate(depths):
        out[i, d - 1] = _norms(h[d - 1], delta[i : i + 1])[0]
    lanes = (delta.reshape(-1, width) @ w[-1].T).reshape(tops.shape) * (1 - tops**2)
    spare = np.empty_like(lanes)
    for l in range(num_layers - 2, -1, -1):
        first = np.searchsorted(depths, l + 2)  # the shallower networks have no layer l below their readout
        active = lanes[first:]
        out[first:, l] = _norms(h[l], active)
        if l:
            below = np.matmul(active.reshape(-1, width), w[l].T, out=spare[first:].reshape(-1, width))
            np.multiply(below.reshape(active.shape), 1 - h[l] ** 2, out=active)
    return np.log(out)


def _norms(h, lanes):
    """||h^T delta|| of each lane; by the Gram matrix of h where that is the smaller product."""
    if h.shape[0] < h.shape[1]:
        return np.sqrt(np.einsum("dbn,dbn->d", (h @ h.T) @ lanes, lanes))
    grad = h.T @ lanes
    return np.sqrt(np.einsum("dmn,dmn->d", grad, grad))


def product(a: np.ndarray, b: np.ndarray):
    """A function that multiplies them once."""
    return lambda: a @ b


def device() -> str:
    return "cpu"
