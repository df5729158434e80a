"""Networks: an embedding, a stack of equal blocks, a readout. Depth is the number of weight matrices,

    y = output(readout(block_{L-1}(... block_2(embed(x))))),

and a leading axis of the parameters walked by `lax.scan`, so that 10,000 layers compile as fast as 10. Layer l of one key is the
same draw at every depth: networks of different depths from one key share their first layers, and the readout too.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax

from vgrad import activations, layers
from vgrad.base import Array, Block, Network, Params, Phi

__all__ = ["AT_ONCE", "check_depth", "check_input", "mlp", "stack"]

AT_ONCE = 2**18  # so many hidden weights, or fewer, are drawn at once on CPU


def mlp(
    width: int,
    phi: str | Phi,
    in_dim: int,
    out_dim: int,
    *,
    sigma_w=1.0,
    sigma_b=0.0,
    weights: str | Callable[..., Array] = "normal",
    hidden: Callable[..., Block] = layers.dense,
    output: str | Callable[[Array], Array] = "identity",
    precision="highest",
) -> Network:
    """A fully connected network: z_1 = W_1 x + b_1, then z_l = W_l phi(z_{l-1}) + b_l, with `hidden` saying how.

    Args:
      width: units per hidden layer, N.
      phi: activation, by name or any elementwise function.
      in_dim, out_dim: width of the input and of the output.
      sigma_w, sigma_b: stds of weights (times sqrt(fan_in)) and biases, in every layer. Shape [], traceable.
      weights: initializer, by name or with the `jax.nn.initializers` signature; sigma_w multiplies what it draws.
      hidden: constructor of layers 2..L: `layers.dense`, `layers.residual`, `layers.layernorm_dense` or one like them.
      output: applied to z_L by `forward`: "softmax", the name of an activation, or a function.
      precision: of the matrix products; "highest" is full float32 on every backend, "default" trades it for speed.
    Raises:
      ValueError: a width below 1, a negative sigma, an unknown name, a phi that is not elementwise.
    """
    options: dict[str, Any] = dict(sigma_w=sigma_w, sigma_b=sigma_b, weights=weights, precision=precision)
    phi = activations.get(phi)
    if not callable(hidden):
        raise TypeError(f"hidden is {hidden!r}, expected a constructor of blocks: vgrad.layers.residual, say.")
    if output == "softmax":
        output = activations.softmax
    elif isinstance(output, str):
        output = activations.get(output)
    elif not callable(output):
        raise TypeError(f"output is {type(output).__name__}, expected a name or a function of the last layer.")
    return stack(
        layers.linear(in_dim, width, **options),
        hidden(width, width, phi=phi, **options),
        hidden(width, out_dim, phi=phi, **options),
        output=output,
    )


def stack(embed: Block, block: Block, readout: Block, *, output: Callable[[Array], Array] = activations.identity) -> Network:
    """A `Network` from three blocks: `embed` once, `block` L - 2 times, `readout` once."""

    def init(key: Array, depth: int) -> Params:
        check_depth(depth)
        key_embed, key_hidden, key_readout = jax.random.split(key, 3)
        keys = jax.vmap(lambda l: jax.random.fold_in(key_hidden, l))(jnp.arange(2, depth))
        # One layer at a time stays in a CPU's cache, where all may not. Outside a `jit` a loop would be compiled at every call.
        size = (depth - 2) * sum(p.size for p in jax.tree.leaves(jax.eval_shape(block.init, key_hidden)))
        loop = isinstance(key, jax.core.Tracer) and jax.default_backend() == "cpu" and size > AT_ONCE
        hidden = lax.map(block.init, keys) if loop else jax.vmap(block.init)(keys)
        return Params(embed.init(key_embed), hidden, readout.init(key_readout))

    def forward(params: Params, x: Array) -> Array:
        check_input(params, x)
        z = embed.apply(params.embed, x)
        z, _ = lax.scan(lambda z, p: (block.apply(p, z), None), z, params.hidden)
        return output(readout.apply(params.readout, z))

    return Network(init, forward, embed, block, readout, output)


def check_depth(depth) -> None:
    """Raises for anything but an integer of at least 2."""
    if isinstance(depth, bool) or not hasattr(depth, "__index__"):
        raise TypeError(
            f"depth is {depth!r}, expected an integer: the number of weight matrices. It fixes shapes, so it cannot be traced."
        )
    if int(depth) < 2:
        raise ValueError(f"depth is {int(depth)}, expected at least 2: an embedding and a readout.")


def check_input(params: Params, x) -> None:
    """Raises unless x is a batch of rows of the width that the embedding takes."""
    if not hasattr(x, "shape"):
        raise TypeError(f"x is {type(x).__name__}, expected an array [B, in_dim]: jnp.asarray(x).")
    fan_in = layers.affine_of(params.embed).w.shape[0]
    if jnp.ndim(x) != 2 or x.shape[1] != fan_in or not x.shape[0]:
        raise ValueError(f"x has shape {jnp.shape(x)}, expected [B, {fan_in}]: a batch of rows. For one sample use x[None].")
