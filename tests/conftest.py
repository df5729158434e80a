"""The suite runs under jax's strictest settings: what passes here passes under a user's laxer ones."""

import os

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_platforms", "cpu")
# Most of the suite's time is compilation. JAX_DISABLE_MOST_OPTIMIZATIONS=0 runs it on what users run, and half as fast.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64():
    """float64 for one test."""
    with jax.enable_x64(True):
        yield
