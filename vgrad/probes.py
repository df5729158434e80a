"""Reading cotangents on their way through somebody else's program, at any magnitude.

Two identities with derivatives of their own. `probe` passes the cotangent of a value on and gives, as the cotangent of a dummy
argument, norms of what it saw: O(1) memory a site. `split` keeps the backward pass within the float range. Backpropagation is
linear in the cotangent, so at any point of the program all cotangents in flight may be divided by one power of two,

    c_i -> c_i 2^-e,    E -> E + e,    2^(e-1) <= max_i max|c_i| < 2^e,

which is exact, if somebody keeps E. A **token** does: a number, always zero, that is threaded through the program beside the
values, so that its own cotangent travels down with theirs, and that cotangent is E. The transposes of ordinary sums do the rest:
where tokens are added, E is copied to each of them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from vgrad import activations
from vgrad.base import Array
from vgrad.scaled import exponent, pow2, reach, scale

__all__ = ["NUM_STATS", "flatness", "norm_of", "of_turn_before", "probe", "seen", "split", "stats_dtype", "zero_token"]

NUM_STATS = 6  # of a probe: the norms of delta and of dJ/dW, the exponent that is common to both, the fraction of zeros in delta
_NONE = -(2.0**30)  # the "exponent" of zero: below all others


def zero_token(length: int | None = None) -> Array:
    """A token, or one per iteration of a loop."""
    return jnp.zeros(() if length is None else (length,), jnp.float32)


def norm_of(x: Array) -> Array:
    """Frobenius norm of a value of any float dtype as the pair (sumsq, largest), norm = largest sqrt(sumsq). Shape [2]."""
    x = _wide(x)
    largest = jnp.max(x, initial=0)
    return jnp.stack([jnp.sum(jnp.square(x / jnp.where(largest == 0, 1, largest))), largest])


def seen(z: Array) -> Array:
    """What the forward pass notes of a value, [3]: its norm as of `norm_of`, and a 1, for it was there."""
    n = norm_of(lax.stop_gradient(z))
    return jnp.concatenate([n, jnp.ones(1, n.dtype)])


def flatness(phi: str, z: Array, units: tuple[int, ...] | None) -> Array:
    """Of the slopes phi'(z), [2]: the fraction of units, along these axes, where it is zero for all samples, NaN if nobody knows
    the axes; and the fraction of entries where it is below a tenth of its greatest. NaN for an activation not registered."""
    dtype = stats_dtype(z)
    if phi not in activations.REGISTRY or not z.size:
        return jnp.full(2, jnp.nan, dtype)
    known = activations.facts(phi)
    z = lax.stop_gradient(z)
    slope = jnp.abs(jax.jvp(known.phi, (z,), (jnp.ones_like(z),))[1])
    flat = jnp.mean((slope < 0.1 * max(map(abs, known.slope_range))).astype(dtype))
    if units is None:
        return jnp.stack([jnp.full_like(flat, jnp.nan), flat])
    dead = jnp.all(slope == 0, axis=tuple(a for a in range(z.ndim) if a not in units))
    return jnp.stack([jnp.mean(dead.astype(dtype)), flat])


def of_turn_before(x: Array, before: bool, reverse: bool) -> Array:
    """What each turn of a loop notes of the one before, [T, ...], given to that; if of what was there `before` the loop, to it."""
    unknown = jnp.full((1, *x.shape[1:]), jnp.nan, x.dtype)  # of the last turn, which is read after the loop
    if before:
        return jnp.concatenate([x[-1:] if reverse else x, unknown])[0]
    return jnp.concatenate([unknown, x[:-1]] if reverse else [x[1:], unknown])


@jax.custom_vjp
def probe(z: Array, p: Array, token: Array, weights_vjp: Any):
    """(z, token) unchanged; the cotangent of `p` is what is seen of dJ/dz.

    Args:
      z: the value that is read. Any shape.
      p: zeros of shape [NUM_STATS], of `stats_dtype(z)`.
      token: see the module.
      weights_vjp: function from dJ/dz to (dJ/dW,), a pytree as from `jax.vjp`, or None: then the readings of dJ/dW are NaN.
    """
    return z, token


def _probe_bwd(weights_vjp, cotangents):
    c, e = cotangents
    dtype = stats_dtype(c)
    zeros = jnp.mean((c == 0).astype(dtype)) if c.size else jnp.zeros((), dtype)
    read = lambda c: norm_of(weights_vjp(c)[0]).astype(dtype)  # noqa: E731
    grad_w = jnp.full(2, jnp.nan, dtype) if weights_vjp is None else read(c)
    if weights_vjp is not None and c.dtype == jnp.float16:
        # Of order 1 and summed over 10^4 samples they leave float16. A little smaller they do not, but some of them may underflow.
        smaller = read(scale(c, jnp.asarray(-12, jnp.int32))) * jnp.array([1, 2.0**12], dtype)
        grad_w = jnp.where(jnp.isfinite(grad_w).all(), grad_w, smaller)
    return c, jnp.concatenate([norm_of(c), grad_w, jnp.stack([e.astype(dtype), zeros])]), e, None


probe.defvjp(lambda z, p, token, weights_vjp: ((z, token), weights_vjp), _probe_bwd)


@jax.custom_vjp
def split(groups, ports, token: Array):
    """Values in groups, and a token for each, from one token: the identity, whose transpose brings all cotangents to one exponent.

    Args:
      groups: tuple of lists of arrays.
      ports: the zero tokens that are to go with the groups; one of shape [T] goes with values that have a leading axis T.
      token: the one that they are split from: zero, which the compiler should not know. A compiler that fuses what is cheap, such
        as a sum or a product by a power of two, would write the way down to a site out anew at every site, and programs would grow
        as the square of their sites. Divisions are not cheap, so there it stops: cotangents and exponents are divided, exactly.
    Returns:
      (groups, ports).
    """
    return groups, tuple(jnp.broadcast_to(token, p.shape) for p in ports)


def _split_bwd(token, cotangents):
    groups, exponents = cotangents
    if len(groups) == 1:
        return _settled(groups[0], exponents[0], 1 + token)
    tops = [_top(c, e.ndim) + e for group, e in zip(groups, exponents, strict=True) for c in group if c.size]
    highest = jnp.max(jnp.stack([jnp.max(t) for t in tops])) if tops else jnp.asarray(_NONE, jnp.float32)
    # Where all is zero, the exponent stays that of the first group.
    highest = jnp.where(highest > _NONE / 2, highest, jnp.max(exponents[0], initial=_NONE))
    scaled = tuple([_times(c, e - highest) for c in group] for group, e in zip(groups, exponents, strict=True))
    return scaled, tuple(jnp.zeros_like(e) for e in exponents), highest


def _settled(cotangents, e, one):
    """One group: nothing in it is further from order 1 than the range of its dtype, so that one factor does."""
    tops = [jnp.max(_wide(c), initial=0).astype(jnp.float32) for c in cotangents]
    most = min(reach(c.dtype) for c in cotangents)
    by = jnp.clip(exponent(jnp.stack(tops)), -most, most)

    def scaled(c):
        if jnp.iscomplexobj(c):
            return lax.complex(scaled(c.real), scaled(c.imag))
        # By an array: a quotient by one number would be made a product by its inverse, and that is cheap.
        return c / jnp.where(jnp.isnan(c), c, scale(jnp.ones((), c.dtype), by))

    return ([scaled(c) for c in cotangents],), (jnp.zeros_like(e),), (e + by.astype(e.dtype)) / one  # see `split`


split.defvjp(lambda groups, ports, token: (split(groups, ports, token), token), _split_bwd)


def _times(c, e):
    """c * 2^e, where e may have the leading axis of c."""
    if jnp.iscomplexobj(c):
        return lax.complex(_times(c.real, e), _times(c.imag, e))
    e = jnp.reshape(e, e.shape + (1,) * (c.ndim - e.ndim))
    return pow2(c, jnp.clip(e, -(2.0**20), 2.0**20).astype(jnp.int32))


def _top(c, num_leading=0):
    """The float e with 2^(e-1) <= max|c| < 2^e; `_NONE` for zero. Over all axes but the leading ones."""
    a = _wide(c)
    largest = jnp.max(a, axis=tuple(range(num_leading, a.ndim)), initial=0)
    # A subnormal has no exponent in its bits: it is counted as the smallest normal number.
    least = jnp.asarray(jnp.finfo(a.dtype).minexp, jnp.float32)
    e = jnp.where(largest < jnp.finfo(a.dtype).tiny, least, exponent(largest[..., None], -1).astype(jnp.float32))
    return jnp.where(largest == 0, _NONE, e)


def _wide(x):
    """|x| in float32, or in float64 where x is that wide."""
    return jnp.abs(x).astype(stats_dtype(x))


def stats_dtype(x) -> Any:
    """The dtype in which norms of x are taken."""
    return jnp.float64 if jnp.finfo(x.dtype).bits == 64 else jnp.float32
