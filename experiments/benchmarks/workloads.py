"""What is measured: networks of many depths and seeds, the same ones for every peer.

    z_1 = x W_1 + b_1,    z_l = tanh(z_{l-1}) W_l + b_l,    J = sum((z_L - t)^2) / (2 B),

all widths N. The network of depth d is layers 1..d-1 of a seed and the seed's readout, as `vgrad.Network.init` draws them. Wanted
is ln ||dJ/dW_l|| for every seed, depth and layer, [S, D, L] with NaN past a network's last layer.
"""

from typing import NamedTuple

import numpy as np

__all__ = ["SIZES", "SIZES_QUICK", "Size", "Weights", "draw", "layers_of", "nested_flops"]

SIGMA_W, SIGMA_B = 1.5**0.5, 0.05**0.5


class Size(NamedTuple):
    """A workload: width N, batch B, the depths, the number of seeds S."""

    width: int
    batch: int
    depths: list[int]
    seeds: int


SIZES = {
    "small": Size(64, 32, [2, 4, 8, 16, 32, 64], 32),
    "medium": Size(128, 64, list(range(2, 66)), 16),  # 1..64 blocks below the readout
    "wide": Size(512, 128, [8, 16, 32, 64], 4),
}
# As wide, but of fewer depths and seeds: every code path in seconds, no figure that means anything.
SIZES_QUICK = {
    "small": Size(64, 32, [2, 4, 8], 4),
    "medium": Size(128, 64, list(range(2, 18, 3)), 4),
    "wide": Size(512, 128, [4, 8], 2),
}


class Weights(NamedTuple):
    """The networks of a workload and their data, float32.

    Attributes:
      x, t: input and target. Shape [B, N].
      w, b: weights and biases of layers 1..L-1 and, last, the readout. Shapes [S, L, N, N] and [S, L, N], L the largest depth.
    """

    x: np.ndarray
    t: np.ndarray
    w: np.ndarray
    b: np.ndarray


def draw(size: Size) -> Weights:
    """The networks that `vgrad.sweep` with key 0 draws too: `net.init(fold_in(key, seed), depth)`."""
    import jax

    import vgrad

    key = jax.random.key(0)
    net = vgrad.mlp(size.width, "tanh", size.width, size.width, sigma_w=SIGMA_W, sigma_b=SIGMA_B)
    init = jax.jit(lambda s: net.init(jax.random.fold_in(key, s), size.depths[-1]))
    drawn = [jax.device_get(init(s)) for s in range(size.seeds)]
    w, b = (np.stack([np.concatenate([p.embed[i][None], p.hidden[i], p.readout[i][None]]) for p in drawn]) for i in (0, 1))
    x, t = np.random.default_rng(0).standard_normal((2, size.batch, size.width), dtype=np.float32)
    return Weights(x, t, w, b)


def layers_of(depth: int) -> list[int]:
    """Which of the L layers make up the network of that depth."""
    return [*range(depth - 1), -1]


def nested_flops(size: Size) -> int:
    """Floating-point operations of the nested algorithm, products alone.

    Forward 2 B N^2 for each layer, once, and for each readout. Backward, for each layer of each depth, 2 B N^2 for W^T delta, but
    for the first layer, and the smaller of 2 B^2 N (Gram matrices) and 2 B N^2 (the gradient itself) for the norm of its gradient.
    """
    n, b = size.width, size.batch
    forward = (size.depths[-1] - 1 + len(size.depths)) * 2 * b * n * n
    layers, first = sum(size.depths), len(size.depths)
    backward = (layers - first) * 2 * b * n * n + layers * 2 * b * n * min(b, n)
    return size.seeds * (forward + backward)
