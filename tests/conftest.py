"""The suite runs under jax's strictest settings: what passes here passes under a user's laxer ones."""

import gc
import os
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("suite", derandomize=True, database=None)  # the same examples on every machine
settings.load_profile("suite")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_platforms", "cpu")
# Most of the suite's time is compilation. JAX_DISABLE_MOST_OPTIMIZATIONS=0 runs it on what users run, and half as fast.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)
    # A worker a core, so one thread each, and programs in one part, which XLA would cut in 32.
    # The older emitters compile in half the time; later jaxlibs stop at the flag.
    flags = "--xla_cpu_multi_thread_eigen=false --xla_cpu_parallel_codegen_split_count=1"
    if jax.__version_info__ < (0, 11):
        flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
# And its own core, so that XLA makes one thread: of more, some spin where others work.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
# Tracing makes millions of small objects, and few cycles.
gc.set_threshold(200_000, 50, 1000)
jax.config.update("jax_traceback_in_locations_limit", 0)
# What the compiler made is kept, for the other worker and the next run: that takes half the time.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture
def x64():
    """float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """A test of a module with an `RNG` draws the same numbers whichever tests ran before it in its process."""
    if rng := getattr(item.module, "RNG", None):
        rng.bit_generator.state = np.random.default_rng(zlib.crc32(item.name.encode())).bit_generator.state


def pytest_sessionfinish():
    gc.collect()  # files left open are found here,
    gc.freeze()  # and pytest need not look through all objects twice more, in seconds


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Modules of costly fixtures, those with an `xdist_group`, stay in one process. xdist 3.8 does not see to it on pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    grouped = {f"tests/{p.name}" for p in Path(__file__).parent.glob("test_*.py") if "xdist_group" in p.read_text()}

    class ByFixtures(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            module = nodeid.split("::")[0]
            return module if module in grouped else nodeid

    return ByFixtures(config, log)
