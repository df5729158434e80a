"""The study: which activations and initializations keep a gradient alive, on real data, as one labelled data set.

Every combination of activation and initialization is a sweep over depths and seeds; what comes back has named dimensions

    (phi, init, seed, depth, layer)

and natural logarithms throughout, in float64. Beside it stands what plain float32 would have reported, measured by running it:
`jax.grad`, then the norm of dJ/dW_1.

The study is planned as chunks (`vgrad.chunks`), each measured by `vgrad.task` here or by any executor, kept in a store, and put
together at the end: the result does not depend on where, in what order or in how many attempts they were measured.
"""

import dataclasses
import hashlib
import math
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from vgrad import cost, data, initializers, overlay
from vgrad import store as files
from vgrad.activations import get
from vgrad.base import Profile
from vgrad.chunks import Chunk, Memory, Progress, carry_out, chunks_of, make_plan, num_cases
from vgrad.chunkstore import Store
from vgrad.network import mlp
from vgrad.profile import check_depths
from vgrad.study_table import Row, decimal, table, verdicts
from vgrad.task import PLAIN, Task, fields_of, measure

if TYPE_CHECKING:
    import xarray

__all__ = ["SCHEMES", "Config", "Progress", "Row", "Scheme", "decimal", "run", "scheme", "table", "verdicts"]


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
    chunk: int | None = None
    """Draws per chunk, the portion that is stored when it is finished. Default: some seconds of work."""
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


def run(
    config: Config,
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    mesh=None,
    executor: Any = None,
    store: Store | None = None,
    resume: bool = False,
    stopping: Callable[[], bool] = lambda: False,
) -> "xarray.Dataset | None":
    """Measures all combinations. Stopped by Ctrl-C it returns what is there, with attribute `complete` 0 and NaN for the rest.

    Args:
      config: what to measure.
      on_progress: called before the first chunk and after each.
      mesh: devices to spread the seeds over, as for `vgrad.sweep`.
      executor: anything with the `submit` of `concurrent.futures.Executor`, such as dask's `Client.get_executor()`: chunks are
        measured where it runs them, each on that process's default device. None: here.
      store: an open `vgrad.chunkstore.Store`, which keeps finished chunks. None: they are kept in memory.
      resume: go on with what the store holds.
      stopping: asked after every chunk. Once true, what is in flight is finished and the rest left, as on Ctrl-C.
    Returns:
      Dataset with the fields of `Profile` [phi, init, seed, depth, layer], and `plain_float32_grad_w1` [phi, init, seed]:
        ||dJ/dW_1|| at the greatest depth as plain float32 reports it. None in a process of a distributed run (a store of several
        members) that finds chunks of other processes missing when its own are done: the last to finish has the data set.
    Raises:
      ValueError: a bad configuration, or a store of another study, before anything is computed.  OSError: the store cannot be
        written.  vgrad.chunkstore.Damaged: a chunk was damaged while the study ran.
    """
    if executor is not None and mesh is not None:
        raise ValueError("got an executor and a mesh, expected one of them: a worker uses its own default device.")
    source = data.load(config.data)
    task, kept_in = _task(config, source), store or Memory()
    plan = kept_in.begin(_identity(config, source, task), task.plan, resume=resume, fixed=config.chunk is not None)
    task, chunks = task._replace(plan=plan), chunks_of(plan)
    shared = kept_in.num_members > 1
    ours = chunks[kept_in.member :: kept_in.num_members]
    for message in kept_in.discard_damaged(ours):
        warnings.warn(message, stacklevel=2)
    todo = kept_in.missing(ours)
    total, missing, done = num_cases(ours), num_cases(todo), 0
    room: list[int | None] = [None]  # what an out-of-memory taught the chunks before

    def report(what):
        networks, flops = len(task.depths), cost.flops(_shape(task))
        on_progress(Progress(done * networks, (total - missing) * networks, total * networks, what, done * flops))

    def here(chunk):
        arrays, room[0] = measure(task, chunk, mesh=mesh, most=room[0])
        return arrays, room[0]

    def commit(chunk: Chunk, measured):
        nonlocal done
        kept_in.commit(chunk, measured[0])
        done += num_cases([chunk])
        report(_phi_of(task, chunk))

    try:
        report(_phi_of(task, todo[0]) if todo else "")
        carry_out(todo, here if executor is None else partial(measure, task), commit, executor=executor, stopping=stopping)
    except KeyboardInterrupt:
        if shared:
            raise
    if shared and not kept_in.last_to_finish(chunks):
        return None
    return _assembled(config, source, task, kept_in)


def _assembled(config, source, task, kept_in) -> "xarray.Dataset":
    """The labelled data set of the chunks that are there, one chunk in memory at a time."""
    import xarray

    num_phi, num_init = len(config.phi), len(config.init)
    chunks = chunks_of(task.plan)
    missing = set(kept_in.missing(chunks))
    fields = {}
    for name, (shape, dtype) in fields_of(task).items():
        fields[name] = kept_in.empty((task.plan.num_points, task.plan.num_seeds, *shape), dtype)
    for chunk in chunks:
        measured = dict.fromkeys(fields, np.nan) if chunk in missing else kept_in.read(chunk)
        for name, values in fields.items():
            values[slice(*chunk.points), slice(*chunk.seeds)] = measured[name]
    dims = ("phi", "init", "seed", "depth", "layer")
    fields = {name: values.reshape(num_phi, num_init, *values.shape[1:]) for name, values in fields.items()}
    schemes = {phi: [scheme(name, phi) for name in config.init] for phi in config.phi}
    attributes = files.provenance(_described(config) | {"data": config.data}, source.name)
    return xarray.Dataset(
        {name: (dims, fields[name], {"units": "nat", "long_name": _LONG_NAMES[name]}) for name in Profile._fields}
        | ({} if missing else overlay.predicted(config, source, schemes))
        | {PLAIN: (dims[:3], fields[PLAIN], {"long_name": "||dJ/dW_1|| at the greatest depth in plain float32"})},
        coords={
            "phi": list(config.phi),
            "init": list(config.init),
            "seed": np.arange(config.num_seeds),
            "depth": list(config.depths),
            "layer": np.arange(1, config.depths[-1] + 1),
            "sigma_w": (dims[:2], np.array([sigma_w for _, _, sigma_w in task.points]).reshape(num_phi, num_init)),
        },
        attrs=attributes | {"complete": int(not missing), "loss": task.loss.__name__},
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


def _task(config, source) -> Task:
    """The study as a task, cut for the memory of the device here. Raises for whatever is wrong with the configuration."""
    schemes = _checked(config, source)
    x, t = source.batch(config.batch, config.key)
    draws = list(dict.fromkeys(s.weights for row in schemes.values() for s in row))
    points = tuple((i, draws.index(s.weights), s.sigma_w) for i, phi in enumerate(config.phi) for s in schemes[phi])
    shape = cost.Shape(config.depths, config.width, len(x), x.shape[1], source.out_dim)
    return Task(
        phis=tuple(config.phi),
        draws=tuple(draws),
        points=points,
        width=config.width,
        sigma_b=config.sigma_b,
        out_dim=source.out_dim,
        depths=tuple(config.depths),
        key=config.key,
        x=x,
        t=t,
        plan=make_plan(len(points), config.num_seeds, cost.at_once(shape) if config.chunk is None else config.chunk),
        batch_size=cost.batch_size(shape),
        x64=jnp.result_type(float) == np.float64,
    )


def _shape(task):
    return cost.Shape(task.depths, task.width, len(task.x), task.x.shape[1], task.out_dim)


def _phi_of(task, chunk):
    return task.phis[task.points[chunk.points[0]][0]]


def _described(config):
    """The configuration without what has no influence on the results: where they go, and how the study is cut."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "data", "chunk")}


def _identity(config, source, task) -> dict[str, Any]:
    """What the results depend on, for `Store.begin`: a store is taken up again only if all of this is as it was."""
    digest = lambda content: hashlib.sha256(content).hexdigest()[:16]  # noqa: E731
    modules = {path.stem: digest(path.read_bytes()) for path in sorted(Path(__file__).parent.glob("*.py"))}
    return {
        "config": _described(config) | {"dtype": "float64" if task.x64 else "float32"},
        "data": {"name": source.name, "x": digest(task.x.tobytes()), "t": digest(task.t.tobytes())},
        "code": {name: version(name) for name in ("vgrad", "jax", "jaxlib", "numpy")} | modules,
    }
