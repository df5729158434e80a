"""Weight draws with the signature of `jax.nn.initializers`: (key, shape, dtype) -> array, shape [fan_in, fan_out].

What decides over vanishing and exploding is the weight std in units of 1/sqrt(fan_in), here called sigma_w:

    E W_ij = 0,    Var W_ij = sigma_w^2 / fan_in.

`normal`, `uniform`, `truncated_normal` and `orthogonal` take sigma_w; `lecun`, `he` and the two Xavier forms are special values of
it. `positive_uniform` is the recipe of many tutorials, whose mean is *not* zero; it stands here to be measured.
"""

import difflib
import math

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from vgrad.draws import standard_normal

__all__ = [
    "INITIALIZERS", "check_sigma", "get", "he", "identity", "lecun", "normal", "orthogonal", "positive_uniform",
    "truncated_normal", "uniform", "xavier_fan_avg", "xavier_fan_in",
]  # fmt: skip


def check_sigma(name: str, sigma) -> None:
    """Raises ValueError for a sigma that is no finite scalar >= 0, TypeError if it is no number at all; traced ones pass."""
    if not isinstance(sigma, int | float | np.ndarray | np.generic | jax.Array):
        raise TypeError(f"{name} is {sigma!r}, expected a number, traced or not.")
    if jnp.shape(sigma) != ():
        raise ValueError(f"{name} has shape {jnp.shape(sigma)}, expected a scalar: sweep it with vgrad.sweep or jax.vmap.")
    if not isinstance(sigma, jax.core.Tracer) and not 0 <= float(sigma) < math.inf:
        raise ValueError(f"{name} is {float(sigma)}, expected a finite number >= 0: it sets a standard deviation.")


def _scaled(sigma_w, unit):
    check_sigma("sigma_w", sigma_w)
    return lambda key, shape, dtype=None: jnp.asarray(sigma_w, dtype or float) * unit(key, shape, dtype or jnp.result_type(float))


def _normal(variance):
    def draw(key, shape, dtype):
        if len(shape) < 2:
            raise ValueError(f"the shape of the weights is {shape}, expected [fan_in, fan_out].")
        positions = math.prod(shape[:-2])  # of a convolution's kernel
        std = math.sqrt(variance(positions * shape[-2], positions * shape[-1]))
        return jnp.asarray(std, dtype) * standard_normal(key, shape, dtype)

    return draw


def normal(sigma_w=1.0):
    """N(0, sigma_w^2 / fan_in)."""
    return _scaled(sigma_w, _normal(lambda fan_in, fan_out: 1 / fan_in))


def uniform(sigma_w=1.0):
    """U(-a, a) with a = sigma_w sqrt(3 / fan_in), so of variance sigma_w^2 / fan_in."""
    return _scaled(sigma_w, jax.nn.initializers.variance_scaling(1.0, "fan_in", "uniform"))


def truncated_normal(sigma_w=1.0):
    """A normal cut at two of its standard deviations and widened so that the variance after the cut is sigma_w^2 / fan_in."""
    return _scaled(sigma_w, jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal"))


def orthogonal(sigma_w=1.0):
    """sigma_w times a Haar-random matrix with orthonormal rows or columns, whichever are fewer.

    Square: W^T W = sigma_w^2 I, every singular value is sigma_w. A rectangular one is scaled by
    sqrt(max(fan_in, fan_out) / fan_in), so that its entries keep the variance sigma_w^2 / fan_in.
    Saxe et al., 2014 (arXiv:1312.6120).
    """
    unit = jax.nn.initializers.orthogonal(1.0)

    def draw(key, shape, dtype):
        wide = dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32  # no QR decomposition takes less
        return (math.sqrt(max(shape) / shape[0]) * unit(key, shape, wide)).astype(dtype)

    return _scaled(sigma_w, draw)


def identity(sigma_w=1.0):
    """sigma_w times the identity matrix, cut or padded with zeros where fan_in != fan_out. Ignores the key."""
    return _scaled(sigma_w, lambda key, shape, dtype: jnp.eye(*shape, dtype=dtype))


def lecun():
    """Normal, Var W = 1 / fan_in. LeCun et al., 1998, Efficient BackProp, section 4.6."""
    return normal(1.0)


def he():
    """Normal, Var W = 2 / fan_in: keeps E h^2 in relu networks. He et al., 2015 (arXiv:1502.01852), eq. 10."""
    return normal(math.sqrt(2.0))


def xavier_fan_in():
    """Normal, Var W = 1 / fan_in: the first condition of Glorot & Bengio, 2010 (eq. 10), and what many texts call Xavier."""
    return normal(1.0)


def xavier_fan_avg():
    """Normal, Var W = 2 / (fan_in + fan_out): their compromise between forward and backward (eq. 12).

    jax's `glorot_normal` has the same variance, but is truncated.
    """
    return _scaled(1.0, _normal(lambda fan_in, fan_out: 2 / (fan_in + fan_out)))


def positive_uniform(scale=1.0):
    """U[0, 1) * sqrt(scale / fan_in), literally `random() * sqrt(scale / n)`.

    Mean sqrt(scale / fan_in) / 2, variance scale / (12 fan_in). The mean adds a rank-one part whose gain is
    sqrt(scale * fan_in) / 2, which rules in any wide network.
    """
    check_sigma("scale", scale)
    return lambda key, shape, dtype=None: (
        jax.random.uniform(key, shape, dtype or float) * jnp.sqrt(jnp.asarray(scale / shape[0], dtype or float))
    )


INITIALIZERS = {
    "normal": normal, "uniform": uniform, "truncated_normal": truncated_normal, "orthogonal": orthogonal, "identity": identity,
    "lecun": lecun, "he": he, "xavier_fan_in": xavier_fan_in, "xavier_fan_avg": xavier_fan_avg,
    "positive_uniform": positive_uniform,
}  # fmt: skip


def get(weights):
    """An initializer by name (at its default scale), or `weights` itself if it is a function.

    Raises:
      ValueError: unknown name.  TypeError: neither a name nor callable.
    """
    if callable(weights):
        return weights
    if not isinstance(weights, str):
        raise TypeError(f"weights is {type(weights).__name__}, expected a name or a function (key, shape, dtype) -> array.")
    if weights not in INITIALIZERS:
        near = difflib.get_close_matches(weights.lower(), INITIALIZERS, 1)
        raise ValueError(
            f"unknown initializer {weights!r}"
            + (f", did you mean {near[0]!r}?" if near else ".")
            + f" Known: {', '.join(INITIALIZERS)}."
        )
    return INITIALIZERS[weights]()
