"""The product m @ w under measurement: its gradient's norms, without the gradient.

With H the samples' inputs [B, fan_in] and D their cotangents [B, fan_out], dJ/dW = H^T D and

    ||dJ/dW||_F^2 = sum((H H^T) * (D D^T)):

two Gram matrices [B, B], so that dJ/dW is never formed where the batch is smaller than both widths. Samples that look alike in a
layer share most of H, and what they share meets nothing but the sum of D over samples, which is dJ/db:

    H = H' + 1 m^T,  m their mean:    ||dJ/dW||_F^2 = sum((H H^T - |m|^2) * (D D^T)) + |m|^2 ||dJ/db||^2.

So what is left of a gradient is seen where the cotangents of like samples cancel, as at a loss of differences.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vgrad.base import Array
from vgrad.scaled import change_if, exponent, headroom, reach, scale, sumsq

__all__ = ["probed_dot"]


class _Gram(NamedTuple):
    """What is kept of h for the norms of dJ/dW, by the samples' mean m and what they differ by.

    Attributes:
      products: h_a . h_b - |m|^2 of all pairs. Shape [B^2].
      shared: |m|^2.
      noise: what is below this times ||delta||^2 is rounding error of the sum over pairs, and no reading.
    """

    products: Array
    shared: Array
    noise: Array


def _gram(precision, h) -> _Gram:
    """The `_Gram` of h [B, N]. Its noise is 64 eps of what the sum would be if all its terms had one sign, and then some."""
    m, eps = jnp.mean(h, axis=0), jnp.finfo(h.dtype).eps
    own = h - m[None]
    along = jnp.sum(own * m[None], axis=1)
    pairs = jnp.dot(own, own.T, precision=precision)
    products = pairs + along[:, None] + along[None]
    noise = jnp.trace(pairs) + 2 * jnp.sqrt(len(h) * sumsq(along)) + eps * sumsq(h)
    return _Gram(products.reshape(-1), sumsq(m), 64 * eps * noise)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def probed_dot(precision, m, k, w, probe):
    """m @ w, with NaN for inf, of inputs m * 2^k. Differentiable in reverse, in m and in the probe; w has no cotangent.

    Args:
      precision: of the products, as in `jax.lax.Precision`. Static.
      m: Shape [B, fan_in], float.  k: exponent, int32. Shape [].
      w: Shape [fan_in, fan_out], of the dtype of m.
      probe: zeros of that dtype, which do nothing. Shape [5, 2]. Its "cotangent" holds the `LogNorm`s of the output's delta, dJ/dW,
        dJ/db, W^T delta and m * 2^k, in this order; that of dJ/dW is NaN where all that is left of the sum is rounding noise.
    Returns:
      [B, fan_out], in units of 2^k.
    """
    z = jnp.dot(m, w, precision=precision)
    return jnp.where(jnp.isfinite(z), z, jnp.nan)


def _fwd(precision, *args):
    asked = args[0].perturbed
    m, k, w, probe = (a.value for a in args)
    # The Gram matrix belongs to the layer, not to the cotangent: it is formed once for all lanes, and m need not be kept.
    # Where it would be larger than dJ/dW, as in a readout of few units, that is formed.
    # In 16 bits the Gram matrices would be noise: there it is formed too.
    by_gram = m.shape[0] < min(w.shape) and jnp.finfo(m.dtype).bits >= 32
    seen = _gram(precision, m) if by_gram else m
    # Of data nobody asks for the cotangent, and it may be far wider than the layers.
    behind = w if asked else w[:0]
    return probed_dot(precision, m, k, w, probe), (seen, jnp.stack([sumsq(m), k.astype(m.dtype)]), behind)


def _bwd(precision, residuals, c):
    """W^T c and the norms [5, 2] of the probe. Without a row in w nobody asks for W^T c, and its norm is 0.

    A cotangent comes rescaled, so that its squares are ordinary numbers. Behind slopes that are all but zero they are not, and it
    is squared in units a little below its largest entry, so that what cancels in a sum over it is still seen.
    """
    seen, (sumsq_h, k), w = residuals
    c_in, as_it_is = jnp.dot(c, w.T, precision=precision), jnp.zeros((), jnp.int32)
    below, most = 5 * headroom(c.dtype) // 6, reach(c.dtype)
    delta, delta_in = sumsq(c), sumsq(c_in)

    def in_own_units(state):
        e = jnp.maximum(exponent(state[0]) - below, -most)
        of_w = exponent(lax.optimization_barrier((w, e))[0])  # or it would be read at every layer: it does not depend on the state
        e_in = jnp.clip(e + of_w, -most, most)
        own = scale(state[0], -e)
        return own, sumsq(own), sumsq(scale(c_in, -e_in)), e, e_in

    looked_at = jnp.stack([delta, delta_in] if c_in.size else [delta])
    strange = jnp.any(jnp.abs(jnp.log2(looked_at)) >= below)  # not NaN, which no units will help
    own, delta, delta_in, e, e_in = change_if(strange, in_own_units, (c, delta, delta_in, as_it_is, as_it_is))
    grad_b = sumsq(jnp.sum(own, axis=0))
    if isinstance(seen, _Gram):
        grad_w = jnp.dot(jnp.dot(own, own.T, precision=precision).reshape(-1), seen.products, precision=precision)
        grad_w = grad_w + seen.shared * grad_b
        grad_w = jnp.where(grad_w < seen.noise * delta, jnp.nan, grad_w)
    else:
        grad_w = sumsq(jnp.dot(seen.T, own, precision=precision))
    e, e_in = e.astype(c.dtype), e_in.astype(c.dtype)
    norms = jnp.stack([delta, grad_w, grad_b, delta_in, sumsq_h]), jnp.stack([e, e + k, e, e_in, k])
    return c_in if c_in.size else None, None, None, jnp.stack(norms, axis=-1)


probed_dot.defvjp(_fwd, _bwd, symbolic_zeros=True)
