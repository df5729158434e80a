"""Standard normal draws: a layer's weights are used a few times only, so drawing them is a good part of a sweep.

A draw is a function of its key alone. Threefry hashes a key and a counter to two words of 32 random bits (Salmon et al., 2011,
"Parallel random numbers: as easy as 1, 2, 3", with 20 rounds: what jax's own generator does),

    (a, b) = threefry(key, i),

and one hash makes two numbers (Box and Muller, 1958, "A note on the generation of random normal deviates"),

    r cos(t), r sin(t),    r = sqrt(-2 ln u),    u = a / 2^32 (of which it takes 31 bits), t = 2 pi b / 2^32.

`jax.random.normal` spends a hash on each number, and on CPU walks through memory once for every four of its rounds. Here all of
it is one loop over registers. Its two results leave as the parts of a complex number: else it would be run once for each.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vgrad.base import Array

__all__ = ["standard_normal"]

_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
# Of Taylor in x^2, the highest power first: sin(x) / x and cos(x), to 2e-9 within an eighth of a turn.
_SINE = np.array([(-1) ** k / math.factorial(2 * k + 1) for k in (4, 3, 2, 1, 0)], np.float32)
_COSINE = np.array([(-1) ** k / math.factorial(2 * k) for k in (5, 4, 3, 2, 1, 0)], np.float32)


def standard_normal(key: Array, shape: tuple[int, ...], dtype=None) -> Array:
    """Independent numbers from N(0, 1). Box & Muller, 1958; Salmon et al., 2011.

    In float32 at most 6.67 in size, and within 4e-7 (1 + r) + 2^-24 / r of the formula of the module docstring.

    Args:
      key: a key of jax, typed or raw. Where it is not one of Threefry's, and for any dtype but float32, the draw is that of
        `jax.random.normal`, and so are its errors.
      shape, dtype: of the result; None is the default float.
    Returns:
      An array of that shape and dtype.
    """
    dtype = jnp.dtype(jnp.result_type(float) if dtype is None else dtype)
    if dtype != jnp.float32 or str(jax.random.key_impl(key)) != "threefry2x32":
        return jax.random.normal(key, shape, dtype)
    return _draw(jax.random.key_data(key), tuple(shape))


@partial(jax.jit, static_argnums=1)
def _draw(key, shape):
    num = math.prod(shape)
    half = -(-num // 2)

    def pairs():
        i = lax.iota(jnp.uint32, half)
        return lax.complex(*_box_muller(*_threefry(key, jnp.zeros_like(i), i)))

    z = _written(pairs, half) if jax.default_backend() == "cpu" else pairs()
    # One after the other by a choice at each number, which the compiler makes in vectors; a concatenation it takes apart.
    both = jnp.where(lax.broadcasted_iota(jnp.int32, (2, half), 0) == 0, z.real[None], z.imag[None])
    return both.reshape(-1)[:num].reshape(shape)


def _written(make, num):
    """make(), complex64 of shape [num], from memory. What leaves a branch is not computed once more by each that reads it."""
    chosen = lax.optimization_barrier(jnp.ones((), bool))  # or the compiler would see which branch it is, and take it apart
    return lax.cond(chosen, make, lambda: jnp.zeros(num, jnp.complex64))


def _threefry(key, a, b):
    """The counter (a, b), hashed. All of them uint32, the key [2]. In `lax`, which is traced faster than operators are."""
    keys = [lax.broadcast(k, a.shape) for k in (key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))]
    a, b = lax.add(a, keys[0]), lax.add(b, keys[1])
    for i in range(5):
        for by in _ROTATIONS[i % 2]:
            a = lax.add(a, b)
            turned = lax.bitwise_or(lax.shift_left(b, np.uint32(by)), lax.shift_right_logical(b, np.uint32(32 - by)))
            b = lax.bitwise_xor(turned, a)
        a, b = lax.add(a, keys[(i + 1) % 3]), lax.add(lax.add(b, keys[(i + 2) % 3]), np.uint32(i + 1))
    return a, b


def _box_muller(a, b):
    """Two independent normal numbers from two words."""
    u = (a >> 1).astype(jnp.int32).astype(jnp.float32) * 2.0**-31 + 2.0**-32  # 0 < u <= 1; signed, as processors convert it
    r = jnp.sqrt(-2 * jnp.log(u))
    # The angle lies within an eighth of a turn of an axis, by the lower bits; of which one and which end of it, by the upper two.
    x = (b << 2).astype(jnp.int32).astype(jnp.float32) * (math.pi / 4 * 2.0**-31)
    cosine, sine = jnp.polyval(_COSINE, x * x), x * jnp.polyval(_SINE, x * x)
    r = jnp.where(b >> 31 == 0, r, -r)
    upright = b & 2**30 == 0
    return r * jnp.where(upright, sine, cosine), r * jnp.where(upright, cosine, sine)
