"""Data files of the user's own: what is taken, and what is said about what is not."""

import numpy as np
import pytest

from vgrad import data

RNG = np.random.default_rng(0)
ROWS = RNG.normal(3.0, 2.0, (20, 5))
LABELS = np.arange(20) % 4


def test_digits_are_those_of_scikit_learn_standardised():
    from sklearn.datasets import load_digits

    source, (raw, labels) = data.digits(), load_digits(return_X_y=True)
    live = raw.std(axis=0) > 0
    expected = (raw[:, live] - raw[:, live].mean(axis=0)) / raw[:, live].std(axis=0)
    np.testing.assert_allclose(source.x[:, live], expected, atol=1e-5)
    assert not source.x[:, ~live].any()  # constant pixels
    np.testing.assert_array_equal(source.t, labels)
    assert source.out_dim == 10


def test_npz_and_npy_hold_the_same(tmp_path):
    np.savez(tmp_path / "a.npz", x=ROWS, y=LABELS)
    np.save(tmp_path / "a.npy", np.column_stack([ROWS, LABELS]))
    a, b = (data.load(tmp_path / name) for name in ("a.npz", "a.npy"))
    np.testing.assert_array_equal(a.x, b.x)
    np.testing.assert_array_equal(a.t, b.t)
    assert a.t.dtype == np.int32
    assert (a.name, a.out_dim) == ("a.npz", 4)
    np.testing.assert_allclose([a.x.mean(axis=0), a.x.std(axis=0)], [np.zeros(5), np.ones(5)], atol=1e-6)


def test_targets_that_are_not_whole_are_a_regression(tmp_path):
    np.savez(tmp_path / "a.npz", x=ROWS, y=ROWS[:, :2])
    np.savez(tmp_path / "b.npz", x=ROWS, y=ROWS[:, 0])
    a, b = data.load(tmp_path / "a.npz"), data.load(tmp_path / "b.npz")
    assert (a.t.dtype, a.t.shape, a.out_dim) == (np.float32, (20, 2), 2)
    assert (b.t.shape, b.out_dim) == ((20, 1), 1)


def test_a_batch_is_drawn_without_replacement_and_by_seed():
    source = data.Data("rows", np.float32(ROWS), np.int32(np.arange(20)))
    x, t = source.batch(20, 0)
    assert sorted(t) == list(range(20))
    np.testing.assert_array_equal(x, source.x[t])
    np.testing.assert_array_equal(source.batch(7, 1)[1], source.batch(7, 1)[1])
    assert list(source.batch(7, 1)[1]) != list(source.batch(7, 2)[1])
    for size in (0, 21):
        with pytest.raises(ValueError, match=f"batch size is {size}, expected 1..20"):
            source.batch(size, 0)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (dict(x=ROWS), r"holds the arrays \['x'\], expected x and y"),
        (dict(x=np.where(ROWS[3, 2] == ROWS, np.nan, ROWS), y=LABELS), r"x in .* has 1 entries NaN or inf, the first at \(3, 2\)"),
        (dict(x=ROWS, y=np.where(LABELS == 3, np.inf, LABELS)), "y in .* has 5 entries NaN or inf"),
        (dict(x=ROWS, y=LABELS[:-1]), r"x has shape \(20, 5\) and y \(19,\)"),
        (dict(x=ROWS[0], y=LABELS), r"x has shape \(5,\)"),
        (dict(x=ROWS, y=LABELS - 1), "has the label -1, expected 0, 1"),
        (dict(x=ROWS.astype(str), y=LABELS), "x in .* has dtype <U.*, expected real numbers"),
        (dict(x=ROWS * 1j, y=LABELS), "x in .* has dtype complex128"),
    ],
)
def test_bad_files(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        data.load(tmp_path / "bad.npz")


def test_bad_paths(tmp_path):
    with pytest.raises(FileNotFoundError):
        data.load(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"ends in '.csv', expected .npz"):
        data.load(tmp_path / "a.csv")
    np.save(tmp_path / "flat.npy", ROWS[0])
    with pytest.raises(ValueError, match=r"has shape \(5,\), expected \[num_samples, num_features \+ 1\]"):
        data.load(tmp_path / "flat.npy")
