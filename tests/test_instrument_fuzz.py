"""Two hundred programs at random: every ||delta|| of the report against finite differences of the same program in NumPy.

A program is a list of steps on a state h [B, N]; it is written once for jax and once for NumPy, which share nothing but the list.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from vgrad.diagnose import rows_of
from vgrad.instrument import probes_for, run
from vgrad.jaxprs import opened
from vgrad.probes import zero_token
from vgrad.sites import analyse

pytestmark = pytest.mark.xdist_group("instrument_fuzz")  # all compile the same few hundred operations: one process for all

B, N, T = 2, 3, 2
FORMS = ["plain", "transposed", "stacked", "flat", "scaled", "masked", "broadcast"]
PHIS = ["tanh", "sin", "sigmoid", "silu", "softplus", "square"]
WRAPS = ["none", "none", "jit", "remat", "vmap"]
SHAPES = {"stacked": (2, N, N), "flat": (N * N,), "scan": (T, N, N)}
MASK = np.tril(np.ones((N, N)))


def draw(rng, num_steps, *, loops):
    """Steps as tuples, and the parameters they use by name."""
    steps, params = [], {}

    def weights(form):
        name = f"p{len(params):02}"
        params[name] = rng.normal(size=SHAPES.get(form, (N, N)))
        return name

    for _ in range(num_steps):
        kind = rng.choice(["dense", "dense", "phi", "norm", "save", "skip", "gate", "roll"])
        if kind == "dense":
            form = str(rng.choice(FORMS))
            old = [(s[1], s[2]) for s in steps if s[0] == "dense"]
            shared = old and rng.random() < 0.15
            form, name = old[rng.integers(len(old))] if shared else (form, weights(form))
            steps.append(("dense", form, name, rng.random() < 0.5, str(rng.choice(WRAPS))))
        else:
            steps.append((str(kind), str(rng.choice(PHIS))))
    if loops:
        at = rng.integers(len(steps) + 1)
        steps.insert(at, ("scan", weights("scan"), bool(rng.random() < 0.5)) if rng.random() < 0.6 else ("cond", weights("plain")))
    return [*steps, ("dense", "plain", weights("plain"), False, "none")], params


def program(steps, xp, phi, weights, dense, scan, cond):
    """Walks the steps, with what differs between jax and NumPy given."""

    def forward(params, h):
        saved = h
        for step in steps:
            if step[0] == "dense":
                h = dense(step, weights(step[1], params[step[2]]), h)
            elif step[0] == "phi":
                h = phi[step[1]](h)
            elif step[0] == "norm":
                h = h - h.mean(-1, keepdims=True)
                h = h / xp.sqrt((h**2).mean(-1, keepdims=True) + 0.1)
            elif step[0] == "save":
                saved = h
            elif step[0] == "skip":
                h = h + saved
            elif step[0] == "gate":
                h = h * phi["sigmoid"](saved)
            elif step[0] == "roll":
                h = xp.concatenate([h[..., 1:], h[..., :1]], -1)
            elif step[0] == "scan":
                h = scan(step, params[step[1]], h, saved)
            else:
                h = cond(step, params[step[1]], h)
        return (xp.sin(h) * (1 + xp.arange(N, dtype=h.dtype)[None])).sum((-2, -1))

    return forward


def in_jax(steps):
    phi = {"tanh": jnp.tanh, "sin": jnp.sin, "sigmoid": jax.nn.sigmoid, "silu": jax.nn.silu, "softplus": jax.nn.softplus,
           "square": jnp.square}  # fmt: skip
    views = {
        "transposed": lambda w: w.T,
        "stacked": lambda w: w[1],
        "flat": lambda w: w.reshape(N, N),
        "scaled": lambda w: 0.5 * w,
        "masked": lambda w: w * MASK,
        "broadcast": lambda w: jnp.broadcast_to(w[:1], (N, N)),
    }

    def dense(step, w, h):
        _, form, _, bias, wrap = step
        if form == "broadcast":
            layer = lambda h: jnp.einsum("bi,bio->bo", h, jnp.broadcast_to(w, (*h.shape[:1], N, N)))  # noqa: E731
            wrap = "none" if wrap == "vmap" else wrap
        else:
            layer = lambda h: h @ w  # noqa: E731
        layer = {"none": lambda f: f, "jit": jax.jit, "remat": jax.checkpoint, "vmap": jax.vmap}[wrap](layer)
        return layer(h) + (0.1 if bias else 0.0)

    def scan(step, ws, h, saved):
        def body(h, w):
            h = jnp.tanh(h @ w) + 0.3 * saved
            return h, h * h

        h, ys = lax.scan(body, h, ws, reverse=step[2])
        return h + ys[0]

    cond = lambda step, w, h: lax.cond(h.sum() < 1e9, lambda h: jnp.tanh(h @ w), lambda h: h, h)  # noqa: E731
    return program(steps, jnp, phi, lambda form, w: views.get(form, lambda w: w)(w), dense, scan, cond)


def in_numpy(steps, deltas):
    """The same, with deltas[i] added to the output of product number i; of deltas [number of products, ..., B, N]."""
    deltas = iter(deltas)
    add = lambda z: z + next(deltas)  # noqa: E731
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    phi = {"tanh": np.tanh, "sin": np.sin, "sigmoid": sigmoid, "silu": lambda z: z * sigmoid(z),
           "softplus": lambda z: np.log1p(np.exp(z)), "square": np.square}  # fmt: skip
    views = {
        "transposed": np.transpose,
        "stacked": lambda w: w[1],
        "flat": lambda w: w.reshape(N, N),
        "scaled": lambda w: w / 2,
        "masked": lambda w: w * MASK,
        "broadcast": lambda w: np.repeat(w[:1], N, 0),
    }

    def scan(step, ws, h, saved):
        ys = []
        for w in ws[::-1] if step[2] else ws:
            h = np.tanh(add(h @ w)) + 0.3 * saved
            ys.append(h * h)
        return h + (ys[-1] if step[2] else ys[0])

    return program(
        steps, np, phi, lambda form, w: views.get(form, lambda w: w)(w),
        lambda step, w, h: add(h @ w) + 0.1 * step[3], scan, lambda step, w, h: np.tanh(add(h @ w)),
    )  # fmt: skip


def measured(steps, params, x):
    """ln ||delta|| of every site in execution order. Without jit: op by op, a hundred programs cost less than to compile one."""
    names, leaves = list(params), [jnp.asarray(p) for p in params.values()]
    forward = in_jax(steps)
    closed = jax.make_jaxpr(lambda leaves, x: forward(dict(zip(names, leaves, strict=True)), x))(leaves, x)
    plan = analyse(closed, names)
    jaxpr, consts = opened(closed)

    def probed(probes):
        (loss,), token, _ = run(plan, jaxpr, [*consts, *leaves, x], probes, zero_token())
        return loss, token

    (loss, token), vjp = jax.vjp(probed, probes_for(plan))
    (stats,) = vjp((jnp.ones_like(loss), jnp.zeros_like(token)))
    readings = [(key, np.asarray(stats[path][index])) for path, site in plan.sites.items() for key, index, _ in rows_of(site)]
    readings.sort(key=lambda r: r[0])
    return float(loss), np.array([0.5 * np.log(r[0]) + np.log(r[1]) + r[4] * np.log(2) for _, r in readings])


@pytest.mark.parametrize("group", range(10))
def test_equals_finite_differences(x64, group):
    for n in range(21):
        rng = np.random.default_rng(1000 * group + n)
        steps, params = draw(rng, rng.integers(3, 9), loops=n == 0)
        x = rng.normal(size=(B, N))
        loss, log_delta = measured(steps, params, jnp.asarray(x))
        num = sum({"dense": 1, "scan": T, "cond": 1}.get(s[0], 0) for s in steps)
        assert len(log_delta) == num, steps
        # Row j of the second axis is the network with entry j of all products' outputs moved.
        unit = np.moveaxis(1e-5 * np.eye(num * B * N).reshape(-1, num, B, N), 1, 0)
        at = lambda deltas: in_numpy(steps, deltas)(params, x)  # noqa: E731
        np.testing.assert_allclose(loss, at(0 * unit[:, 0]), rtol=1e-10, atol=1e-12)
        delta = np.linalg.norm(((at(unit) - at(-unit)) / 2e-5).reshape(num, -1), axis=1)
        np.testing.assert_allclose(np.exp(log_delta), delta, rtol=1e-5, atol=1e-7, err_msg=str(steps))
