"""Data sets for studies: real inputs, standardised, because a gradient's decay depends on the correlations of what goes in.

    x <- (x - mean) / std,    feature by feature over the whole data set; a constant feature becomes zero.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

__all__ = ["Data", "digits", "from_file", "load"]


class Data(NamedTuple):
    """Inputs and targets.

    Attributes:
      name: where they come from.
      x: inputs, standardised. float32 [num_samples, num_features].
      t: class labels, int32 [num_samples], or targets of a regression, float32 [num_samples, out_dim].
    """

    name: str
    x: np.ndarray
    t: np.ndarray

    @property
    def out_dim(self) -> int:
        """Classes, or regression targets."""
        return self.t.shape[1] if self.t.ndim == 2 else int(self.t.max()) + 1

    def batch(self, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """`size` samples drawn without replacement; ValueError if there are fewer."""
        if not 1 <= size <= len(self.x):
            raise ValueError(f"the batch size is {size}, expected 1..{len(self.x)}: {self.name} has that many samples.")
        rows = np.asarray(jax.random.permutation(jax.random.key(seed), len(self.x)))[:size]
        return self.x[rows], self.t[rows]


def load(path: Path | None) -> Data:
    """The data of a file, or the handwritten digits where `path` is None."""
    return digits() if path is None else from_file(path)


@functools.cache
def digits() -> Data:
    """1797 handwritten digits of 8 x 8 pixels, as scikit-learn ships them. Alpaydin & Kaynak, 1998. Read-only arrays, read once."""
    from sklearn.datasets import load_digits

    x, t = load_digits(return_X_y=True)
    x, t = _standardised(x), np.asarray(t, np.int32)
    x.flags.writeable = t.flags.writeable = False
    return Data("scikit-learn digits", x, t)


def from_file(path: Path) -> Data:
    """A data set from an .npz file with arrays x [num_samples, num_features] and y, or an .npy file whose last column is y.

    y holds class labels 0, 1, .. if all of its numbers are whole, else the targets of a regression, [num_samples] or
    [num_samples, out_dim].

    Raises:
      ValueError: another kind of file, missing arrays, shapes that do not fit, NaN or inf, negative labels.  FileNotFoundError.
    """
    path = Path(path)
    if path.suffix not in (".npz", ".npy"):
        raise ValueError(f"{path} ends in {path.suffix!r}, expected .npz (arrays x and y) or .npy (the last column is y).")
    file = np.load(path, allow_pickle=False)
    if path.suffix == ".npz":
        missing = {"x", "y"} - set(file)
        if missing:
            raise ValueError(f"{path} holds the arrays {sorted(file)}, expected x and y: np.savez({path.name!r}, x=..., y=...).")
        x, y = file["x"], file["y"]
    else:
        if file.ndim != 2 or file.shape[1] < 2:
            raise ValueError(f"{path} has shape {file.shape}, expected [num_samples, num_features + 1]: the last column is y.")
        x, y = file[:, :-1], file[:, -1]
    return Data(path.name, *_checked(path, x, y))


def _checked(path, x, y):
    for name, a in (("x", x), ("y", y)):
        if not (np.issubdtype(a.dtype, np.number) or a.dtype == bool) or np.iscomplexobj(a):
            raise ValueError(f"{name} in {path} has dtype {a.dtype}, expected real numbers.")
        bad = ~np.isfinite(a)
        if bad.any():
            first = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ValueError(f"{name} in {path} has {bad.sum()} entries NaN or inf, the first at {first}: drop or fill them.")
    if x.ndim != 2 or y.ndim not in (1, 2) or len(x) != len(y) or not x.size:
        raise ValueError(f"x has shape {x.shape} and y {y.shape}, expected [num_samples, num_features] and one y for each sample.")
    whole = y.ndim == 1 and np.all(y == np.round(y))
    if whole and y.min() < 0:
        raise ValueError(f"y in {path} has the label {int(y.min())}, expected 0, 1, ..: class indices.")
    t = np.asarray(y, np.int32) if whole else np.asarray(y, np.float32).reshape(len(y), -1)
    return _standardised(x), t


def _standardised(x):
    x = np.asarray(x, np.float64)
    std = x.std(axis=0)
    return np.asarray((x - x.mean(axis=0)) / np.where(std > 0, std, 1), np.float32)
