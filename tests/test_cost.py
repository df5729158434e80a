"""The cost model against what XLA counts and reserves, and against what must hold of it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgrad import cost, losses, mlp
from vgrad.profile import read

SHAPES = [
    cost.Shape((2, 3, 5, 9), width=96, batch=24, in_dim=40, out_dim=10),  # Gram matrices
    cost.Shape((12,), width=32, batch=96, in_dim=16, out_dim=4),  # a batch larger than the width
    cost.Shape((2, 40), width=64, batch=8, in_dim=16, out_dim=4),  # weights rule
]


def compiled(shape):
    net = mlp(shape.width, "relu", shape.in_dim, shape.out_dim)
    x, t = jnp.zeros((shape.batch, shape.in_dim)), jnp.zeros(shape.batch, int)
    options = dict(loss=losses.cross_entropy, depths=np.asarray(shape.depths))
    return jax.jit(lambda key: read(net, net.init(key, max(shape.depths)), (x, t), **options)).lower(jax.random.key(0)).compile()


@pytest.mark.parametrize("shape", SHAPES[::2])
def test_memory_is_what_the_compiler_reserves_within_a_factor_of_two(shape):
    reserved = compiled(shape).memory_analysis().temp_size_in_bytes
    assert reserved / 2 < cost.memory(shape) < 2 * reserved


def products(shape):
    """The products of one case, one by one as the algorithm forms them: [rows, inner, columns]."""
    n, b = shape.width, shape.batch
    sizes = [(shape.in_dim, n)] + [(n, n)] * (max(shape.depths) - 2)
    for fan_in, fan_out in sizes + [(n, shape.out_dim)] * len(shape.depths):
        yield b, fan_in, fan_out
        if b < min(fan_in, fan_out):
            yield b, fan_in, b
    for depth in shape.depths:
        for layer, (fan_in, fan_out) in enumerate([(shape.in_dim, n)] + [(n, n)] * (depth - 2) + [(n, shape.out_dim)]):
            if layer > 0:  # of the data there is no cotangent
                yield b, fan_out, fan_in
            yield (b, b, fan_out) if b < min(fan_in, fan_out) else (fan_in, b, fan_out)


@pytest.mark.parametrize("shape", SHAPES)
def test_flops_are_those_of_the_products_written_out(shape):
    assert cost.flops(shape) == sum(2 * i * j * k for i, j, k in products(shape))


def test_a_chunk_is_seconds_of_work_and_fits():
    small, deep = cost.Shape((2, 4), 8, 4, 8, 3), cost.Shape(tuple(range(2, 5000)), 512, 64, 64, 10)
    for shape in (small, deep):
        cases = cost.at_once(shape)
        assert cases % jax.local_device_count() == 0
        fits = cases * cost.result_bytes(shape) < cost.device_bytes() * jax.local_device_count()
        assert fits or cases == jax.local_device_count()
    assert cost.at_once(small) > 1000
    assert cost.at_once(deep) == jax.local_device_count()


class Accelerator:
    """What is asked of a device."""

    platform = "gpu"

    def __init__(self, gigabytes):
        self.bytes = gigabytes * 2**30

    def memory_stats(self):
        return {"bytes_limit": self.bytes}


def test_an_accelerator_takes_as_many_cases_as_half_of_its_memory_holds():
    shape = SHAPES[0]
    assert cost.batch_size(shape) is None  # on CPU one by one
    one, eighty = (cost.batch_size(shape, Accelerator(n)) for n in (1, 80))
    assert 0.4 < one * cost.memory(shape) / 2**30 <= 0.5
    assert eighty == pytest.approx(80 * one, rel=0.01)
    assert cost.batch_size(shape, Accelerator(1e-9)) == 1  # one at the least: an out-of-memory says the rest
    assert cost.at_once(shape, Accelerator(80)) > cost.at_once(shape)


def test_the_peak_is_arithmetic_over_time(monkeypatch):
    """On a clock that advances by half a second whenever it is read."""
    clock = itertools.count()
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(clock) / 2)
    assert cost.peak(size=8) == 2 * 8**3 / 0.5
