"""How lanes go down together: neither groups nor segments may change a reading, and segments bound the memory."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vgrad
from vgrad import lanes, layers, losses
from vgrad.profile import read, to_profile
from vgrad.scaled import lift

pytestmark = pytest.mark.xdist_group("lanes")  # its fixtures are costly: one process for all

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(6, 4))
LABELS = np.arange(6) % 3


def draw(net, depth):
    return jax.jit(net.init, static_argnums=1)(KEY, depth)


def readings(net, params, depths, segment):
    batch = X.astype(params.embed.w.dtype), LABELS
    return jax.jit(lambda p: read(net, p, batch, loss=losses.cross_entropy, depths=np.asarray(depths), segment=segment))(params)


@pytest.mark.parametrize("hidden", [layers.residual, layers.layernorm_dense])
def test_segments_change_no_reading(x64, hidden):
    """4 does not divide the 9 hidden layers; 20 is more than there are, and the same as all."""
    net = vgrad.mlp(8, "tanh", 4, 3, sigma_w=1.3, hidden=hidden)
    params = draw(net, 11)
    in_segments, whole = (readings(net, params, [2, 3, 6, 7, 11], segment) for segment in (4, 20))
    for ours, theirs in zip(in_segments, whole, strict=True):
        log = [0.5 * jnp.log(n.sumsq) + n.exponent * np.log(2) for n in (ours, theirs)]
        np.testing.assert_allclose(*log, rtol=1e-10, atol=1e-10)


def test_groups_of_any_size_change_no_reading(monkeypatch):
    net = vgrad.mlp(8, "relu", 4, 3, sigma_w=1.4)
    params, depths = draw(net, 9), [2, 3, 5, 8, 9]
    module, seen = importlib.import_module("vgrad.profile"), []
    for size in (1, 2, 5):
        monkeypatch.setattr(module, "group_size", lambda entries, lane, size=size: size)
        seen.append(to_profile(jax.device_get(readings(net, params, depths, None)), depths))
    for other in seen[1:]:
        for ours, theirs in zip(other, seen[0], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_groups_are_small_where_depths_lie_far_apart_or_lanes_are_large():
    dense, sparse = np.arange(64), np.array([0, 2, 6, 14, 30, 62, 1022])
    assert lanes.group_size(sparse, 2**13) < lanes.group_size(dense, 2**13) <= 4
    assert lanes.group_size(dense, 2**18) == 2  # however wide, two share a layer's weights
    assert lanes.group_size(np.array([0]), 2**10) == 1


def test_segments_bound_the_memory_of_a_deep_network():
    """What is kept grows as the square root of the depth. Width 512 at a batch of 64."""
    net = vgrad.mlp(512, "tanh", 4, 3)
    params = jax.eval_shape(lambda: net.init(KEY, 10_000))
    z = jax.eval_shape(lambda: lift(jnp.zeros((64, 512))))
    assert lanes.segment_length(net.block, params.hidden, z) == 100
    fewer = jax.tree.map(lambda p: jax.ShapeDtypeStruct((98, *p.shape[1:]), p.dtype), params.hidden)
    assert lanes.segment_length(net.block, fewer, z) == 98

    def temporary(depth, segment):
        params = jax.eval_shape(lambda: net.init(KEY, depth))  # nothing is drawn and nothing run: the compiler knows
        x = jax.ShapeDtypeStruct((64, 4), jnp.float32)
        run = jax.jit(lambda p, x: read(
            net, p, (x, jnp.zeros((64, 3))), loss=losses.squared_error, depths=np.array([depth]), segment=segment
        ))  # fmt: skip
        return run.lower(params, x).compile().memory_analysis().temp_size_in_bytes

    kept = 1000 * 64 * 512 * 4  # of the slopes alone
    assert temporary(1000, 32) < 0.2 * kept < kept < temporary(1000, 998)
