"""Layers: the operations that blocks are made of, and constructors of `Block`.

Every operation takes its input in one of two forms. On plain arrays it is the plain formula, differentiated by `jax.grad` like
anything else. On `Scaled` numbers it is the same formula at any magnitude, and `affine` is then a **probe**: it passes the
cotangent on and gives, as the "gradient" of a dummy argument, norms of what it saw: see `vgrad.gram`. A block is written once; what
is measured and what is trained are the same function.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.core
import jax.numpy as jnp
from jax import lax

from vgrad import activations, initializers
from vgrad.base import Affine, Array, Block, Phi
from vgrad.draws import standard_normal
from vgrad.gram import probed_dot
from vgrad.scaled import Scaled, bare, headroom, lift, pow2, shift, unit

__all__ = [
    "Probed",
    "activate",
    "affine",
    "affine_of",
    "dense",
    "layernorm_dense",
    "linear",
    "normalise",
    "plain",
    "residual",
    "with_probe",
]


class Probed(NamedTuple):
    """An `Affine` under measurement.

    Attributes:
      w, b: as in `Affine`.
      probe: zeros of shape [5, 2]. Its cotangent holds the `LogNorm`s of delta, dJ/dW, dJ/db, W^T delta and h, in this order.
    """

    w: Array
    b: Array
    probe: Array


def affine_of(params) -> Affine:
    """The one `Affine` in the parameters of a block. ValueError unless there is exactly one."""
    found = [p for p in jax.tree.leaves(params, is_leaf=_is_affine) if _is_affine(p)]
    if len(found) != 1:
        raise ValueError(f"the block's parameters hold {len(found)} Affine maps, expected 1: a layer is one weight matrix.")
    return found[0]


def with_probe(params, probe: Array):
    """The same parameters with the `Affine` made a `Probed`, ready for `Block.apply` on `Scaled` numbers."""
    return jax.tree.map(lambda p: Probed(p.w, p.b, probe) if _is_affine(p) else p, params, is_leaf=_is_affine)


def _is_affine(p):
    return isinstance(p, Affine)


def affine(p: Affine | Probed, h, *, precision="highest"):
    """z = h @ w + b, on an array [B, fan_in] with an `Affine`, or on a `Scaled` number of that shape with a `Probed`."""
    if not isinstance(h, Scaled):
        z = jnp.dot(h, p.w, precision=precision)
        return z + jnp.broadcast_to(p.b, z.shape)
    if not isinstance(p, Probed):
        raise TypeError("a Scaled input needs probed parameters: see layers.with_probe.")
    e = unit(h.m)
    m, k = shift(h.m, -e), h.k + e
    return Scaled(probed_dot(precision, m, k, p.w, p.probe), k) + bare(p.b[None])


def activate(phi: Phi, z):
    """h = phi(z) elementwise, on an array or on a `Scaled` number.

    Within the headroom this is phi itself. Beyond it, phi is its asymptote: phi(z) ~ phi(z0) / z0 * z, with z0 = ±2^headroom where
    |z| is larger, and phi(z) ~ phi(0) + phi'(z0) z with z0 = ±2^-headroom where all of z is smaller. Both are exact to float
    rounding for a phi that is asymptotically linear, constant or bounded on either side, as every activation of the registry is;
    a phi that grows faster reads NaN where it leaves the float range.
    """
    if not isinstance(z, Scaled):
        return phi(z)
    edge = 2.0 ** headroom(z.m.dtype)
    left, right, starts_at_zero = _asymptotes(phi, edge, z.m.dtype)
    m = lax.stop_gradient(z.m)
    value, tiny = pow2(m, z.k), z.k < 0
    at = jnp.where(tiny, jnp.sign(m) / edge, jnp.clip(value, -edge, edge))
    y, slope = jax.jvp(phi, (at,), (jnp.ones_like(at),))
    asymptote = jnp.where(m > 0, right, left)
    linear = jnp.where(tiny, starts_at_zero, (jnp.abs(value) > edge) & (asymptote != 0))
    slope = jnp.where(linear & ~tiny, asymptote, slope)
    k = jnp.where(jnp.any(linear & (slope * m != 0)), z.k, 0)
    return Scaled(_with_slope(z.m, jnp.where(linear, slope * m, pow2(y, -k)), slope), k)


def _asymptotes(phi, edge, dtype):
    """phi(z) / z at -edge and at +edge: 0 where phi stays small against z, NaN where it is not linear; and whether phi(0) = 0."""
    at = jnp.asarray([-edge, edge, -edge / 2, edge / 2, 0], dtype)
    y = phi(at)
    far, near = y[:2] / at[:2], y[2:4] / at[2:4]
    linear = jnp.where(jnp.abs(far - near) <= 1e-3 * jnp.abs(far), far, jnp.nan)
    left, right = jnp.where(jnp.abs(far) < edge**-0.5, 0, linear)
    return left, right, y[4] == 0


@jax.custom_vjp
def _with_slope(z, y, slope):
    """y, taken to depend on z with the given elementwise slope: one multiplication per cotangent, whatever phi costs."""
    return y


_with_slope.defvjp(lambda z, y, slope: (y, slope), lambda slope, c: (c * slope, None, None))


def normalise(h, *, eps=1e-5):
    """(h - mean) / sqrt(var + eps) over the last axis, on an array or on a `Scaled` number. Ba et al., 2016 (arXiv:1607.06450)."""

    def standardise(m, var_unit, eps):
        m = m - jnp.mean(m, axis=-1, keepdims=True)
        return m / jnp.sqrt(jnp.mean(jnp.square(m), axis=-1, keepdims=True) * var_unit + eps)

    if not isinstance(h, Scaled):
        return standardise(h, 1, eps)
    # h = m 2^k. For k > 0 the result is of order 1 and its derivative carries 2^-k; for k < 0 the eps rules and both carry none.
    one = jnp.ones((), h.m.dtype)
    up, down = pow2(one, -jnp.maximum(h.k, 0)), pow2(one, jnp.minimum(h.k, 0))
    return Scaled(standardise(_scale_cotangent(h.m, up), down**2, eps * up**2), jnp.minimum(h.k, 0))


@jax.custom_vjp
def _scale_cotangent(x, factor):
    return x


_scale_cotangent.defvjp(lambda x, factor: (x, factor), lambda factor, c: (c * factor, None))


def plain(fn: Callable) -> Callable:
    """Lets any array function stand in a block. On a `Scaled` number it sees the plain value, within the plain float range."""
    return lambda h: lift(fn(shift(h.m, h.k))) if isinstance(h, Scaled) else fn(h)


def linear(
    fan_in, fan_out, *, sigma_w=1.0, sigma_b=0.0, weights: str | Callable = "normal", precision="highest"
) -> Block:
    """h -> h @ w + b, with w drawn by `weights` and multiplied by sigma_w, and b ~ N(0, sigma_b^2).

    Args:
      fan_in, fan_out: widths, at least 1.
      sigma_w: multiplies what `weights` draws; the weight std times sqrt(fan_in) for the unit initializers. Shape [], traceable.
      sigma_b: bias std. Shape [], traceable.
      weights: a name from `vgrad.initializers` or any function with the `jax.nn.initializers` signature (key, shape, dtype).
      precision: of the matrix products, as in `jax.lax.Precision`.
    Raises:
      ValueError: a width below 1, a negative sigma, an unknown initializer.
    """
    for name, n in (("fan_in", fan_in), ("fan_out", fan_out)):
        if isinstance(n, bool) or not hasattr(n, "__index__") or n < 1:
            raise ValueError(f"{name} is {n!r}, expected an integer of at least 1: a layer needs a unit.")
    initializers.check_sigma("sigma_w", sigma_w)
    initializers.check_sigma("sigma_b", sigma_b)
    draw = initializers.get(weights)

    no_bias = not isinstance(sigma_b, jax.core.Tracer) and float(sigma_b) == 0  # a draw would be compiled, and thrown away

    def init(key):
        key_w, key_b = jax.random.split(key)
        dtype = jnp.result_type(float)
        w = jnp.asarray(sigma_w, dtype) * draw(key_w, (fan_in, fan_out), dtype)
        b = jnp.zeros(fan_out, dtype) if no_bias else jnp.asarray(sigma_b, dtype) * standard_normal(key_b, (fan_out,), dtype)
        return Affine(w, b)

    return Block(init, _Linear(precision))


@dataclasses.dataclass(frozen=True)
class _Linear:
    """What a block does to its input, as a value: two that do the same are equal, and what is compiled for one serves the other."""

    precision: Any

    def __call__(self, p, h):
        return affine(p, h, precision=self.precision)


@dataclasses.dataclass(frozen=True)
class _Dense(_Linear):
    phi: Phi
    normalised: bool = False
    skips: bool = False

    def __call__(self, p, z):
        out = super().__call__(p, activate(self.phi, normalise(z) if self.normalised else z))
        return z + out if self.skips else out


def dense(fan_in, fan_out, *, phi, **options) -> Block:
    """z -> phi(z) @ w + b. Options as for `linear`."""
    return _dense(fan_in, fan_out, phi, options)


def _dense(fan_in, fan_out, phi, options, **kind):
    own, draws = activations.get(phi), linear(fan_in, fan_out, **options)
    phi, precision = own, cast(_Linear, draws.apply).precision
    try:
        hash(own)
    except TypeError:  # a callable made of arrays, say: equal to itself alone
        phi = lambda z: own(z)  # noqa: E731
    return Block(draws.init, _Dense(precision, phi, **kind))


def layernorm_dense(fan_in, fan_out, *, phi, **options) -> Block:
    """z -> phi(normalise(z)) @ w + b: the summed inputs normalised, with no gain or bias of their own. Ba et al., 2016, eq. 4."""
    return _dense(fan_in, fan_out, phi, options, normalised=True)


def residual(fan_in, fan_out, *, phi, **options) -> Block:
    """z -> z + phi(z) @ w + b, the pre-activation residual block. He et al., 2016 (arXiv:1603.05027), eq. 5.

    Where fan_in and fan_out differ, as in a readout, there is nothing to add to, and the block is `dense`.
    """
    return _dense(fan_in, fan_out, phi, options, skips=fan_in == fan_out)
