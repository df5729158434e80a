"""The two losses against optax, the gradient formulas of the module and finite differences."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vgrad import losses

BATCH, OUT = 6, 4
RNG = np.random.default_rng(0)
Y: Any = RNG.normal(size=(BATCH, OUT)).astype(np.float32) * 3
TARGET: Any = RNG.normal(size=(BATCH, OUT)).astype(np.float32)
LABELS = np.array([0, 3, 1, 2, 3, 0])


def softmax(y):
    e = np.exp(np.asarray(y, np.float64) - y.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_squared_error_and_its_gradient():
    J, g = jax.jit(jax.value_and_grad(losses.squared_error))(Y, TARGET)
    np.testing.assert_allclose(J, sum(np.sum((y - t) ** 2) for y, t in zip(Y, TARGET, strict=True)) / (2 * BATCH), rtol=1e-5)
    np.testing.assert_allclose(g, (Y - TARGET) / BATCH, rtol=1e-5)  # as the module says
    J_optax, g_optax = jax.jit(jax.value_and_grad(lambda y: jnp.sum(optax.l2_loss(y, TARGET)) / BATCH))(Y)
    np.testing.assert_allclose(J, J_optax, rtol=1e-5)
    np.testing.assert_allclose(g, g_optax, rtol=1e-5)


def test_cross_entropy_and_its_gradient():
    J, g = jax.jit(jax.value_and_grad(lambda y: losses.cross_entropy(y, LABELS)))(Y)
    np.testing.assert_allclose(J, -np.mean(np.log(softmax(Y)[np.arange(BATCH), LABELS])), rtol=1e-5)
    np.testing.assert_allclose(g, (softmax(Y) - np.eye(OUT)[LABELS]) / BATCH, atol=1e-6)  # as the module says
    labels = LABELS.astype(np.int32)
    by_optax = lambda y: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(y, labels))  # noqa: E731
    J_optax, g_optax = jax.jit(jax.value_and_grad(by_optax))(Y)
    np.testing.assert_allclose(J, J_optax, rtol=1e-5)
    np.testing.assert_allclose(g, g_optax, atol=1e-6)


def test_gradients_equal_finite_differences(x64):
    y, target = Y.astype(np.float64), TARGET.astype(np.float64)
    for loss in (lambda y: losses.squared_error(y, target), lambda y: losses.cross_entropy(y, LABELS)):
        chex.assert_numerical_grads(jax.jit(loss), (y,), order=1, atol=1e-6)


def test_the_loss_does_not_grow_with_the_batch():
    def twice(a) -> Any:
        return np.concatenate([a, a])

    for loss, t in ((losses.squared_error, TARGET), (losses.cross_entropy, LABELS.astype(np.int32))):
        np.testing.assert_allclose(jax.jit(loss)(twice(Y), twice(t)), jax.jit(loss)(Y, t), rtol=1e-6)


def test_cross_entropy_of_huge_logits():
    """The gradient is bounded, and the loss the distance to the largest logit."""
    y = np.array([[1e30, 0.0, -1e30], [0.0, 1e4, -1e4]], np.float32)
    labels = np.array([0, 2])
    J, g = jax.jit(jax.value_and_grad(lambda y: losses.cross_entropy(y, labels)))(y)
    np.testing.assert_allclose(J, 2e4 / 2, rtol=1e-6)
    np.testing.assert_allclose(g, [[0, 0, 0], [0, 0.5, -0.5]], atol=1e-6)


def test_traced_labels_equal_known_labels():
    traced = jax.jit(losses.cross_entropy)
    kinds = [LABELS.astype(np.int32), LABELS.astype(np.uint8), LABELS.tolist()]
    known = jax.jit(lambda y: [losses.cross_entropy(y, labels) for labels in kinds])(Y)
    np.testing.assert_allclose(known, [traced(Y, kinds[i]) for i in (0, 1, 0)], rtol=1e-6)


@pytest.mark.parametrize("bad", [OUT, -1, 1000])
def test_labels_out_of_range(bad):
    labels = LABELS.astype(np.int32)
    labels[2] = bad
    message = f"labels contain {bad}, expected 0..{OUT - 1}: y has {OUT} columns"
    with pytest.raises(ValueError, match=message):
        losses.cross_entropy(Y, labels)
    with pytest.raises(ValueError, match=message):  # labels are known while y is traced
        jax.jit(jax.grad(lambda y: losses.cross_entropy(y, labels)))(Y)
    J, g = jax.device_get(jax.jit(jax.value_and_grad(losses.cross_entropy))(Y, labels))
    assert np.isnan(J)
    assert np.isnan(g[2]).all()  # its own row, never a plausible number
    assert np.isfinite(np.delete(g, 2, axis=0)).all()


def test_traced_bad_labels_stay_in_their_own_lane():
    lanes = np.stack([LABELS, LABELS + 1]).astype(np.int32)
    J = jax.device_get(jax.jit(jax.vmap(losses.cross_entropy))(np.stack([Y, Y]), lanes))
    assert np.isfinite(J[0])
    assert np.isnan(J[1])


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (LABELS[:5], ValueError, r"labels have shape \(5,\), expected \(6,\)"),
        (LABELS[:, None], ValueError, r"labels have shape \(6, 1\), expected \(6,\)"),
        (np.eye(OUT)[LABELS], ValueError, r"labels have shape \(6, 4\)"),
        (0, ValueError, r"labels have shape \(\)"),
        (LABELS.astype(np.float32), TypeError, "labels have dtype float32, expected integers"),
        (LABELS > 0, TypeError, "labels have dtype bool"),
    ],
)
def test_labels_of_another_kind(labels, error, message):
    with pytest.raises(error, match=message):
        losses.cross_entropy(Y, labels)
    with pytest.raises(error, match=message):
        jax.eval_shape(losses.cross_entropy, Y, np.asarray(labels))


def test_outputs_of_another_shape():
    for target in (TARGET[:, :3], TARGET[0], TARGET[:1], TARGET[..., None]):
        with pytest.raises(ValueError, match=r"target has shape .*, expected that of y, \(6, 4\)"):
            losses.squared_error(Y, target)
    with pytest.raises(ValueError, match=r"y has shape \(6,\), expected \[B, out_dim\]"):
        losses.cross_entropy(Y[:, 0], LABELS)


def test_a_nan_in_the_outputs_is_a_nan_in_the_loss():
    y = Y.copy()
    y[1, 2] = np.nan
    assert np.isnan(jax.jit(losses.squared_error)(y, TARGET))
    J, g = jax.device_get(jax.jit(jax.value_and_grad(lambda y: losses.cross_entropy(y, LABELS)))(y))
    assert np.isnan(J)
    assert np.isnan(g[1]).all()
    assert np.isfinite(np.delete(g, 1, axis=0)).all()
