"""The backward equations by hand, for a dense network of any depth: what `jax.grad` computes, written out.

Textbooks write samples as columns; here they are rows, which transposes every product and changes nothing else:

    textbook, samples in columns                 here, samples in rows
    Z_l = W_l A_{l-1} + b_l,  A_l = phi(Z_l)     z_l = h_{l-1} @ w_l + b_l,  h_l = phi(z_l),  h_0 = x,  w_l = W_l^T
    dZ_L = dA_L * g'(Z_L)                        delta_L = d_out * g'(z_L)
    dZ_l = W_{l+1}^T dZ_{l+1} * phi'(Z_l)        delta_l = (delta_{l+1} @ w_{l+1}.T) * phi'(z_l)
    dW_l = dZ_l A_{l-1}^T                        dJ/dw_l = h_{l-1}.T @ delta_l
    db_l = sum over samples of dZ_l              dJ/db_l = sum over rows of delta_l

`*` is elementwise, g is the activation of the output, y = g(z_L) = h_L, and d_out = dA_L = dJ/dy. The factor 1 / B of a mean over
the batch, which some books put in front of dW_l, is part of d_out. phi' comes from autodiff. The equations are in plain floating
point: in a deep sigmoid network they underflow to zero as `jax.grad` does, and `vgrad.profile` does not.

>>> import jax, jax.numpy as jnp, numpy as np, vgrad
>>> net, x, d_out = vgrad.mlp(8, "tanh", 3, 2), np.ones((5, 3), np.float32), np.ones((5, 2), np.float32)
>>> params = jax.jit(net.init, static_argnums=1)(jax.random.key(0), 4)
>>> ours = jax.jit(lambda p: backward_pass(p, x, d_out, phi="tanh").grads)(params)
>>> auto = jax.jit(jax.grad(lambda p: jnp.sum(net.forward(p, x))))(params)
>>> np.allclose(ours.hidden.w, auto.hidden.w, atol=1e-6)
True
>>> " ".join(f.name for f in expanded_product(params, x, d_out, phi="tanh"))
"X^T dA_4 g'(Z_4) W_4^T phi'(Z_3) W_3^T phi'(Z_2) W_2^T phi'(Z_1)"
"""

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vgrad import activations
from vgrad.base import Affine, Array, Params, Phi
from vgrad.network import check_input

__all__ = [
    "Backward", "Factor", "Forward", "backward_from_loss", "backward_pass", "expanded_product", "forward_pass", "multiply_out",
]  # fmt: skip

_dot = partial(jnp.dot, precision="highest")


class Forward(NamedTuple):
    """What the forward pass computes, laid out over the layers like `Params`.

    Attributes:
      z: preactivations: `embed` z_1 [B, N], `hidden` z_2..z_{L-1} [L - 2, B, N], `readout` z_L [B, out_dim].
      h: activations in the same shapes; `readout` is the output y = g(z_L).
    """

    z: Params
    h: Params


class Backward(NamedTuple):
    """What the backward pass computes.

    Attributes:
      delta: dJ/dz_l, laid out and shaped like `Forward.z`.
      grads: dJ/dw_l and dJ/db_l, in the structure and shapes of the parameters: comparable with `jax.grad` leaf by leaf.
    """

    delta: Params
    grads: Params


class Factor(NamedTuple):
    """One factor of an expanded product. It holds text, so it cannot leave a `jit`; its array can.

    Attributes:
      name: as in the textbook, such as "W_4^T" or "phi'(Z_3)".
      kind: "elementwise", "matrix", or "jacobian": a matrix for each sample, which only a softmax output needs.
      array: shape [B, n] if elementwise, [n, m] if a matrix, [B, n, n] if a Jacobian.
    """

    name: str
    kind: str
    array: Array


def forward_pass(params: Params, x: Array, *, phi: str | Phi, output: str | Phi = "identity") -> Forward:
    """All z_l and h_l: z_l = h_{l-1} @ w_l + b_l, h_l = phi(z_l), and g = output instead of phi at the last layer.

    Args:
      params: parameters of a dense network, from `vgrad.mlp(...).init`. Hidden layers are stacked, and walked by a scan.
      x: inputs. Shape [B, in_dim].
      phi: activation, by name or any elementwise function.
      output: activation g of the last layer: a name, an elementwise function, or "softmax".
    Returns:
      `Forward`. A NaN in x stays in its own row.
    Raises:
      ValueError: shapes that do not fit together; an activation that is unknown or not elementwise.
      TypeError: parameters that are not those of a dense network.
    """
    phi, g = activations.get(phi), _output_activation(output)
    _check_dense(params, x)

    def layer(h, p):
        z = _affine(p, h)
        h = phi(z)
        return h, (z, h)

    h_1, (z_1, _) = layer(x, params.embed)
    h_last, (z, h) = lax.scan(layer, h_1, params.hidden)
    z_top = _affine(params.readout, h_last)
    return Forward(Params(z_1, z, z_top), Params(h_1, h, g(z_top)))


def backward_pass(params: Params, x: Array, d_out: Array, *, phi: str | Phi, output: str | Phi = "identity") -> Backward:
    """Deltas and gradients of all layers, from the cotangent of the output.

    The equations are those at the top of the module; for softmax, g' is its Jacobian, row by row.

    Args:
      d_out: dJ/dy, of the outputs y = g(z_L), which textbooks call dA_L. Shape [B, out_dim], dtype of the network.
      params, x, phi, output: as for `forward_pass`.
    Returns:
      `Backward`, equal to rounding to what `jax.grad` computes.
    Raises:
      ValueError, TypeError: as `forward_pass`; d_out of another shape or dtype than the outputs.
    """
    z, h = forward_pass(params, x, phi=phi, output=output)
    phi, g = activations.get(phi), _output_activation(output)
    d_out = _checked_cotangent(d_out, z.readout)

    def layer(d_h, of_layer, phi=phi):
        p, z, h_below = of_layer
        delta = _times_slope(phi, z, d_h)
        return _dot(delta, p.w.T), (delta, Affine(_dot(h_below.T, delta), jnp.sum(delta, axis=0)))

    below = jnp.concatenate([h.embed[None], h.hidden])  # h_1 .. h_{L-1}: what layers 2 .. L take in
    d_h, (delta_top, top) = layer(d_out, (params.readout, z.readout, below[-1]), g)
    d_h, (delta_hidden, hidden) = lax.scan(layer, d_h, (params.hidden, z.hidden, below[:-1]), reverse=True)
    _, (delta_1, first) = layer(d_h, (params.embed, z.embed, jnp.asarray(x)))
    return Backward(Params(delta_1, delta_hidden, delta_top), Params(first, hidden, top))


def backward_from_loss(
    params: Params, batch: tuple[Array, Any], *, loss: Callable, phi: str | Phi, output: str | Phi = "identity"
) -> Backward:
    """`backward_pass` from the d_out of a loss.

    Args:
      batch: (x, t). x has shape [B, in_dim]; t is whatever `loss` takes.
      loss: (y, t) -> scalar, y being the outputs [B, out_dim], after g. The losses of `vgrad.losses` are means over the batch.
      params, phi, output: as for `forward_pass`.
    Raises:
      ValueError, TypeError: as `forward_pass`; a loss that is not scalar; what the loss itself raises for its targets.
    """
    x, t = batch
    y = forward_pass(params, x, phi=phi, output=output).h.readout
    J = jax.eval_shape(lambda y: loss(y, t), y)
    if jax.tree.structure(J) != jax.tree.structure(0) or J.shape != ():
        raise ValueError(f"loss returned {jax.tree.map(jnp.shape, J)}, expected a scalar: take the mean over the batch.")
    return backward_pass(params, x, jax.grad(lambda y: loss(y, t))(y), phi=phi, output=output)


def expanded_product(
    params: Params, x: Array, d_out: Array, *, phi: str | Phi, output: str | Phi = "identity"
) -> tuple[Factor, ...]:
    """The factors of dJ/dw_1 in the order they are written, for depth 4

    dJ/dw_1 = X^T [(((dA_4 * g'(Z_4)) W_4^T * phi'(Z_3)) W_3^T * phi'(Z_2)) W_2^T * phi'(Z_1)].

    A network of depth L has 2 L + 1 factors: L slopes, L - 1 weights, dA_L and X. The brackets are part of the formula: matrix and
    elementwise products do not associate, so neither the weights nor the slopes can be collected. The textbook's column form is the
    transpose, the same list read backwards.

    Args:
      params, x, d_out, phi, output: as for `backward_pass`, with its errors. A Python loop over the layers: for readable depths.
    Returns:
      The factors, X^T first; `multiply_out` makes dJ/dw_1 of them.
    """
    z, _ = forward_pass(params, x, phi=phi, output=output)
    phi, g = activations.get(phi), _output_activation(output)
    d_out = _checked_cotangent(d_out, z.readout)
    depth = params.hidden.w.shape[0] + 2
    top = ("jacobian", jax.vmap(jax.jacfwd(g))(z.readout)) if g is activations.softmax else ("elementwise", _slope(g, z.readout))
    factors = [("X^T", "matrix", jnp.asarray(x).T), (f"dA_{depth}", "elementwise", d_out), (f"g'(Z_{depth})", *top)]
    for l in range(depth - 1, 0, -1):
        w = params.hidden.w[l - 1] if l < depth - 1 else params.readout.w  # w_{l+1}
        slope = _slope(phi, z.hidden[l - 2] if l > 1 else z.embed)
        factors += [(f"W_{l + 1}^T", "matrix", w.T), (f"phi'(Z_{l})", "elementwise", slope)]
    return tuple(Factor(*f) for f in factors)


def multiply_out(factors: tuple[Factor, ...]) -> Array:
    """dJ/dw_1 [in_dim, N] from its factors: the product runs from the second to the right, then the first, X^T, acts on it."""
    apply = {"elementwise": jnp.multiply, "matrix": _dot, "jacobian": jax.vmap(_dot)}
    x_t, product = factors[0].array, factors[1].array
    for factor in factors[2:]:
        product = apply[factor.kind](product, factor.array)
    return _dot(x_t, product)


def _affine(p, h):
    z = _dot(h, p.w)
    return z + jnp.broadcast_to(p.b, z.shape)


def _times_slope(phi, z, d_h):
    """d_h * phi'(z). Right for softmax as well, since its Jacobian is symmetric: J d = J^T d."""
    return jax.jvp(phi, (z,), (d_h,))[1]


def _slope(phi, z):
    return _times_slope(phi, z, jnp.ones_like(z))


def _output_activation(output):
    if output in ("softmax", activations.softmax, jax.nn.softmax):
        return activations.softmax
    try:
        return activations.get(output)
    except ValueError as error:
        if callable(output):
            error.add_note('vgrad.backprop: as output of these equations, only "softmax" may mix units. Leave others to the loss.')
        raise


def _check_dense(params, x):
    if not isinstance(params, Params) or not all(isinstance(p, Affine) for p in params):
        raise TypeError(
            "params are not those of a dense network, expected Params with an Affine each for embed, hidden and readout: "
            "vgrad.mlp(...).init(key, depth). For other blocks use jax.grad or vgrad.profile."
        )
    in_dim, n, out_dim = *jnp.shape(params.embed.w)[-2:], jnp.shape(params.readout.w)[-1]
    hidden = jnp.shape(params.hidden.w)[:1]
    expected = {"embed.w": (in_dim, n), "embed.b": (n,), "hidden.w": (*hidden, n, n), "hidden.b": (*hidden, n)}
    for name, shape in (expected | {"readout.w": (n, out_dim), "readout.b": (out_dim,)}).items():
        got = jnp.shape(attrgetter(name)(params))
        if got != shape:
            raise ValueError(
                f"params.{name} has shape {got}, expected {shape}: hidden layers are square and stacked on a leading axis. "
                "For many networks at once use jax.vmap."
            )
    check_input(params, x)


def _checked_cotangent(d_out, z):
    d_out = jnp.asarray(d_out)
    if d_out.shape != z.shape or d_out.dtype != z.dtype:
        raise ValueError(
            f"d_out is {d_out.dtype}{list(d_out.shape)}, expected {z.dtype}{list(z.shape)}: dJ/dy, a row per sample and a column "
            "per output. Divide by B for a mean over the batch; cast with astype."
        )
    return d_out
