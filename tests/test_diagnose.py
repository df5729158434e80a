"""What the report says of sick and healthy models, that it changes nothing, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import vgrad
from vgrad import losses
from vgrad.diagnosis import following_site

pytestmark = pytest.mark.xdist_group("diagnose")  # its fixtures are costly: one process for all

N, B, DEPTH = 16, 12, 7
X = np.random.default_rng(3).standard_normal((B, N), np.float32)
LABELS = np.arange(B) % N
EYE = np.eye(N, dtype=np.float32)


def draw(i, *shape):
    return np.random.default_rng(i).standard_normal(shape or (N, N), np.float32)


def mlp(scale=2**0.5):
    rng, std = np.random.default_rng(0), np.float32(scale / N**0.5)
    layers = ({"w": std * rng.standard_normal((N, N), np.float32), "b": np.zeros((1, N), np.float32)} for _ in range(DEPTH))
    return {f"layer{i}": layer for i, layer in enumerate(layers)}


def loss_fn(params, x=X, phi=jax.nn.relu):
    for i in range(DEPTH):
        x = x @ params[f"layer{i}"]["w"] + params[f"layer{i}"]["b"]
        x = phi(x) if i < DEPTH - 1 else x
    return losses.cross_entropy(x, LABELS)


def sick(**change):
    params = mlp()
    params["layer3"] = params["layer3"] | change
    return params


@pytest.fixture(scope="module")
def healthy():
    return vgrad.diagnose(loss_fn, mlp(), X)


def test_a_healthy_model(healthy):
    assert healthy.site == tuple(f"layer{i}/w" for i in range(DEPTH))
    assert list(healthy.depth) == list(range(1, DEPTH + 1))
    assert healthy.kind == ("dot",) * DEPTH
    assert healthy.status == ("ok",) * DEPTH
    assert healthy.activation == ("relu",) * (DEPTH - 1) + ("",)
    assert healthy.unused == healthy.unread == healthy.opaque == healthy.non_finite == ()
    assert "HOLDS" in healthy.verdict()
    assert "Try" not in healthy.verdict()


def test_every_column_by_hand(healthy):
    """Forward in NumPy float64, backward by `jax.grad`."""
    params, x, zs = mlp(), np.asarray(X, np.float64), []
    for i in range(DEPTH):
        zs.append(x @ np.asarray(params[f"layer{i}"]["w"], np.float64))
        x = np.maximum(zs[-1], 0)
    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(params)
    by_layer = [params[f"layer{i}"]["w"] for i in range(DEPTH)], [grads[f"layer{i}"]["w"] for i in range(DEPTH)]
    log_w, log_grad_w = ([np.log(np.linalg.norm(np.asarray(a, np.float64))) for a in which] for which in by_layer)
    np.testing.assert_allclose(healthy.log_w, log_w, atol=1e-5)  # same maths, two routes
    np.testing.assert_allclose(healthy.log_grad_w, log_grad_w, atol=1e-5)
    np.testing.assert_allclose(healthy.log_rms_z, [0.5 * np.log(np.mean(z**2)) for z in zs], atol=1e-5)
    off = [z <= 0 for z in zs[:-1]]
    np.testing.assert_allclose(healthy.saturated_fraction[:-1], [o.mean() for o in off], atol=1e-6)
    np.testing.assert_allclose(healthy.dead_fraction[:-1], [o.all(0).mean() for o in off], atol=1e-6)
    np.testing.assert_allclose(healthy.zero_fraction[:-1], [o.mean() for o in off], atol=1e-6)
    assert np.isnan(healthy.dead_fraction[-1])
    np.testing.assert_allclose(healthy.log_gain_forward[:-1], np.diff(healthy.log_rms_z), atol=1e-12)
    np.testing.assert_allclose(healthy.log_gain_backward[:-1], -np.diff(healthy.log_delta), atol=1e-12)
    np.testing.assert_allclose(healthy.loss, [float(loss)], rtol=1e-6)


def test_bias_belongs_to_the_preactivation():
    params = {"w": EYE, "b": np.full((1, N), 3, np.float32)}
    report = vgrad.diagnose(lambda p: jnp.sum(jnp.tanh(X @ p["w"] + p["b"])), params)
    np.testing.assert_allclose(report.log_rms_z, 0.5 * np.log(np.mean((np.asarray(X) + 3) ** 2)), atol=1e-5)
    slope = 1 - np.tanh(np.asarray(X, np.float64) + 3) ** 2
    np.testing.assert_allclose(report.saturated_fraction, (slope < 0.1).mean(), atol=1e-6)


def two_layers(p, x):
    return jnp.mean(jnp.sin(jnp.tanh(x @ p["a"]) @ p["c"]))


@pytest.fixture(scope="module")
def plain():
    return vgrad.diagnose(two_layers, {"a": draw(0), "c": draw(1)}, X)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: lambda p, x: jnp.mean(jax.vmap(f, (None, 0))(p, x[:, None]))])
def test_jit_remat_and_vmap_change_nothing(wrap, plain):
    wrapped = vgrad.diagnose(wrap(two_layers), {"a": draw(0), "c": draw(1)}, X)
    for name, value in plain._asdict().items():
        other = getattr(wrapped, name)
        if isinstance(value, np.ndarray):
            np.testing.assert_allclose(value, other, rtol=2e-5, atol=2e-5, err_msg=name)
        else:
            assert value == other, name


def test_a_dead_layer_is_named():
    report = vgrad.diagnose(loss_fn, sick(b=np.full((1, N), -100, np.float32)), X)
    assert report.status == ("disconnected",) * 6 + ("ok",)
    assert report.dead_fraction[3] == 1
    assert "all units behind layer3/w are dead" in report.verdict()


def test_a_layer_of_zeros_is_named():
    report = vgrad.diagnose(loss_fn, sick(w=np.zeros((N, N), np.float32)), X, jnp.tanh)
    assert report.status == ("disconnected",) * 3 + ("ok",) * 4
    assert "the weights of layer3/w are zero" in report.verdict()


@pytest.mark.parametrize(("scale", "word"), [(1e-30, "VANISHES"), (1e30, "EXPLODES")])
def test_a_layer_out_of_scale_is_named(healthy, scale, word):
    report = vgrad.diagnose(loss_fn, sick(w=scale * mlp()["layer3"]["w"]), X)
    assert f"{word} by a factor 1e{np.log10(scale):+.0f} in one step, from layer3/w to layer2/w" in report.verdict()
    assert "the weights of layer3/w" in report.verdict()
    assert report.log_gain_backward[2] == pytest.approx(healthy.log_gain_backward[2] + np.log(scale), abs=0.5)
    assert "HOLDS" in report.verdict()  # the rest


def test_far_beyond_float32():
    """A chain of numbers: delta_i = a_{i+1} ... a_L in closed form, down to 1e-175 and up to 1e+105."""
    scales = np.float32([1e-35] * 8 + [1e35] * 3)
    params = list(scales[:, None, None])

    def chain(params, x):
        for w in params:
            x = x @ w
        return jnp.sum(x)

    above = np.concatenate([np.cumsum(np.log(scales.astype(float))[:0:-1])[::-1], [0]])
    report = vgrad.diagnose(chain, params, np.ones((1, 1), np.float32))
    np.testing.assert_allclose(report.log_delta, above, rtol=1e-6, atol=1e-4)
    assert set(report.status) == {"ok"}


def test_sigmoid_to_e_minus_700_equals_profile():
    net = vgrad.mlp(N, "sigmoid", N, 4, sigma_w=0.7)
    embed, hidden, readout = (0.7 * draw(i, *shape) / N**0.5 for i, shape in enumerate([(N, N), (398, N, N), (N, 4)]))
    zeros = (np.zeros(w.shape[:-2] + w.shape[-1:], np.float32) for w in (embed, hidden, readout))
    params = vgrad.Params(*map(vgrad.Affine, (embed, hidden, readout), zeros))
    labels = LABELS % 4
    report = vgrad.diagnose(lambda p, x: losses.cross_entropy(net.forward(p, x), labels), params, X)
    prof = vgrad.profile(net, params, (X, labels), loss=losses.cross_entropy)
    assert report.log_delta[0] < -700
    np.testing.assert_allclose(report.log_delta, prof.log_delta[0], rtol=1e-5)  # same maths, two routes
    np.testing.assert_allclose(report.log_grad_w, prof.log_grad_w[0], rtol=1e-5)
    assert report.site[:2] == ("embed/w", "hidden/w[0]")
    assert report.site[-1] == "readout/w"
    assert set(report.activation[:-2]) == {"sigmoid"}
    assert report.rate.value == pytest.approx(
        vgrad.fit.decay_rate(prof.log_delta[None, None], [400]).mean_log.value[0, 0], rel=0.01
    )


def test_the_advice_has_numbers():
    report = vgrad.diagnose(loss_fn, mlp(0.4), X, jnp.tanh)
    verdict = report.verdict()
    assert "VANISHES" in verdict
    assert "critical sigma_w of tanh, 1 " in verdict  # chi_1 = sigma_w^2 at sigma_b = 0
    by = float(verdict.split("multiply them by ")[1].split(".\n")[0])
    assert by == pytest.approx(1 / 0.4, rel=4 / N)  # the std of 16 x 16 draws, median of six: 4 standard errors and more
    assert "0.38 f(x)" in verdict  # 1 / sqrt(7)


def test_value_and_gradient_stay_as_they_are():
    from vgrad.instrument import probes_for, run
    from vgrad.probes import zero_token
    from vgrad.sites import analyse

    params = mlp()
    leaves, tree = jax.tree.flatten(params)
    closed = jax.make_jaxpr(lambda leaves: loss_fn(jax.tree.unflatten(tree, leaves)))(leaves)
    plan = analyse(closed, [str(i) for i in range(len(leaves))])
    assert len(plan.sites) == DEPTH

    def probed(leaves):
        (loss,), _, _ = run(plan, closed.jaxpr, [*closed.consts, *leaves], probes_for(plan), zero_token())
        return loss

    value, grads = jax.jit(jax.value_and_grad(probed))(leaves)
    expected, expected_grads = jax.jit(jax.value_and_grad(loss_fn))(params)
    assert value == expected
    # The gradients come in other units, a power of two for each use, and are otherwise the same.
    for mine, theirs in zip(grads, jax.tree.leaves(expected_grads), strict=True):
        unit = 2.0 ** np.round(np.log2(np.linalg.norm(mine) / np.linalg.norm(theirs)))
        np.testing.assert_allclose(mine / unit, theirs, rtol=1e-5, atol=1e-9)


def test_shared_parameters_appear_at_every_use():
    params = {"w": draw(0) / 4, "e": draw(1), "n": np.ones((N, N), np.float32)}

    def loss(p, tokens):
        h = jnp.tanh(jnp.tanh(p["e"][tokens] @ p["w"]) @ p["w"])
        return jnp.sum((h @ p["e"].T) ** 2)

    report = vgrad.diagnose(loss, params, LABELS)
    assert report.site == ("w", "w#2", "e")
    assert report.unused == ("n",)
    separate = lambda w1, w2, e: jnp.sum((jnp.tanh(jnp.tanh(params["e"][LABELS] @ w1) @ w2) @ e.T) ** 2)  # noqa: E731
    grads = jax.jit(jax.grad(separate, (0, 1, 2)))(params["w"], params["w"], params["e"])
    np.testing.assert_allclose(report.log_grad_w, [np.log(np.linalg.norm(g)) for g in grads], atol=1e-5)


def test_unused_and_unread_parameters_are_reported():
    shapes = {"w": (N, N), "e": (5, N), "stopped": (N, N), "b": (1, N), "never": (3,)}
    params = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}

    def loss(p, x):
        x = (p["e"][np.arange(B) % 5] + x) @ p["w"] + p["b"]
        return jnp.sum(x * lax.stop_gradient(x @ p["stopped"]))

    report = vgrad.diagnose(loss, params, X)
    assert set(report.unused) == {"stopped", "never"}
    assert report.unread == ("e",)
    assert report.status[report.site.index("stopped")] == "disconnected"
    assert "stop" in report.verdict()


def test_taps():
    params = {"e": np.ones((5, N), np.float32), "scale": np.ones((1, N), np.float32)}

    def loss(p, tokens):
        h = vgrad.tap(p["e"][tokens], "embedding")
        return jnp.sum(jnp.sin(h * vgrad.tap(p["scale"], "scale")) ** 2)

    report = vgrad.diagnose(loss, params, LABELS % 5)
    assert report.site == ("embedding", "scale")
    assert report.kind == ("tap", "tap")
    of_scale = jax.jit(jax.grad(loss))(params, LABELS % 5)["scale"]
    np.testing.assert_allclose(report.log_delta[1], np.log(np.linalg.norm(of_scale)), atol=1e-5)
    assert np.isnan(report.log_grad_w).all()
    with pytest.raises(TypeError, match="name of a tap"):
        vgrad.tap(X, 3)


@jax.custom_vjp
def own_derivative(w, x):
    return x @ w


own_derivative.defvjp(lambda w, x: (x @ w, (w, x)), lambda res, c: (res[1].T @ c, c @ res[0].T))


@jax.custom_jvp
def own_jvp(w, x):
    return x @ w


own_jvp.defjvp(lambda primals, tangents: (own_jvp(*primals), tangents[1] @ primals[0] + primals[1] @ tangents[0]))


def counted(w, x):
    return lax.stop_gradient(lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] @ w), (0, x))[1])


def sharded(w, x):
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("rows")
    return jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(jax.sharding.PartitionSpec(), spec), out_specs=spec)(w, x)


@pytest.mark.parametrize("inner", [own_derivative, counted, sharded])
def test_what_is_not_entered_is_named(inner):
    params = {"a": draw(0), "q": draw(1) / 4}
    report = vgrad.diagnose(lambda p, x: jnp.sum(jnp.sin(x @ p["a"] + inner(p["q"], x))), params, X)
    assert set(report.opaque) == {"q"}
    row = report.site.index("q")
    assert report.kind[row] == report.status[row] == "opaque"
    assert "q" in report.verdict()
    if inner is not counted:
        grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(X @ p["a"] + X @ p["q"]))))(params)
        np.testing.assert_allclose(report.log_grad_w[row], np.log(np.linalg.norm(grads["q"])), atol=1e-5)


def test_a_custom_jvp_with_one_product_is_a_product():
    params = {"q": draw(1) / 4}
    report = vgrad.diagnose(lambda p, x: jnp.sum(jnp.sin(own_jvp(p["q"], x))), params, X)
    assert (report.site, report.kind, report.status) == (("q",), ("dot",), ("ok",))
    grad = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(X @ p["q"]))))(params)["q"]
    np.testing.assert_allclose(report.log_grad_w, np.log(np.linalg.norm(grad)), atol=1e-5)


def test_a_branch_that_is_not_taken():
    params = {name: np.ones((N, N), np.float32) for name in "ac"}
    loss = lambda p, x: jnp.sum(lax.cond(x[0, 0] > 1e3, lambda: x @ p["a"], lambda: x @ p["c"]))  # noqa: E731
    report = vgrad.diagnose(loss, params, X)
    assert dict(zip(report.site, report.status, strict=True)) == {"a": "not run", "c": "ok"}


def test_several_batches_and_keys():
    batches = [(draw(i, B, N),) for i in range(2)]
    singles = [vgrad.diagnose(loss_fn, mlp(), *b) for b in batches]
    both, log_delta = vgrad.diagnose(loss_fn, mlp(), batches=batches), np.array([r.log_delta for r in singles])
    np.testing.assert_allclose(both.log_delta, log_delta.mean(0), atol=1e-6)
    np.testing.assert_allclose(both.spread["log_delta"], log_delta.std(0, ddof=1), atol=1e-6)
    np.testing.assert_allclose(both.loss, np.concatenate([r.loss for r in singles]), rtol=1e-6)


def test_float64_and_half_precision(x64):
    params = jax.tree.map(np.float64, mlp())
    report = vgrad.diagnose(loss_fn, params, np.float64(X))
    grads = jax.jit(jax.grad(loss_fn))(params, np.float64(X))
    np.testing.assert_allclose(report.log_grad_w, [np.log(np.linalg.norm(g["w"])) for g in grads.values()], atol=1e-12)
    half = vgrad.diagnose(loss_fn, jax.tree.map(lambda a: a.astype(jnp.bfloat16), mlp()), X.astype(jnp.bfloat16))
    np.testing.assert_allclose(half.log_delta, report.log_delta, atol=0.1)  # bfloat16 keeps two digits


def test_report_as_text_and_dataframe(healthy):
    table = healthy.table().splitlines()
    assert len(table) == 2 + DEPTH
    assert len({len(line.rstrip()) for line in table[2:-1]}) == 1
    import pandas

    frame = healthy.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.site) == list(healthy.site)
    assert str(healthy).startswith(healthy.table())
    assert healthy.verdict() in str(healthy)


def test_rate_of_roles_and_jumps(healthy):
    """Two roles at offsets of their own, falling by 0.5 a layer, and one step of -20 that is no part of the trend."""
    depth = np.repeat(np.arange(1, 11), 2)
    log_delta = 0.5 * depth + np.tile([0, -4.0], 10) - 20 * (depth <= 4)
    following = following_site(depth)
    gain = np.where(following >= 0, log_delta - log_delta[following], np.nan)
    names = tuple(f"block{d}/{r}" for d in range(10) for r in "qv")
    made = {f: np.zeros(20) for f in ("log_w", "dead_fraction", "saturated_fraction", "log_rms_z")}
    report = healthy._replace(site=names, kind=("dot",) * 20, depth=depth, log_delta=log_delta, log_gain_backward=gain,
                              status=("ok",) * 20, activation=("",) * 20, num_units=np.full(20, N), **made)  # fmt: skip
    assert report.rate.value == pytest.approx(-0.5, abs=0.05)
    assert "from block4/q to block3/" in report.verdict()


def bad_params():
    return {"w": EYE, "count": np.int32(0)}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: vgrad.diagnose(lambda p, x: x @ p["w"], {"w": EYE}, X), ValueError, "expected a scalar"),
        (lambda: vgrad.diagnose(lambda p, x: (jnp.sum(x @ p), 1), EYE, X), ValueError, "has_aux=True"),
        (lambda: vgrad.diagnose(lambda p, x: jnp.sum(x @ p), EYE, X, has_aux=True), ValueError, "pair"),
        (lambda: vgrad.diagnose(lambda p: jnp.sum(X @ p).astype(jnp.int32), EYE), ValueError, "real float"),
        (lambda: vgrad.diagnose(loss_fn, bad_params(), X), TypeError, "count has dtype int32"),
        (lambda: vgrad.diagnose(loss_fn, {"w": np.complex64(EYE)}, X), TypeError, "complex64"),
        (lambda: vgrad.diagnose(lambda p: float(jnp.sum(p)), EYE), TypeError, "cannot be traced"),
        (lambda: vgrad.diagnose(lambda p: jnp.sum(np.sin(p)), EYE), TypeError, "cannot be traced"),
        (lambda: vgrad.diagnose(3, EYE), TypeError, "expected a function"),
        (lambda: vgrad.diagnose(loss_fn, {}, X), ValueError, "no array leaves"),
        (lambda: vgrad.diagnose(lambda p: jnp.sum(p["a"] * 2), {"a": np.ones(3, np.float32)}), ValueError, "no site found"),
        (lambda: vgrad.diagnose(loss_fn, mlp(), X, batches=[(X,)]), ValueError, "one or the other"),
        (lambda: vgrad.diagnose(loss_fn, mlp(), batches=[]), ValueError, "empty"),
        (lambda: vgrad.diagnose(lambda p, x: jnp.sum(x @ p), EYE, batches=[(X,), (X[:1],)]), ValueError, "differ"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_nan_in_the_parameters_is_reported():
    w = mlp()["layer3"]["w"]
    w[0, 0] = np.nan
    report = vgrad.diagnose(loss_fn, sick(w=w), X)
    assert report.non_finite == ("layer3/w",)
    assert report.status[3] == "non-finite"
    assert "layer3/w" in report.verdict()
    assert "NON-FINITE" in report.verdict()


def test_a_loss_that_looks_at_its_arguments():
    loss = lambda p, x, n: jnp.sum(x @ p) if x[0, 0] < 1e9 else None  # noqa: E731
    report = vgrad.diagnose(loss, EYE, X, np.arange(3))
    np.testing.assert_allclose(report.log_delta, 0.5 * np.log(B * N), atol=1e-6)
    with pytest.raises(TypeError, match="cannot be traced"):
        vgrad.diagnose(loss, EYE, batches=[(X, 0), (X, 0)])


def test_a_long_table_is_cut_in_the_middle(healthy):
    lines = healthy.table(4).splitlines()
    assert len(lines) == 2 + 4 + 1
    assert lines[4] == "... 3 rows ..."
    assert "layer0/w" in lines[2]
    assert "layer6/w" in lines[-1]


def test_figure(healthy):
    from vgrad import plots

    figure = plots.diagnosis(healthy)
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), healthy.log_delta)
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == list(healthy.site)
    dead = vgrad.diagnose(loss_fn, sick(w=np.zeros((N, N), np.float32)), batches=[(X,), (2 * X,)])
    crosses = plots.diagnosis(dead).axes[0].lines[-1]
    assert list(crosses.get_xdata()) == [i for i, s in enumerate(dead.status) if s == "disconnected"]


def weight_norm(p, x):
    return x @ (p["a"] * (jnp.sqrt(jnp.float32(N)) / jnp.linalg.norm(p["a"], axis=0))[None])


def spectral_norm(p, x):
    u = lax.stop_gradient(jnp.tanh(p["a"] @ x[0]))
    return x @ (p["a"] / jnp.linalg.norm(u))


def low_rank(p, x):
    return x @ (p["a"] + 0.1 * (p["b"][:, :2] @ p["c"][:2]))


def fused(p, x):
    return x @ jnp.concatenate([p["a"], p["b"]], axis=1)


def stacked(p, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, jnp.stack([p["a"], p["b"], p["c"]]))[0]


def chosen(p, x):
    return jnp.einsum("bi,bio->bo", x, jnp.stack([p["a"], p["b"]])[jnp.argmax(x[:, :2], axis=-1)])


def closed_over(p, x):
    h = X * p["b"][:1]  # computed from a parameter and nothing else that the program shows
    return (h @ p["a"]) @ (h @ p["c"]).T


@pytest.mark.parametrize(
    ("layer", "rows"),
    [
        (weight_norm, {"a": "a"}),
        (spectral_norm, {"a#2": "a"}),
        (low_rank, {"a": "a", "c": "c"}),
        (fused, {"a+b": "ab"}),
        (stacked, {"a+b+c[0]": "a", "a+b+c[1]": "b", "a+b+c[2]": "c"}),
        (chosen, {"a+b": "ab"}),
        (closed_over, {"a": "a", "c": "c"}),
    ],
)
def test_weights_computed_from_parameters(layer, rows):
    """Through normalisation, factors, concatenation and choice, dJ/dW is that of the leaves, all roads from them included."""
    params = {k: draw(i) / 4 for i, k in enumerate("abc")}
    loss = lambda p, x: jnp.sum(jnp.sin(layer(p, x)) ** 2)  # noqa: E731
    report = vgrad.diagnose(loss, params, X)
    grads = jax.jit(jax.grad(loss))(params, X)
    found = {s: v for s, v, status in zip(report.site, report.log_grad_w, report.status, strict=True) if status == "ok"}
    assert found.keys() == rows.keys()
    for site, leaves in rows.items():
        expected = 0.5 * np.log(sum(np.sum(np.square(np.asarray(grads[k], np.float64))) for k in leaves))
        np.testing.assert_allclose(found[site], expected, atol=1e-5, err_msg=site)  # same maths, two routes


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scanned_block_may_start_with_its_activation(reverse):
    """It then acts on what the iteration before left, or on what came into the loop: as in the same network written out."""
    draws = np.float32(1.2 / N**0.5) * draw(0, DEPTH, N, N)
    params = {"in": draws[0], "stack": draws[1:-1], "out": draws[-1]}
    turns = range(4, -1, -1) if reverse else range(5)

    def scanned(params):
        h, _ = lax.scan(lambda h, w: (jax.nn.relu(h) @ w, None), X @ params["in"], params["stack"], reverse=reverse)
        return jnp.sum(jnp.square(jax.nn.relu(h) @ params["out"]))

    def written_out(params):
        h = X @ params["in"]
        for i in turns:
            h = jax.nn.relu(h) @ params["stack"][i]
        return jnp.sum(jnp.square(jax.nn.relu(h) @ params["out"]))

    report, expected = vgrad.diagnose(scanned, params), vgrad.diagnose(written_out, params)
    assert report.activation == expected.activation
    assert (expected.dead_fraction[:5] > 0).any()
    for field in ("dead_fraction", "saturated_fraction"):
        np.testing.assert_allclose(getattr(report, field)[:5], getattr(expected, field)[:5])
        assert np.isnan(getattr(report, field)[5:]).all()  # what acts on the last turn comes after the loop


def test_loops_in_loops_may_start_with_their_activations():
    draws = np.float32(1.2 / N**0.5) * draw(0, 6, N, N)
    params = {"in": draws[0], "mid": draws[1:3], "inner": draws[2:].reshape(2, 2, N, N)}

    def looped(params):
        def outer(h, ws):
            mid, inner = ws
            h = jnp.tanh(h) @ mid  # of what came in, then of the inner loop's last turn
            return lax.scan(lambda h, w: (jax.nn.relu(h) @ w, None), h, inner)[0], None

        return jnp.sum(lax.scan(outer, X @ params["in"], (params["mid"], params["inner"]))[0] ** 2)

    def written_out(params):
        h = X @ params["in"]
        for i in range(2):
            h = jnp.tanh(h) @ params["mid"][i]
            for w in params["inner"][i]:
                h = jax.nn.relu(h) @ w
        return jnp.sum(h**2)

    report, expected = vgrad.diagnose(looped, params), vgrad.diagnose(written_out, params)
    known = ["inner[0,1]" not in name and "inner[1,1]" not in name for name in report.site]
    assert sum(known) == 5
    for field in ("dead_fraction", "saturated_fraction"):
        np.testing.assert_allclose(getattr(report, field)[known], getattr(expected, field)[known])


# Which axes are units, and which part of a product an activation sees.


HALF = {"w": draw(0, 8, 16), "b": np.where(np.arange(16) < 8, np.float32(-100), np.float32(0))[None], "v": draw(3, 16, 2)}
ROUNDABOUT = {
    "transposed": lambda z: jax.nn.relu(z.T).T,
    "in heads": lambda z: jax.nn.relu(z.reshape(-1, 4, 4)).reshape(z.shape),
    "with an axis more": lambda z: jax.nn.relu(z[:, None])[:, 0],
    "samples in two": lambda z: jax.nn.relu(z.reshape(2, -1, 16)).reshape(z.shape),
}


@pytest.mark.parametrize("way", ROUNDABOUT.values(), ids=list(ROUNDABOUT))
def test_dead_units_are_counted_wherever_their_axis_went(way):
    x = draw(1, 16, 8)  # as many samples as units: shapes do not tell which is which
    report = vgrad.diagnose(lambda p: jnp.sum((way(x @ p["w"] + p["b"]) @ p["v"]) ** 2), HALF)
    assert report.dead_fraction[0] == 0.5


def test_dead_units_of_a_layer_mapped_over_the_samples():
    x = draw(1, 16, 8)
    layer = lambda p, x: jax.nn.relu(p["w"].T @ x + p["b"][0])  # noqa: E731
    report = vgrad.diagnose(lambda p: jnp.sum((jax.vmap(lambda x: layer(p, x))(x) @ p["v"]) ** 2), HALF)
    assert report.dead_fraction[0] == 0.5


# Four experts of 16 units on 16 samples each; of the first all units are dead, of the second half of them.
EXPERTS = {"w": draw(0, 4, 8, 16), "b": np.zeros((4, 1, 16), np.float32), "v": draw(1, 4, 16, 2)}
EXPERTS["b"][0], EXPERTS["b"][1, :, :8] = -100, -100
FOUR = draw(2, 4, 16, 8)


def mlp_of(p, x):
    return jax.nn.relu(x @ p["w"] + p["b"]) @ p["v"]


def over_stacked_layers(p):
    """Two times the layer of all experts, in a loop over both."""
    twice = {k: jnp.stack([p[k], p[k]]) for k in ("w", "b")}
    layer = lambda h, q: (h + jax.nn.relu(h @ q["w"] + q["b"])[:, :, 8:], None)  # noqa: E731
    return jax.lax.scan(layer, FOUR, twice)[0]


@pytest.mark.parametrize(
    "experts",
    [
        lambda p: jax.vmap(mlp_of)(p, FOUR),
        lambda p: jax.vmap(mlp_of, in_axes=(0, None))(p, FOUR[0]),
        lambda p: jax.nn.relu(jnp.einsum("ebi,eio->beo", FOUR, p["w"]) + p["b"][:, 0][None]) @ p["v"][0],
        lambda p: jax.vmap(mlp_of)(p | {"w": p["w"] / jnp.linalg.norm(p["w"], axis=1, keepdims=True)}, FOUR),
        lambda p: jax.vmap(mlp_of)({k: jnp.stack(list(v)) for k, v in p.items()}, FOUR),
        over_stacked_layers,
    ],
    ids=["mapped", "the same data", "einsum", "normalised", "a list", "in a loop"],
)
def test_every_expert_has_units_of_its_own(experts):
    report = vgrad.diagnose(lambda p: jnp.sum(experts(p) ** 2), EXPERTS)
    np.testing.assert_allclose(report.dead_fraction[0], (1 + 1 / 2) / 4)
    assert report.num_units[0] == 64


@pytest.mark.parametrize("many", [lambda w: jnp.broadcast_to(w, (16, *w.shape)), lambda w: 2 * jnp.tile(w[None], (16, 1, 1))])
def test_weights_broadcast_to_the_samples_have_the_units_of_one(many):
    x = draw(1, 16, 8)
    z = lambda p: jnp.einsum("bi,bio->bo", x, many(p["w"])) + p["b"]  # noqa: E731
    report = vgrad.diagnose(lambda p: jnp.sum((jax.nn.relu(z(p)) @ p["v"]) ** 2), HALF)
    assert report.dead_fraction[0] == 0.5
    assert report.num_units[0] == 16


def test_weights_looked_up_by_data_are_of_their_samples():
    p, x, which = EXPERTS, draw(1, 16, 8), np.arange(16) % 4
    loss = lambda p, which: jnp.sum(jax.nn.relu(jnp.einsum("bi,bio->bo", x, p["w"][which]) + p["b"][1]) ** 2)  # noqa: E731
    report = vgrad.diagnose(loss, p, which)
    assert report.num_units[0] == 16
    assert report.dead_fraction[0] == 0.5


def test_units_that_a_reshape_mixed_with_samples_are_not_counted():
    x = draw(1, 12, 8)
    report = vgrad.diagnose(lambda p: jnp.sum(jax.nn.relu((x @ p["w"] + p["b"]).reshape(8, 24)) ** 2), HALF)
    assert report.activation[0] == "relu"
    assert np.isnan(report.dead_fraction[0])
    assert 0.5 <= report.saturated_fraction[0] <= 1


def test_a_gate_on_another_half_is_no_silu():
    x, params = draw(2, 64, 8), {"w": draw(0, 8, 16), "v": draw(1, 8, 2)}
    report = vgrad.diagnose(lambda p: jnp.sum((jax.nn.glu(x @ p["w"]) @ p["v"]) ** 2), params)
    gate = 1 / (1 + np.exp(-(x @ params["w"])[:, 8:].astype(np.float64)))
    assert report.activation[0] == "sigmoid"
    np.testing.assert_allclose(report.saturated_fraction[0], np.mean(gate * (1 - gate) < 0.1 / 4), atol=1e-6)
    itself = vgrad.diagnose(lambda p: jnp.sum(((lambda z: z * jax.nn.sigmoid(z))(x @ p["w"])[:, :8] @ p["v"]) ** 2), params)
    assert itself.activation[0] == "silu"


def test_float16_weights_of_many_samples_that_agree():
    x, w = jnp.full((8192, 4), 20, jnp.float16), jnp.full((4, 1), 0.1, jnp.float16)
    report = vgrad.diagnose(lambda w: jnp.mean((x @ w).astype(jnp.float32)), w)
    np.testing.assert_allclose(report.log_grad_w, np.log(40), atol=2e-3)
