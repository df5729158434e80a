"""Models of flax.linen, flax.nnx, equinox and haiku, as they are, against zero taps put in by hand.

The taps go in through each framework's own interception of calls, or by replacing layers with ones that add a zero, or, for loops,
through the same model written out. A comparison returns {site name: zero array}; its gradient is delta.
"""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import vgrad

B, T, N = 3, 4, 8
RNG = np.random.default_rng(1)
IMAGES, ROWS, TOKENS = (RNG.standard_normal(shape, np.float32) for shape in ((B, 6, 6, 2), (B, N), (B, T, N)))


class Zeros:
    """Hands out zeros to add, by name; the first time, under eval_shape, it notes what is asked for."""

    def __init__(self):
        self.shapes, self.values = {}, None

    def __call__(self, name, z):
        if self.values is None:
            self.shapes[name] = z.shape
            return z
        return z + self.values[name]

    def deltas(self, loss):
        """ln ||delta|| at every name, of a loss that calls this object."""
        jax.eval_shape(loss)

        def of(values):
            self.values = values
            return loss()

        grads = jax.jit(jax.grad(of))({name: jnp.zeros(shape) for name, shape in self.shapes.items()})
        with np.errstate(divide="ignore"):
            return {name: np.log(np.linalg.norm(np.asarray(g, np.float64))) for name, g in grads.items()}


def agrees(report, expected, *, at_least):
    found = dict(zip(report.site, report.log_delta, strict=True))
    assert len(found) >= at_least
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=2e-5, err_msg=name)  # same maths, two routes
    assert report.status == tuple("ok" if v > -np.inf else "disconnected" for v in report.log_delta)
    return report


def linen_agrees(model, loss, variables, **options):
    """Taps behind every Dense, DenseGeneral and Conv by flax's interceptor."""
    zeros = Zeros()

    def intercept(call, args, kwargs, context):
        out = call(*args, **kwargs)
        layer = isinstance(context.module, nn.Dense | nn.DenseGeneral | nn.Conv) and context.method_name == "__call__"
        return zeros("/".join(("params", *context.module.path, "kernel")), out) if layer else out

    def tapped():
        with nn.intercept_methods(intercept):
            return loss(variables)

    report = vgrad.diagnose(loss, variables)
    return agrees(report, zeros.deltas(tapped), **options)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3))(x)
        for _ in range(2):
            h = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3), use_bias=False)(x)))
            h = nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3), use_bias=False)(h))
            x = nn.relu(x + h)
        return nn.Dense(3)(x.mean((1, 2)))


@pytest.mark.parametrize("train", [True, False])
def test_linen_resnet_with_batchnorm(train):
    model = ResNet()
    variables = jax.jit(model.init, static_argnums=2)(jax.random.key(3), IMAGES, train)

    def loss(params):
        logits, _ = model.apply(variables | params, IMAGES, train, mutable=["batch_stats"])
        return jnp.mean(nn.log_softmax(logits)[:, 0])

    report = linen_agrees(model, loss, {"params": variables["params"]}, at_least=6)
    assert report.kind == ("conv",) * 5 + ("dot",)
    assert report.activation[:5] == ("relu",) * 5
    assert list(report.depth) == [1, 2, 3, 4, 5, 6]


class Transformer(nn.Module):
    pre: bool

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            for block in (nn.MultiHeadDotProductAttention(2), nn.Sequential([nn.Dense(16), nn.gelu, nn.Dense(N)])):
                norm = nn.LayerNorm()
                x = x + block(norm(x)) if self.pre else norm(x + block(x))
        return nn.Dense(3)(x)


@pytest.mark.parametrize("pre", [True, False])
def test_linen_transformer(pre):
    model = Transformer(pre)
    variables = jax.jit(model.init)(jax.random.key(3), TOKENS)
    report = linen_agrees(model, lambda v: jnp.sum(jnp.sin(model.apply(v, TOKENS))), variables, at_least=13)
    up = report.site.index("params/Dense_0/kernel")
    assert report.activation[up] == "gelu_tanh"
    assert report.depth[up] == 3  # query, key and value side by side, out, and the first of the two


def test_linen_scanned_stack():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(nn.Dense(N, name="dense")(x)), None

    model = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=T)()
    variables = jax.jit(model.init)(jax.random.key(3), ROWS, None)
    report = vgrad.diagnose(lambda v: jnp.sum(model.apply(v, ROWS, None)[0] ** 2), variables)
    zeros, p = Zeros(), variables["params"]["dense"]

    def written_out():
        x = ROWS
        for i in range(T):
            x = jnp.tanh(zeros(f"params/dense/kernel[{i}]", x @ p["kernel"][i] + p["bias"][i][None]))
        return jnp.sum(x**2)

    agrees(report, zeros.deltas(written_out), at_least=T)
    assert list(report.depth) == [1, 2, 3, 4]
    assert report.activation == ("tanh",) * T


def test_linen_lstm_over_time():
    model = nn.RNN(nn.LSTMCell(N))
    variables = jax.jit(model.init)(jax.random.key(3), TOKENS)
    report = vgrad.diagnose(lambda v: jnp.sum(model.apply(v, TOKENS)[:, -1] ** 2), variables)
    zeros = Zeros()
    cell = next(iter(variables["params"].values()))
    prefix = f"params/{next(iter(variables['params']))}"

    def written_out():
        h = c = jnp.zeros((B, N))
        for t in range(T):

            def gate(name, t=t, h=h):
                x = zeros(f"{prefix}/i{name}/kernel[{t}]", TOKENS[:, t] @ cell[f"i{name}"]["kernel"])
                return x + zeros(f"{prefix}/h{name}/kernel[{t}]", h @ cell[f"h{name}"]["kernel"]) + cell[f"h{name}"]["bias"][None]

            c = jax.nn.sigmoid(gate("f")) * c + jax.nn.sigmoid(gate("i")) * jnp.tanh(gate("g"))
            h = jax.nn.sigmoid(gate("o")) * jnp.tanh(c)
        return jnp.sum(h**2)

    agrees(report, zeros.deltas(written_out), at_least=8 * T)
    forget_first = report.status[report.site.index(f"{prefix}/hf/kernel[0]")]
    assert forget_first == "disconnected"  # the first forget gate multiplies a state of zero


def test_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv, self.norm = nnx.Conv(2, N, (3, 3), rngs=rngs), nnx.BatchNorm(N, rngs=rngs)
            self.hidden = nnx.List([nnx.Linear(N, N, rngs=rngs) for _ in range(3)])
            self.out = nnx.Linear(N, 3, rngs=rngs)

        def __call__(self, x, tap=lambda name, z: z):
            x = jax.nn.relu(self.norm(tap("conv/kernel", self.conv(x)))).mean((1, 2))
            for i, layer in enumerate(self.hidden):
                x = jax.nn.silu(tap(f"hidden/{i}/kernel", layer(x)))
            return tap("out/kernel", self.out(x))

    net, zeros = Net(nnx.Rngs(0)), Zeros()
    graph, params, rest = nnx.split(net, nnx.Param, ...)
    loss = lambda p, rest, x, *tap: jnp.sum(jnp.sin(nnx.merge(graph, p, rest)(x, *tap)))  # noqa: E731
    report = vgrad.diagnose(loss, params, rest, IMAGES)
    report = report._replace(site=tuple(s.removesuffix("/value") for s in report.site))
    agrees(report, zeros.deltas(lambda: loss(params, jax.tree.map(jnp.copy, rest), IMAGES, zeros)), at_least=5)
    assert report.activation[:4] == ("relu", "silu", "silu", "silu")


class Encoder(eqx.Module):
    attention: list
    mlp: list
    norms: list
    pre: bool = eqx.field(static=True)

    def __init__(self, pre, key):
        keys = jax.random.split(key)
        self.attention = [eqx.nn.MultiheadAttention(2, N, key=keys[0])]
        self.mlp = [eqx.nn.MLP(N, N, 16, 1, jax.nn.gelu, key=keys[1])]
        self.norms = [eqx.nn.LayerNorm(N) for _ in range(2)]
        self.pre = pre

    def __call__(self, x):  # [T, N], one sample
        for i, norm in enumerate(self.norms):
            block = jax.vmap(self.mlp[i // 2]) if i % 2 else lambda h, i=i: self.attention[i // 2](h, h, h)
            x = x + block(jax.vmap(norm)(x)) if self.pre else jax.vmap(norm)(x + block(x))
        return x


@pytest.mark.parametrize("pre", [True, False])
def test_equinox_transformer(pre):
    model, zeros = Encoder(pre, jax.random.key(4)), Zeros()
    params, static = eqx.partition(model, eqx.is_inexact_array)
    report = vgrad.diagnose(lambda p, x: jnp.sum(jnp.sin(jax.vmap(eqx.combine(p, static))(x))), params, TOKENS)

    def linear(name, layer, h):
        z = h @ layer.weight.T
        return zeros(f"{name}/weight", z if layer.bias is None else z + layer.bias.reshape((1,) * (h.ndim - 1) + (-1,)))

    def written_out():
        x = TOKENS
        for i, norm in enumerate(model.norms):

            def block(h, i=i):
                at, layer = f"attention/{i // 2}", model.attention[i // 2]
                if i % 2:
                    mlp = model.mlp[i // 2]
                    h = jax.nn.gelu(linear(f"mlp/{i // 2}/layers/0", mlp.layers[0], h))
                    return linear(f"mlp/{i // 2}/layers/1", mlp.layers[1], h)
                q, k, v = (
                    linear(f"{at}/{name}_proj", getattr(layer, f"{name}_proj"), h).reshape(B, T, 2, N // 2)
                    for name in ("query", "key", "value")
                )
                weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / (N // 2) ** 0.5, axis=-1)
                return linear(f"{at}/output_proj", layer.output_proj, jnp.einsum("bhts,bshd->bthd", weights, v).reshape(B, T, N))

            normed = jax.vmap(jax.vmap(norm))
            x = x + block(normed(x)) if pre else normed(x + block(x))
        return jnp.sum(jnp.sin(x))

    agrees(report, zeros.deltas(written_out), at_least=6)


def test_equinox_lstm_and_mlp():
    cell, mlp, zeros = eqx.nn.LSTMCell(N, N, key=jax.random.key(5)), eqx.nn.MLP(N, 3, N, 2, key=jax.random.key(6)), Zeros()
    params, static = eqx.partition((cell, mlp), eqx.is_inexact_array)

    def loss(params, xs):
        cell, mlp = eqx.combine(params, static)

        def one(xs):
            start = jnp.zeros(N), jnp.zeros(N)
            (h, _), _ = lax.scan(lambda state, x: (cell(x, state), None), start, xs)
            return jnp.sum(mlp(h) ** 2)

        return jnp.mean(jax.vmap(one)(xs))

    report = vgrad.diagnose(loss, params, TOKENS)

    def written_out():
        h = c = jnp.zeros((B, N))
        for t in range(T):
            gates = zeros(f"0/weight_ih[{t}]", TOKENS[:, t] @ cell.weight_ih.T)
            gates += zeros(f"0/weight_hh[{t}]", h @ cell.weight_hh.T) + cell.bias[None]
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
        for k, layer in enumerate(mlp.layers):
            h = zeros(f"1/layers/{k}/weight", h @ layer.weight.T + layer.bias[None])
            h = jax.nn.relu(h) if k < 2 else h
        return jnp.mean(jnp.sum(h**2, axis=-1))

    agrees(report, zeros.deltas(written_out), at_least=2 * T + 3)


def test_haiku_mlp_and_lstm():
    def net(xs, unroll):
        hs, _ = unroll(hk.LSTM(N), xs, hk.LSTM(N, name="unused").initial_state(B))
        return hk.nets.MLP([N, 3])(hs[-1])

    xs, zeros, count = TOKENS.swapaxes(0, 1), Zeros(), {}
    model = hk.without_apply_rng(hk.transform(lambda xs: net(xs, hk.dynamic_unroll)))
    params = jax.jit(model.init)(jax.random.key(7), xs)
    report = vgrad.diagnose(lambda p, xs: jnp.sum(model.apply(p, xs) ** 2), params, xs)

    def intercept(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if not isinstance(context.module, hk.Linear) or context.method_name != "__call__":
            return out
        name = context.module.module_name
        count[name] = count.get(name, -1) + 1
        return zeros(f"{name}/w" + (f"[{count[name]}]" if "lstm" in name else ""), out)

    def written_out():
        count.clear()
        with hk.intercept_methods(intercept):
            written = hk.without_apply_rng(hk.transform(lambda xs: net(xs, hk.static_unroll)))
            return jnp.sum(written.apply(params, xs) ** 2)

    agrees(report, zeros.deltas(written_out), at_least=T + 2)
