"""The study: which activations and initializations keep a gradient alive, on real data, as one labelled data set.

Every combination of activation and initialization is a sweep over depths and seeds; what comes back has named dimensions

    (phi, init, seed, depth, layer)

and natural logarithms throughout, in float64. Beside it stands what plain float32 would have reported, measured by running it:
`jax.grad`, then the norm of dJ/dW_1.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vgrad import data, fit, initializers, losses, overlay, store
from vgrad.activations import get
from vgrad.base import Network, Profile
from vgrad.network import mlp
from vgrad.profile import check_depths
from vgrad.sweep import sweep

if TYPE_CHECKING:
    import xarray

__all__ = ["SCHEMES", "Config", "Row", "Scheme", "decimal", "run", "scheme", "table", "verdict", "verdicts"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure. The defaults take about a minute on two cores."""

    phi: tuple[str, ...] = ("sigmoid", "tanh", "relu", "identity")
    """Activations, by name."""
    init: tuple[str, ...] = ("xavier", "he", "uniform_recipe", "too_large")
    """Initializations: xavier, he, uniform_recipe, too_large; or any initializer with its sigma_w, such as orthogonal:1.0."""
    depths: tuple[int, ...] = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    """Numbers of weight matrices, increasing."""
    num_seeds: int = 32
    """Draws per combination."""
    width: int = 128
    """Units per hidden layer."""
    batch: int = 64
    """Samples in the batch."""
    sigma_b: float = 0.0
    """Standard deviation of the biases."""
    key: int = 0
    """Root of all random draws."""
    data: Path | None = None
    """Your own data: an .npz file with arrays x and y, or an .npy file whose last column is y. Default: handwritten digits."""
    out: Path = Path("results")
    """Folder for the results."""


class Scheme(NamedTuple):
    """An initialization: which initializer, and the sigma_w it is multiplied by."""

    weights: str
    sigma_w: float


SCHEMES: dict[str, Callable[[str], Scheme]] = {
    "xavier": lambda phi: Scheme("normal", 1.0),
    "he": lambda phi: Scheme("normal", math.sqrt(2)),
    # Literally random() * sqrt(2/n) for relu and random() * sqrt(1/n) for tanh and the rest.
    "uniform_recipe": lambda phi: Scheme("positive_uniform", math.sqrt(2) if "relu" in phi else 1.0),
    "too_large": lambda phi: Scheme("normal", 4.0),
}


def scheme(name: str, phi: str) -> Scheme:
    """The initialization of that name for an activation; ValueError if there is none such."""
    if name in SCHEMES:
        return SCHEMES[name](phi)
    weights, _, sigma_w = name.partition(":")
    if weights not in initializers.INITIALIZERS or not sigma_w:
        raise ValueError(f"unknown initialization {name!r}, expected one of {', '.join(SCHEMES)}, or like orthogonal:1.0.")
    try:
        initializers.check_sigma("sigma_w", float(sigma_w))
    except ValueError as error:
        raise ValueError(f"initialization {name!r}: sigma_w is {sigma_w!r}, expected a number >= 0.") from error
    return Scheme(weights, float(sigma_w))


def run(config: Config, *, on_progress: Callable[[int, str], None] = lambda done, what: None, mesh=None) -> "xarray.Dataset":
    """Measures all combinations. On Ctrl-C returns what is there, with attribute `complete` 0 and NaN for the rest.

    Args:
      config: what to measure.
      on_progress: called with the number of networks done since the last call, and with what comes next.
      mesh: devices to spread the seeds over, as for `vgrad.sweep`.
    Returns:
      Dataset with the fields of `Profile` [phi, init, seed, depth, layer], and `plain_float32_grad_w1` [phi, init, seed]:
        ||dJ/dW_1|| at the greatest depth as plain float32 reports it.
    Raises:
      ValueError: a bad configuration, before anything is computed.
    """
    import xarray

    source = data.load(config.data)
    schemes = _checked(config, source)
    x, t = source.batch(config.batch, config.key)
    loss = losses.cross_entropy if t.ndim == 1 else losses.squared_error
    num_phi, num_init, depths = len(config.phi), len(config.init), list(config.depths)

    dims = ("phi", "init", "seed", "depth", "layer")
    shape = (num_phi, num_init, config.num_seeds, len(depths), depths[-1])
    fields = {name: np.full(shape, np.nan) for name in Profile._fields}
    plain = np.full(shape[:3], np.nan, np.float32)
    initializer_names = list(dict.fromkeys(s.weights for row in schemes.values() for s in row))
    family = _family(config, initializer_names, x.shape[1], source.out_dim)
    options: dict[str, Any] = dict(key=jax.random.key(config.key), num_seeds=config.num_seeds, batch=(x, t), loss=loss)
    plain_float32 = _plain_float32(family, depth=depths[-1], **options)
    complete = True
    try:
        for i, phi in enumerate(config.phi):
            on_progress(0, phi)
            grid = [{"phi": i, "weights": initializer_names.index(s.weights), "sigma_w": s.sigma_w} for s in schemes[phi]]
            for name, values in zip(Profile._fields, sweep(family, grid, depths=depths, mesh=mesh, **options), strict=True):
                fields[name][i] = values
            plain[i] = plain_float32(grid)
            on_progress(num_init * config.num_seeds * len(depths), "")
    except KeyboardInterrupt:
        complete = False
    predicted = overlay.predicted(config, source, schemes) if complete else {}  # an interrupted one is to be saved at once
    attributes = store.provenance(dataclasses.asdict(config), source.name) | {"complete": int(complete), "loss": loss.__name__}
    return xarray.Dataset(
        {name: (dims, values, {"units": "nat", "long_name": _LONG_NAMES[name]}) for name, values in fields.items()}
        | predicted
        | {"plain_float32_grad_w1": (dims[:3], plain, {"long_name": "||dJ/dW_1|| at the greatest depth in plain float32"})},
        coords={
            "phi": list(config.phi),
            "init": list(config.init),
            "seed": np.arange(config.num_seeds),
            "depth": depths,
            "layer": np.arange(1, depths[-1] + 1),
            "sigma_w": (dims[:2], np.array([[s.sigma_w for s in schemes[phi]] for phi in config.phi])),
        },
        attrs=attributes,
    )


_LONG_NAMES = {
    "log_delta": "ln ||dJ/dz_l||",
    "log_grad_w": "ln ||dJ/dW_l||",
    "log_grad_b": "ln ||dJ/db_l||",
    "log_h": "ln ||h_l||",
    "log_gain_w": "part of W^T in the change of ln ||delta|| from layer l+1 to l",
    "log_gain_phi": "part of phi' in the change of ln ||delta|| from layer l+1 to l",
}


def _checked(config, source):
    """All schemes by activation; raises for whatever is wrong with the configuration."""
    if not config.phi or not config.init:
        raise ValueError(f"phi is {config.phi} and init {config.init}, expected at least one of each: the grid is empty.")
    for phi in config.phi:
        get(phi)
    if check_depths(config.depths)[-1] < 3:
        raise ValueError(f"depths are {config.depths}, expected one of at least 3: a rate needs a hidden step.")
    if config.num_seeds < 1:
        raise ValueError(f"num_seeds is {config.num_seeds}, expected at least 1.")
    schemes = {phi: [scheme(name, phi) for name in config.init] for phi in config.phi}
    mlp(config.width, config.phi[0], source.x.shape[1], source.out_dim, sigma_b=config.sigma_b)
    source.batch(config.batch, config.key)
    return schemes


def _family(config, initializer_names, in_dim, out_dim) -> Callable[[Any], Network]:
    """Networks whose activation and initializer are chosen by number, so that the whole study is one compiled program."""
    phis, draws = [get(phi) for phi in config.phi], [initializers.get(name) for name in initializer_names]

    def choose(options, which, *args):
        return jax.lax.switch(jnp.asarray(which).astype(jnp.int32), options, *args)

    return lambda point: mlp(
        config.width,
        lambda z: choose(phis, point["phi"], z),
        in_dim,
        out_dim,
        sigma_w=point["sigma_w"],
        sigma_b=config.sigma_b,
        weights=lambda key, shape, dtype: choose([lambda k, d=d: d(k, shape, dtype) for d in draws], point["weights"], key),
    )


def _plain_float32(family, *, key, num_seeds, depth, batch, loss):
    """grid -> ||dJ/dW_1|| [points, seeds] of the very draws of the sweep, the way everybody computes it."""

    def one(point, seed):
        net = family(point)
        params = net.init(jax.random.fold_in(key, seed), depth)
        return jnp.linalg.norm(jax.grad(lambda p: loss(net.forward(p, batch[0]), batch[1]))(params).embed.w)

    compiled = jax.jit(lambda points: jax.lax.map(lambda p: jax.lax.map(lambda s: one(p, s), jnp.arange(num_seeds)), points))
    return lambda grid: np.asarray(compiled({name: np.asarray([p[name] for p in grid], np.float32) for name in grid[0]}))


class Row(NamedTuple):
    """The verdict on one combination at the greatest depth.

    Attributes:
      phi, init, sigma_w: which.
      verdict: "vanishes", "holds" or "explodes", as ||delta_1|| / ||delta_{L-1}|| of the typical network lies below 0.1, between,
        or above 10; "dead" where it is exactly zero in most seeds; "no reading" where it is NaN.
      rate, stderr: per layer toward the input, in nats, E ln over seeds.
      log_ratio: ln(||delta_1|| / ||delta_{L-1}||), median over seeds.
      log_grad_w1: ln ||dJ/dW_1||, median over seeds.
      plain: the same as plain float32 reports it, median over seeds: a number, not a logarithm; NaN if it is NaN in any seed.
    """

    phi: str
    init: str
    sigma_w: float
    verdict: str
    rate: float
    stderr: float
    log_ratio: float
    log_grad_w1: float
    plain: float


def verdicts(dataset: "xarray.Dataset") -> list[Row]:
    """A verdict for every combination of a study, in its order."""
    depth = int(dataset.depth[-1])
    at_depth = dataset.isel(depth=-1)
    delta = at_depth.log_delta.transpose("phi", "init", "seed", "layer").values
    num_phi, num_init = delta.shape[:2]
    rates = fit.decay_rate(delta.reshape(-1, delta.shape[2], 1, delta.shape[3]), [depth]).mean_log
    rows = []
    for n, (i, j) in enumerate(np.ndindex(num_phi, num_init)):
        with np.errstate(invalid="ignore"):
            change = delta[i, j, :, 0] - delta[i, j, :, depth - 2]
        log_ratio = float(np.median(np.where(np.isneginf(delta[i, j, :, 0]), -np.inf, change)))
        rows.append(
            Row(
                phi=str(dataset.phi.values[i]),
                init=str(dataset.init.values[j]),
                sigma_w=float(dataset.sigma_w[i, j]),
                verdict=verdict(log_ratio),
                rate=float(rates.value[n, 0]),
                stderr=float(rates.stderr[n, 0]),
                log_ratio=log_ratio,
                log_grad_w1=float(np.median(at_depth.log_grad_w.values[i, j, :, 0])),
                plain=float(np.median(at_depth.plain_float32_grad_w1.values[i, j])),
            )
        )
    return rows


def verdict(log_ratio: float) -> str:
    """The word for a ln(||delta_1|| / ||delta_{L-1}||), with the thresholds of `Row`."""
    if math.isnan(log_ratio):
        return "no reading"
    if math.isinf(log_ratio):
        return "dead"
    return "vanishes" if log_ratio < -math.log(10) else "explodes" if log_ratio > math.log(10) else "holds"


def table(dataset: "xarray.Dataset") -> str:
    """The verdicts as a table to print."""
    depth = int(dataset.depth[-1])
    head = ["phi", "init", "sigma_w", "gradient", "rate per layer", "first/last hidden", "||dW_1||", "plain float32 says"]
    rows = [
        [r.phi, r.init, f"{r.sigma_w:.3g}", r.verdict, f"{r.rate:+.3f} ± {r.stderr:.3f}", decimal(r.log_ratio),
         decimal(r.log_grad_w1), _plain(r)] for r in verdicts(dataset)
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]
    title = f"Depth {depth}, {dataset.sizes['seed']} seeds; rate: change of ln ||delta|| per layer toward the input ± s.e."
    return "\n".join([title, "", lines[0], "-" * len(lines[0]), *lines[1:]])


def decimal(ln: float) -> str:
    """e^ln in decimal notation, however large or small: -1000 is 5.1e-435."""
    if not math.isfinite(ln):
        return "0" if ln < 0 else str(ln)
    exponent = math.floor(ln / math.log(10))
    mantissa, carry = f"{math.exp(ln - exponent * math.log(10)):.1e}".split("e")
    return f"{mantissa}e{exponent + int(carry):+d}"


def _plain(row):
    if math.isnan(row.plain):
        return "nan"
    if row.plain == 0 or math.isinf(row.plain):
        return f"{row.plain:.0f}"
    off = math.log(row.plain) - row.log_grad_w1
    return f"{decimal(math.log(row.plain))}" + ("" if abs(off) < 0.01 else f" (off by {math.expm1(off):+.0%})")
