"""One measurement in one fresh process. Takes a job as JSON on the command line, prints the figures as JSON.

Cold is from the first line of the peer's own code to its first result: definition, tracing, compilation, run. The interpreter and
its imports come before. Peak memory is that of the process, read before the matrix-product peak is measured; program memory what
the compiler says its program needs.
"""

import importlib
import json
import resource
import statistics
import sys
import time

import numpy as np
from workloads import Size, Weights, draw

WARM_CALLS = 2, 15  # how often a peer is called again, at least and at most
PRODUCT_SECONDS = 0.3


def main() -> None:
    job = json.loads(sys.argv[1])
    print(json.dumps(TASKS[job["task"]](job)))


def draw_weights(job) -> dict:
    """Draws a workload and stores it at job["weights"]."""
    weights = draw(Size(*job["size"]))
    np.savez(job["weights"], **weights._asdict())
    return {}


def measure_peer(job) -> dict:
    """Times job["peer"], "module.function", and stores its readings [S, D, L] at job["readings"]."""
    module_name, function = job["peer"].split(".")
    module, size = importlib.import_module(module_name), Size(*job["size"])
    with np.load(job["weights"]) as stored:
        weights = Weights(**stored)
    if job["seeds"] < size.seeds:
        weights = weights._replace(w=weights.w[: job["seeds"]], b=weights.b[: job["seeds"]])
    before = _peak_mb()

    start = time.perf_counter()
    call = getattr(module, function)(size, weights)
    del weights
    readings = call()
    cold, wall = time.perf_counter() - start, time.time() - job["started"]
    warm = _repeat(call, job["warm_seconds"])
    figures = {"cold": cold, "wall": wall, **warm, "peak_mb": _peak_mb(), "before_mb": before}
    np.save(job["readings"], readings)
    figures["program_mb"] = module.program_mb() if hasattr(module, "program_mb") else None
    return figures | {"product_gflops": _product_gflops(module), "device": module.device()}


def measure_compile(job) -> dict:
    """Seconds from function to executable, for the full profile of one network of job["depth"] layers."""
    import jax
    import jax.numpy as jnp

    import vgrad
    from vgrad.profile import read, to_profile

    size, depth = Size(*job["size"]), job["depth"]
    jax.jit(jnp.tanh)(1.0).block_until_ready()  # the compiler's own start is not counted
    net = vgrad.mlp(size.width, "tanh", size.width, size.width)
    x = jax.ShapeDtypeStruct((size.batch, size.width), jnp.float32)
    params = jax.eval_shape(lambda key: net.init(key, depth), jax.random.key(0))

    def full_profile(params, batch):
        return to_profile(read(net, params, batch, loss=vgrad.losses.squared_error, depths=np.asarray([depth])), [depth])

    start = time.perf_counter()
    traced = jax.jit(full_profile).trace(params, (x, x))
    between = time.perf_counter()
    traced.lower().compile()
    return {"trace": between - start, "compile": time.perf_counter() - between, "total": time.perf_counter() - start}


def _repeat(call, seconds):
    """Median wall and processor seconds of a call, over at least so many seconds of calls or the most calls."""
    walls, cpus = [], []
    while len(walls) < WARM_CALLS[0] or (sum(walls) < seconds and len(walls) < WARM_CALLS[1]):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {"warm": statistics.median(walls), "warm_cpu": statistics.median(cpus), "calls": len(walls)}


def _product_gflops(module):
    """Rate of a large float32 product by the peer's own library, 1e9 operations a second."""
    m, k, n = 4096, 1024, 1024
    multiply = module.product(np.ones((m, k), np.float32), np.ones((k, n), np.float32))
    multiply()
    return 2e-9 * m * k * n / _repeat(multiply, PRODUCT_SECONDS)["warm"]


def _peak_mb():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


TASKS = {"draw": draw_weights, "peer": measure_peer, "compile": measure_compile}

if __name__ == "__main__":
    main()
