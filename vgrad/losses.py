"""Scalar losses over a batch: the mean over its rows, so that J does not grow with the batch.

The backward pass starts from dJ/dy: for the squared error (y - t) / B, for the cross-entropy (softmax(y) - onehot) / B. The second
is bounded however large the logits are; the first carries an exploding forward pass on into the gradient.
"""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from vgrad.base import Array

__all__ = ["cross_entropy", "squared_error"]


def squared_error(y: Array, target: Array) -> Array:
    """J = sum((y - target)^2) / (2 B).

    Args:
      y: outputs. Shape [B, out_dim].  target: the same shape.
    Raises:
      ValueError: the shapes differ.
    """
    if jnp.shape(y) != jnp.shape(target):
        raise ValueError(f"target has shape {jnp.shape(target)}, expected that of y, {jnp.shape(y)}.")
    return 0.5 * jnp.sum(jnp.square(y - target)) / y.shape[0]


def cross_entropy(y: Array, labels: Any) -> Array:
    """J = -mean_b ln softmax(y_b)[labels_b].

    Args:
      y: logits. Shape [B, out_dim].
      labels: integers in [0, out_dim). Shape [B]. Under `jit`, where they cannot be looked at, one out of range makes J NaN.
    Raises:
      ValueError: labels of another shape, or out of range.  TypeError: labels that are not integers.
    """
    known = not isinstance(labels, jax.core.Tracer)
    labels = np.asarray(labels) if known else labels  # NumPy can look at them even while y is being traced
    if jnp.ndim(y) != 2:
        raise ValueError(f"y has shape {jnp.shape(y)}, expected [B, out_dim]: a row of logits for each sample.")
    if jnp.shape(labels) != jnp.shape(y)[:1]:
        raise ValueError(f"labels have shape {jnp.shape(labels)}, expected {jnp.shape(y)[:1]}: one class index per row of y.")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels have dtype {labels.dtype}, expected integers: class indices, not one-hot rows.")
    num = y.shape[-1]
    inside = (labels >= 0) & (labels < num)
    if known and not np.all(inside):
        raise ValueError(f"labels contain {np.asarray(labels)[~inside][0]}, expected 0..{num - 1}: y has {num} columns (out_dim).")
    index = jnp.where(inside, labels, 0).astype(jnp.int32)
    picked = jnp.take_along_axis(jax.nn.log_softmax(y), index[:, None], axis=-1)[:, 0]
    return -jnp.mean(picked * jnp.where(inside, 1.0, jnp.nan))  # a factor, so that the gradient of that row is NaN too
