"""Readings of programs of every form against zero taps put in by hand, and against `jax.grad`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import vgrad
from vgrad.instrument import probes_for, run
from vgrad.jaxprs import opened
from vgrad.probes import zero_token
from vgrad.sites import analyse

B, N, T = 4, 6, 3
X = np.random.default_rng(0).standard_normal((B, N), np.float32)


def draw(i, *shape):
    return np.random.default_rng(i).standard_normal(shape, np.float32) / np.float32(shape[-2] ** 0.5)


def mlp(p, x, tap):
    x = jnp.tanh(tap("a", x @ p["a"]) + jnp.broadcast_to(p["b"], x.shape))
    return jnp.sum(tap("c", x @ p["c"]) ** 2)


def scanned(p, x, tap):
    def body(h, slices):
        w, t = slices
        return jnp.tanh(tap("w", h @ w, t)), jnp.sum(h)

    h, sums = lax.scan(body, tap("a", x @ p["a"]), (p["w"], jnp.arange(T)))
    return jnp.sum(tap("c", h @ p["c"])) + jnp.sum(sums**2)


def reversed_scan(p, x, tap):
    def body(h, slices):
        w, t = slices
        return jnp.tanh(tap("w", h @ w, t)), None

    h, _ = lax.scan(body, x, (p["w"], jnp.arange(T)), reverse=True)
    return jnp.sum(h**3)


def recurrent(p, x, tap):
    """Shared weights over time, inputs and outputs that depend on sites, and a constant of the loop that does."""
    seq = tap("inp", jnp.stack([x, x**2, jnp.sin(x)]) @ p["inp"])
    memory = tap("mem", x @ p["mem"])

    def body(h, slices):
        u, t = slices
        h = jnp.tanh(tap("rec", h @ p["rec"], t) + u)
        return h, tap("out", h @ p["out"], t) * memory

    h, ys = lax.scan(body, jnp.zeros_like(x), (seq, jnp.arange(T)))
    return jnp.sum(ys**2) + jnp.sum(h * memory) + jnp.sum(seq[0])


def nested(p, x, tap):
    def outer(h, slices):
        ws, t = slices

        def inner(h, slices):
            w, s = slices
            return jnp.tanh(tap("w", h @ w, (t, s))), None

        h, _ = lax.scan(inner, h, (ws, jnp.arange(2)))
        return h + tap("v", h @ p["v"], t), None

    h, _ = lax.scan(outer, x, (p["w"], jnp.arange(T)))
    return jnp.sum(h**2)


def rematerialised(p, x, tap):
    block = jax.checkpoint(lambda w, h, name: jnp.tanh(tap(name, h @ w)), static_argnums=2)
    h = tap("a", x @ p["a"])
    return jnp.sum((block(p["c"], h, "c") + h) ** 2) + jnp.sum(h)


def conditional(p, x, tap):
    h = tap("a", x @ p["a"])
    y = lax.cond(x[0, 0] > -100, lambda h: jnp.tanh(tap("c", h @ p["c"])), lambda h: h * 2, h)
    return jnp.sum(y**2) + jnp.sum(h)


def jitted(p, x, tap):
    layer = jax.jit(lambda w, h, name: jnp.tanh(tap(name, h @ w)), static_argnums=2)
    h = layer(p["a"], x, "a")
    return jnp.sum((layer(p["c"], h, "c") + h) ** 2)


def views(p, x, tap):
    """Weights through layouts: transposed, reshaped, a slice of a stack by number and by counter, converted, scaled, broadcast."""
    h = tap("t", x @ p["t"].T)
    h = jnp.tanh(tap("r", h @ p["r"].reshape(N, N)))
    h = jnp.tanh(tap("s", h @ p["s"][1]))
    h = tap("k", h @ (0.1 * p["k"]))
    return jnp.sum(tap("v", jnp.einsum("bi,bio->bo", h, jnp.broadcast_to(p["v"], (B, N, N)))) ** 2)


def residual(p, x, tap):
    for i in range(3):
        x = x + jnp.tanh(tap(f"w{i}", x @ p[f"w{i}"]))
    return jnp.sum(x**2)


SQUARE = {"a": (N, N), "c": (N, N)}
PROGRAMS = {
    mlp: SQUARE | {"b": (1, N)},
    scanned: SQUARE | {"w": (T, N, N)},
    reversed_scan: {"w": (T, N, N)},
    recurrent: {name: (N, N) for name in ("inp", "mem", "rec", "out")},
    nested: {"w": (T, 2, N, N), "v": (N, N)},
    rematerialised: SQUARE,
    conditional: SQUARE,
    jitted: SQUARE,
    views: {"t": (N, N), "r": (N * N, 1), "s": (2, N, N), "k": (N, N), "v": (N, N)},
    residual: {f"w{i}": (N, N) for i in range(3)},
}


def taps_of(program, params, x):
    """ln ||delta|| by zero taps, one array per tapped value and iteration, and the gradients of the parameters."""
    shapes = {}

    def note(name, z, t=None):
        shapes[name] = z.shape
        return z

    jax.eval_shape(lambda: program(params, x, note))
    loops = {name: params[name].shape[:-2] if params[name].ndim > 2 and name != "s" else () for name in shapes}
    if program in (recurrent, nested):
        loops |= {name: (T,) for name in ("rec", "out", "v") if name in loops}
    zeros = {name: jnp.zeros(loops[name] + shape) for name, shape in shapes.items()}

    def loss(params, zeros):
        return program(params, x, lambda name, z, t=None: z + (zeros[name] if t is None else zeros[name][t]))

    grads, deltas = jax.jit(jax.grad(loss, (0, 1)))(params, zeros)
    return {name: (d, loops[name]) for name, d in deltas.items()}, grads


def ln_norm(a):
    return np.log(np.linalg.norm(np.asarray(a, np.float64).ravel()))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_equals_taps_and_grad(program):
    params = {name: draw(i + 1, *shape) for i, (name, shape) in enumerate(PROGRAMS[program].items())}
    report = vgrad.diagnose(lambda p, x: program(p, x, lambda name, z, t=None: z), params, X)
    deltas, grads = taps_of(program, params, X)
    expected = {}
    for name, (delta, loops) in deltas.items():
        for index in np.ndindex(loops):
            row = name + (f"[{','.join(map(str, index))}]" if loops else "")
            stacked = loops and params[name].ndim == 2 + len(loops)
            expected[row] = ln_norm(delta[index]), ln_norm(grads[name][index]) if stacked or not loops else None
    assert sorted(report.site) == sorted(expected)
    assert set(report.status) == {"ok"}
    for row, log_delta, log_grad_w in zip(report.site, report.log_delta, report.log_grad_w, strict=True):
        np.testing.assert_allclose(log_delta, expected[row][0], atol=1e-5)  # same maths, two routes
        if expected[row][1] is not None:
            np.testing.assert_allclose(log_grad_w, expected[row][1], atol=1e-5)


def test_a_program_grows_in_proportion_to_its_sites():
    """The compiler fuses what is cheap into all that need it, over and over: but not past a site."""

    def instructions(depth):
        leaves = [draw(1, N, N)] * depth

        def loss(leaves):
            x = X
            for w in leaves:
                x = x + jnp.tanh(x) @ w
            return jnp.sum(x)

        closed = jax.make_jaxpr(loss)(leaves)
        plan, (jaxpr, consts) = analyse(closed, [str(i) for i in range(depth)]), opened(closed)

        def grad(zero, leaves):
            out, vjp = jax.vjp(lambda probes: run(plan, jaxpr, [*consts, *leaves], probes, zero)[:2], probes_for(plan))
            return vjp(jax.tree.map(jnp.ones_like, out))

        return jax.jit(grad).lower(zero_token(), leaves).compile().as_text().count(" = ")

    few, more, most = map(instructions, (4, 8, 16))
    assert most - more < 2.2 * (more - few)
