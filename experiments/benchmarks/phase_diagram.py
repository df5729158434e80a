"""Benchmark: the phase diagram of tanh, q*, c*, chi_1, xi_q and xi_c on a 256 x 256 grid of (sigma_w, sigma_b).

Claim, in float64 on two cores, once compiled: under 3 s; at least 1000x a straightforward SciPy implementation (`quad`, iteration
for q*, a bracketing root finder for c*) and 30x an idiomatic vectorised NumPy one (Gauss-Hermite nodes, a row of points iterated
together); relative error at most 1e-6 (of c* absolute) against SciPy, whose quadratures are converged to 1e-11. NumPy is run with
the 41 nodes that most people take and with 101, since time and error go together. Both peers are timed on a part of the grid,
printed, and their times multiplied; NumPy's iteration, slow near the critical line, is cut off at 1000 steps. Minutes on two cores;
`--quick` (a small grid, figures that mean nothing) seconds.
"""

import dataclasses
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import PartitionSpec as Spec

from vgrad import meanfield

HERE = Path(__file__).parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
QUANTITIES = ("q_star", "c_star", "chi_1", "xi_q", "xi_c")
TARGETS = {"scipy": 1000.0, "numpy 41": 30.0}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured, and where the results go."""

    points: int = 256
    """Points on each axis; an even number."""
    scipy_points: int = 8
    """Points of the grid that SciPy computes."""
    numpy_every: int = 128
    """NumPy computes every so many rows."""
    nodes: tuple[int, ...] = (41, 101)
    """Gauss-Hermite nodes per dimension of NumPy's runs."""
    repeats: int = 5
    """Runs of this library; the median counts."""
    quick: bool = False
    """A small grid. Nothing is written unless --out says where."""
    out: Path | None = None
    """The JSON file; the table goes beside it as Markdown. Default: results/phase_diagram.json beside this script."""


TINY = Config(8, 1, 8, (21,), 1, quick=True)


def axes(points):
    """sigma_w [W] and sigma_b [V]."""
    return np.linspace(0.5, 4.0, points), np.linspace(0.05, 2.0, points)


def ours(points, repeats):
    """The grid [5, V, W]; seconds with compilation, seconds once compiled."""
    sigma_w, sigma_b = axes(points)
    mesh = jax.make_mesh((jax.device_count(),), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))

    def rows(b, w):
        point = lambda b, w: meanfield.asymptotics("tanh", sigma_w=w, sigma_b=b)  # noqa: E731
        found = jax.lax.map(lambda b: jax.vmap(lambda w: point(b, w))(w), b)
        return jnp.stack([getattr(found, name) for name in QUANTITIES])

    spread = jax.shard_map(rows, mesh=mesh, in_specs=(Spec("rows"), Spec()), out_specs=Spec(None, "rows"), check_vma=False)
    compute, seconds = jax.jit(spread), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        grid = np.asarray(compute(sigma_b, sigma_w))
        seconds.append(time.perf_counter() - start)
    return grid, seconds[0], float(np.median(seconds[1:]))


def by_scipy(sigma_w, sigma_b):
    """The five quantities at one point."""
    from scipy.integrate import quad
    from scipy.optimize import brentq

    def mean(f, **tolerances):
        density = lambda z: np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)  # noqa: E731
        return quad(lambda z: f(z) * density(z), -9, 9, **({"epsabs": 1e-13, "epsrel": 1e-12, "limit": 200} | tolerances))[0]

    slope = lambda u: 1 / np.cosh(u) ** 2  # noqa: E731
    q, before = 1.0, 0.0
    while abs(q - before) > 1e-13 * q:
        before, q = q, sigma_w**2 * mean(lambda z, q=q: np.tanh(np.sqrt(q) * z) ** 2) + sigma_b**2
    root = np.sqrt(q)
    chi_1 = sigma_w**2 * mean(lambda z: slope(root * z) ** 2)
    bend = lambda u: slope(u) ** 2 - 2 * np.tanh(u) ** 2 * slope(u)  # noqa: E731  half of (tanh^2)''
    chi_par = sigma_w**2 * mean(lambda z: bend(root * z))

    def pair(f, c):
        side = np.sqrt(1 - c * c)
        return mean(lambda y: f(root * y) * mean(lambda z: f(root * (c * y + side * z)), epsrel=1e-11), epsrel=1e-11)

    c_star = 1.0
    if chi_1 > 1:
        excess = lambda c: (sigma_w**2 * pair(np.tanh, c) + sigma_b**2) / q - c  # noqa: E731
        # The other root is c = 1, which repels: look below it by a part of what the slope there says.
        c_star = brentq(excess, 0.0, 1 - min(0.05, 0.2 * (chi_1 - 1)), xtol=1e-11)
    at_c = sigma_w**2 * pair(slope, c_star) if chi_1 > 1 else chi_1
    return q, c_star, chi_1, -1 / np.log(abs(chi_par)), -1 / np.log(at_c)


def by_numpy(sigma_w, sigma_b, nodes, steps=1000):
    """The five quantities along one row: sigma_w [W], one sigma_b. Shape [5, W]."""
    z, weight = np.polynomial.hermite_e.hermegauss(nodes)
    weight = weight / weight.sum()
    q = np.ones_like(sigma_w)
    for _ in range(steps):
        new = sigma_w**2 * (np.tanh(np.sqrt(q)[:, None] * z) ** 2 @ weight) + sigma_b**2
        done, q = np.max(np.abs(new - q) / new) < 1e-12, new
        if done:
            break
    u = np.sqrt(q)[:, None] * z
    slope = 1 / np.cosh(u) ** 2
    chi_1 = sigma_w**2 * (slope**2 @ weight)
    chi_par = sigma_w**2 * ((slope**2 - 2 * np.tanh(u) ** 2 * slope) @ weight)

    def pair(f, c, q):
        first = np.sqrt(q)[:, None, None] * z[:, None]
        second = np.sqrt(q)[:, None, None] * (c[:, None, None] * z[:, None] + np.sqrt(1 - c * c)[:, None, None] * z)
        return np.einsum("pij,i,j->p", f(first) * f(second), weight, weight)

    c, active = np.where(chi_1 > 1, 0.0, 1.0), chi_1 > 1
    for _ in range(steps):
        if not active.any():
            break
        new = (sigma_w[active] ** 2 * pair(np.tanh, c[active], q[active]) + sigma_b**2) / q[active]
        moved, c[active] = np.abs(new - c[active]), np.minimum(new, 1.0)
        active[active] = moved > 1e-10
    at_c = np.where(chi_1 > 1, sigma_w**2 * pair(lambda u: 1 / np.cosh(u) ** 2, c, q), chi_1)
    return np.stack([q, c, chi_1, -1 / np.log(np.abs(chi_par)), -1 / np.log(at_c)])


def run(config: Config) -> dict[str, Any]:
    """All measurements, as what the JSON file holds."""
    with jax.enable_x64(True):
        grid, cold, warm = ours(config.points, config.repeats)
    sigma_w, sigma_b = axes(config.points)
    total = config.points**2
    chosen = np.random.default_rng(0).choice(total, config.scipy_points, replace=False)
    rows, columns = np.unravel_index(chosen, grid.shape[1:])
    start = time.perf_counter()
    reference = np.array([by_scipy(sigma_w[j], sigma_b[i]) for i, j in zip(rows, columns, strict=True)]).T
    result = {
        "quick": config.quick, "points": config.points, "cores": CORES, "device": f"{jax.device_count()} x {jax.default_backend()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__},
        "ours": {"cold": cold, "seconds": warm, "share": 1.0, "error": errors(grid[:, rows, columns], reference)},
        "scipy": {"seconds": (time.perf_counter() - start) * total / config.scipy_points, "share": config.scipy_points / total,
                  "error": dict.fromkeys(QUANTITIES, 0.0)},
        "unsolved": int(np.isnan(grid).any(axis=0).sum()),
    }  # fmt: skip
    own = np.arange(config.numpy_every // 2, config.points, config.numpy_every)
    for nodes in config.nodes:
        start = time.perf_counter()
        found = np.stack([by_numpy(sigma_w, sigma_b[i], nodes) for i in own], axis=1)
        seconds = (time.perf_counter() - start) * config.points / len(own)
        error = errors(found, grid[:, own])  # of this library's, once that is known to be right
        result[f"numpy {nodes}"] = {"seconds": seconds, "share": len(own) / config.points, "error": error}
    return result


def errors(found, wanted):
    """The greatest relative error of each quantity, of c* the absolute one."""
    unit = np.where(np.array(QUANTITIES) == "c_star", np.nan, 1.0).reshape(-1, *[1] * (wanted.ndim - 1)) * np.abs(wanted)
    off = np.abs(found - wanted) / np.where(np.isnan(unit), 1.0, unit)
    return {name: float(np.nanmax(off[i])) for i, name in enumerate(QUANTITIES)}


def check(result: dict[str, Any]) -> None:
    """Raises unless this library's figures are right; whether it is fast enough is for the table to say."""
    worst = max(result["ours"]["error"].values())
    if not worst <= 1e-6 or result["unsolved"]:
        raise ValueError(f"the error is {worst:.1e}, expected at most 1e-6, and {result['unsolved']} points are unsolved.")


def report(result: dict[str, Any]) -> str:
    """The table, as Markdown that is also legible as it stands, from the contents of the JSON file alone."""
    names = [name for name in result if isinstance(result[name], dict) and "seconds" in result[name]]
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    lines = [f"# The phase diagram of tanh on {result['points']} x {result['points']} points", "",
             f"{result['cores']} cores, JAX on {result['device']} devices, float64; {versions}. Compilation and first run "
             f"{result['ours']['cold']:.2f} s. Errors: greatest relative one, of c* absolute; of this library against SciPy's "
             "converged quadratures, of NumPy against this library.", ""]  # fmt: skip
    if result["quick"]:
        lines += ["**A quick run of a small grid: no time below means anything.**", ""]
    lines += ["| | computed | seconds for all | times ours | target | " + " | ".join(QUANTITIES) + " |", "|---" * 10 + "|"]
    for name in names:
        r = result[name]
        ratio = r["seconds"] / result["ours"]["seconds"]
        target = TARGETS.get(name)
        said = "" if target is None else f">= {target:g}x: {'ok' if ratio >= target else 'short'}"
        said = f"< 3 s: {'ok' if r['seconds'] < 3 else 'short'}" if name == "ours" else said
        error = " | ".join("reference" if name == "scipy" else f"{r['error'][q]:.1e}" for q in QUANTITIES)
        lines += [f"| {name} | {r['share']:.2%} | {r['seconds']:.3g} | {ratio:.3g} | {said} | {error} |"]
    return "\n".join(lines) + "\n"


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    out = config.out or (None if config.quick else HERE / "results" / "phase_diagram.json")
    config = dataclasses.replace(TINY, points=32, numpy_every=16, out=out) if config.quick else config
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_num_cpu_devices", CORES)
    result = run(config)
    print(report(result))
    check(result)
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
        out.with_suffix(".md").write_text(report(result))


if __name__ == "__main__":
    main()
