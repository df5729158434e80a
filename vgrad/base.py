"""The shared types. Read this module first.

A network of depth L is L weight matrices W_1..W_L with an activation between them,

    z_l = W_l h_{l-1} + b_l,    h_l = phi(z_l),    h_0 = x,    J = loss(z_L, t),

and the object of study is delta_l = dJ/dz_l, a product of weight matrices and activation derivatives. The library is
built from three kinds of value: **plug points** are NamedTuples of functions (`Block`, `Network`), **results** are
NamedTuples of arrays (`Profile`, `Estimate`), and **parameters** are plain pytrees (`Affine`, `Params`).

Axes come in one order everywhere: P sweep points, S seeds, D depths, L layers, B batch, N width. Batches are rows, so a
weight matrix is stored as [fan_in, fan_out] and acts as `h @ w`: the transpose of the column convention of textbooks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

__all__ = ["Affine", "Array", "Block", "Estimate", "Network", "Params", "Phi", "Profile"]

Array = jax.Array
Phi = Callable[[Array], Array]


class Affine(NamedTuple):
    """Parameters of one affine map z = h @ w + b.

    Attributes:
      w: weights. Shape [fan_in, fan_out].
      b: biases. Shape [fan_out].
    """

    w: Array
    b: Array


class Block(NamedTuple):
    """One layer of a network: the protocol that everything downstream is written over.

    Blocks hand on the preactivation z: a plain one is z -> phi(z) @ w + b. `apply` is built from the operations in `vgrad.layers`
    (`affine`, `activate`, `normalise`, `+`, `*` by a number or parameter, or `plain` around anything else) and holds exactly one
    `Affine`; then the instrument can follow it at any range.

    Attributes:
      init: key -> parameters, a pytree with one `Affine` in it.
      apply: (parameters, z) -> z, pure; z has shape [B, N].
    """

    init: Callable[[Array], Any]
    apply: Callable[[Any, Any], Any]


class Params(NamedTuple):
    """Parameters of a network of depth L.

    Attributes:
      embed: parameters of layer 1.
      hidden: parameters of layers 2..L-1, stacked on a leading axis of length L - 2.
      readout: parameters of layer L.
    """

    embed: Any
    hidden: Any
    readout: Any


class Network(NamedTuple):
    """Pure functions of a network: `embed`, then a stack of `block`s of any depth, then `readout` and `output`.

    Attributes:
      init: (key, depth) -> Params. Layer l of one key is the same draw at every depth.
      forward: (params, x) -> y, shapes [B, in_dim] -> [B, out_dim].
      embed: layer 1, x [B, in_dim] -> z_1 [B, N].
      block: layers 2..L-1, z_{l-1} -> z_l, both [B, N].
      readout: layer L, z_{L-1} [B, N] -> z_L [B, out_dim].
      output: what `forward` applies to z_L; the identity by default.
    """

    init: Callable[..., Params]
    forward: Callable[[Params, Array], Array]
    embed: Block
    block: Block
    readout: Block
    output: Callable[[Array], Array]


class Profile(NamedTuple):
    """What a gradient does on its way through the layers. All fields are natural logarithms of Frobenius norms over the
    batch, with the same shape [..., D, L] (leading axes P, S where a sweep adds them).

    NaN past a network's last layer (l > depth), and where a NaN or inf in the input or the parameters reached the reading;
    -inf where a norm is exactly zero. `log_grad_w` is NaN, too, where what the samples of a batch add to dJ/dW_l cancels to less
    than 64 eps of its square: with fewer samples than units its norm is a sum over Gram matrices, which then is rounding noise;
    what all samples share in h does not count in that, see `vgrad.gram`.

    Attributes:
      log_delta: ln ||delta_l||, delta_l = dJ/dz_l, with z_l the output of the layer: what the next one takes in.
      log_grad_w: ln ||dJ/dW_l||.
      log_grad_b: ln ||dJ/db_l||.
      log_h: ln ||h_l||, what layer l + 1 multiplies by its weights; at the last layer ln ||z_L||.
      log_gain_w: ln ||W_{l+1}^T d_{l+1}|| - ln ||delta_{l+1}||: of the step from layer l+1 down to l, the weights' part. d is dJ
        by the output of the affine map: delta itself, unless the block goes on to multiply or normalise that output, which then
        counts with the weights, as the 0.1 in z + 0.1 f(z) does. NaN at the last layer, which has no layer above it.
      log_gain_phi: ln ||delta_l|| - ln ||W_{l+1}^T d_{l+1}||: the rest of the same step; phi' in a plain network, with the skip
        connection or the normalisation in a block that has one. The two add up to the change of `log_delta`.
    """

    log_delta: Any
    log_grad_w: Any
    log_grad_b: Any
    log_h: Any
    log_gain_w: Any
    log_gain_phi: Any


class Estimate(NamedTuple):
    """A number estimated from samples.

    Attributes:
      value: the estimate.
      stderr: its standard error; NaN when there was a single sample.
    """

    value: Any
    stderr: Any
