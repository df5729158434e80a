"""Numbers that neither underflow nor overflow: a float array m and one integer exponent k, standing for m * 2^k.

The backward pass is linear in the cotangent, and multiplying by a power of two is exact in floating point. So a signal may be
divided by 2^e where it grows or shrinks and e added to an integer: nothing is lost at depth 10,000, and where plain floats would
have been enough the result is the same to the last bit. The equation of this module is

    value = m 2^k,    ln ||value|| = ln(sum_i (m_i 2^-e)^2) / 2 + (k + e) ln 2,    2^(e-1) <= max_i |m_i| < 2^e,

the second form because the *squares* of a float32 array already vanish when its entries fall below 1e-19.

Derivatives follow one rule: **the cotangent of a `Scaled` number is the cotangent of its value.** Changing the exponent does
not change the value, so `shift` passes cotangents on untouched, and every operation built from it is differentiated rightly by
ordinary autodiff.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vgrad.base import Array

__all__ = [
    "LogNorm",
    "Scaled",
    "add",
    "bare",
    "canonical",
    "change_if",
    "exponent",
    "headroom",
    "lift",
    "log",
    "log_ratio",
    "norm",
    "pow2",
    "reach",
    "scale",
    "shift",
    "sumsq",
    "tidy",
    "times",
    "unit",
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """The array m * 2^k.

    Attributes:
      m: float array of any shape, which may be batched by `vmap` like any other.
      k: int32 scalar; zero while the largest entry lies within 2^±`headroom`, so that ordinary signals stay ordinary.
    """

    m: Array
    k: Array

    __array_ufunc__ = None  # or NumPy would take `factor * x` for a matter of arrays of objects

    def __add__(self, other: "Scaled") -> "Scaled":
        return add(self, other)

    def __mul__(self, factor: Any) -> "Scaled":
        return times(self, factor)

    __rmul__ = __mul__


class LogNorm(NamedTuple):
    """A norm as the pair of a mantissa and an exponent: norm = sqrt(sumsq) * 2^exponent.

    Ratios of such pairs are accurate to float rounding at any magnitude, where the difference of two float32 logarithms near
    1e3 has lost 20 times in accuracy.

    Attributes:
      sumsq: sum of squares of the entries after division by 2^exponent. Zero if and only if every entry is.
      exponent: integer, or the same number as a float.
    """

    sumsq: Any
    exponent: Any


def headroom(dtype) -> int:
    """Largest |exponent| at which a signal is still kept as a plain float: 42 in float32, 341 in float64.

    A third of the exponent range, so that an activation may square or cube its argument without harm.
    """
    return int(jnp.finfo(dtype).maxexp) // 3


def pow2(x: Array, e: Array) -> Array:
    """x * 2^e, exact unless the result leaves the float range, and 0 for e below -2 `reach`; `e` broadcasts against `x`.

    Two factors of half the way each: 2^e alone overflows before x * 2^e does. A subnormal x may count as 0.
    """
    most = 2 * _layout(x.dtype).bias
    e = jnp.clip(e, -most, most)
    half = e >> 1
    return x * _two_to(half, x.dtype) * _two_to(e - half, x.dtype)


def scale(x: Array, e: Array) -> Array:
    """x * 2^e in one factor, for |e| up to `reach`."""
    return x * _two_to(e, x.dtype)


def reach(dtype) -> int:
    """The largest e for which 2^e and 2^-e are normal numbers: 126 in float32, 1022 in float64."""
    return _layout(dtype).reach


def exponent(x: Array, axis=None) -> Array:
    """The e with 2^(e-1) <= max|x| < 2^e, an int32; 0 where the maximum is zero, subnormal, NaN or inf."""
    return _exponent_of(jnp.max(jnp.abs(x), axis=axis, initial=0.0))


def unit(x: Array, axis=None) -> Array:
    """`exponent` within ±`reach`, an int32: scale(x, -unit(x)) is exact, of order 1 for normal x, and below 4."""
    return jnp.minimum(exponent(x, axis), reach(x.dtype))


def _exponent_of(top):
    f = _layout(top.dtype)
    e = (lax.bitcast_convert_type(top, f.integer) >> f.nmant) - (f.bias - 1)
    return jnp.where((top >= jnp.finfo(top.dtype).tiny) & (top < jnp.inf), e, 0).astype(jnp.int32)


class _Layout(NamedTuple):
    """How a float is laid out in bits. Powers of two are made and read there: `exp2` and `log2` are not exact on every backend."""

    nmant: int
    bias: int
    reach: int  # 2^±reach is a normal float
    integer: Any


def _layout(dtype):
    f = jnp.finfo(dtype)
    return _Layout(int(f.nmant), int(f.maxexp) - 1, int(f.maxexp) - 2, jnp.dtype(f"int{f.bits}"))


def _two_to(e, dtype):
    """2^e for -bias <= e <= bias; 0 at -bias."""
    f = _layout(dtype)
    return lax.bitcast_convert_type((e.astype(f.integer) + f.bias) << f.nmant, dtype)


@jax.custom_vjp
def shift(m: Array, e: Array) -> Array:
    """m * 2^e as a change of units: the value that a `Scaled` number stands for is the same, and so is its cotangent."""
    return pow2(m, e)


shift.defvjp(lambda m, e: (pow2(m, e), None), lambda _, c: (c, None))


def bare(x: Array) -> Scaled:
    """A plain array as x 2^0 of any size. What is not finite becomes NaN: saturation must not turn inf into a plausible 1."""
    return Scaled(jnp.where(jnp.isfinite(x), x, jnp.nan), jnp.zeros((), jnp.int32))


def lift(x: Array) -> Scaled:
    """`bare`, in standard units."""
    return canonical(bare(x))


def canonical(x: Scaled) -> Scaled:
    """The same value in its standard units: exponent 0 where that is within the headroom, else the largest entry's."""
    return _in_units(x, _units(_top(x), x.m.dtype))


def add(x: Scaled, y: Scaled) -> Scaled:
    """x + y in standard units; shapes broadcast."""
    k = _units(jnp.maximum(_top(x), _top(y)), x.m.dtype)
    return Scaled(_in_units(x, k).m + _in_units(y, k).m, k)


def times(x: Scaled, factor: Any) -> Scaled:
    """factor * x in standard units; shapes broadcast. The factor is a plain number or array; NaN where it is not finite."""
    e = unit(x.m)
    return canonical(Scaled(bare(shift(x.m, -e) * factor).m, x.k + e))


_NONE = -(2**30)  # the "exponent" of zero: below all others, so that a zero never sets the units of a sum


def _top(x):
    top = jnp.max(jnp.abs(x.m), initial=0.0)
    return jnp.where(top == 0, _NONE, _exponent_of(top) + x.k)


def _units(top, dtype):
    return jnp.where((jnp.abs(top) <= headroom(dtype)) | (top == _NONE), 0, top)


def _in_units(x, k):
    return Scaled(shift(x.m, x.k - k), k)


def norm(x: Scaled) -> LogNorm:
    """Frobenius norm of all entries. The exponent comes in the dtype of x.m, so that the pair can travel as floats."""
    e = unit(x.m)
    return LogNorm(sumsq(scale(x.m, -e)), (e + x.k).astype(x.m.dtype))


def sumsq(x: Array) -> Array:
    """The sum of squares of all entries, as they are."""
    return jnp.sum(jnp.square(x))


def tidy(n: LogNorm) -> LogNorm:
    """The same norm with sumsq of order 1: only then is the logarithm of the pair as accurate as the pair."""
    by, dtype = unit(n.sumsq[..., None], -1) >> 1, n.sumsq.dtype
    return LogNorm(scale(n.sumsq, -2 * by), n.exponent.astype(dtype) + by.astype(dtype))


def log(n: LogNorm):
    """ln of a norm; -inf for zero. On NumPy arrays the logarithm is taken in NumPy and so in their precision."""
    xp: Any = np if isinstance(n.sumsq, np.ndarray | np.generic) else jnp
    with np.errstate(divide="ignore"):
        return 0.5 * xp.log(n.sumsq) + xp.log(xp.asarray(2.0, n.sumsq.dtype)) * xp.asarray(n.exponent, n.sumsq.dtype)


def log_ratio(a: LogNorm, b: LogNorm):
    """ln(a / b), accurate however large or small both are; -inf where a is zero, NaN where both are."""
    xp: Any = np if isinstance(a.sumsq, np.ndarray | np.generic) else jnp
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = xp.asarray(a.exponent - b.exponent, a.sumsq.dtype)
        return 0.5 * (xp.log(a.sumsq) - xp.log(b.sumsq)) + xp.log(xp.asarray(2.0, a.sumsq.dtype)) * steps


def change_if(needed: Array, change: Callable, value: Any) -> Any:
    """change(value) if it is needed, a boolean scalar, else value; of the same shapes. Not to be differentiated in reverse.

    A loop of one step at most. Unlike `lax.cond` it leaves the value where it is in memory, and under `vmap` it is entered only if
    some member of the batch needs it. What `change` makes without looking at its argument is made in any case: the compiler takes
    it out of the loop.
    """
    state = lax.while_loop(lambda state: state[0], lambda state: (jnp.zeros_like(needed), change(state[1])), (needed, value))
    return state[1]
