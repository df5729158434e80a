"""The ways to compute the readings that are compared. Only their names: each is imported in a process of its own."""

from typing import NamedTuple

__all__ = ["PEERS", "Peer"]


class Peer(NamedTuple):
    """A way to compute the readings: "module.function", what it is, and what it needs.

    `share`: it is timed on one in so many seeds and its times are multiplied. `nested`: it does the operations that `nested_flops`
    counts. `env`: set in its process.
    """

    function: str
    what: str
    share: int = 1
    nested: bool = False
    env: dict[str, str] = {}


ONE_BLAS_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "MKL", "OMP", "VECLIB_MAXIMUM")}
PEERS = {
    "vgrad": Peer("peers_jax.full_profile", "this library, full profile", nested=True),
    "sweep": Peer("peers_jax.sweep", "this library, vgrad.sweep, drawing included", nested=True),
    "torch_loop": Peer("peers_torch.loop", "(i) PyTorch loop of a notebook", share=4),
    "torch_func": Peer("peers_torch.func", "(ii) torch.func, vmap over seeds"),
    "unrolled": Peer("peers_jax.unrolled", "(iii) one jit(grad) a depth"),
    "scan": Peer("peers_jax.scan", "(iv) a scan a depth"),
    "masked": Peer("peers_jax.masked", "(v) masked-depth scan"),
    "numpy": Peer("peers_numpy.nested", "(vi) nested depths in NumPy", nested=True),
    "numpy_threads": Peer("peers_numpy.nested_threads", "(vi) the same, a thread a core", nested=True, env=ONE_BLAS_THREAD),
}
