"""What the analysis of a program knows of each value in it.

A `Flow` goes with every value of a jaxpr from its definition to its uses, and says by what road parameters came into it:

    view of a leaf  >  computed elementwise from leaves and constants  >  looked up in a leaf by data  >  none of these.

The order is that of confidence: of the two operands of a matrix product, the higher one is the weights.
"""

from typing import NamedTuple

__all__ = ["Flow", "Path", "agreed", "either", "merged", "of_turn"]

Path = tuple[int, ...]


class Flow(NamedTuple):
    """What is known of a value.

    Attributes:
      leaf: index of the parameter leaf that it is a view of, or computed from elementwise; -1 for none.
      rank: how sure that is: 3 a view, 2 computed elementwise from parameters and constants, 1 looked up by data, 0 no leaf.
      data: whether it depends on anything but parameters and constants.
      deps: the leaves it depends on differentiably, as bits.
      depth: the number of sites on the longest way to it.
      tags: the sites it is the preactivation of, whatever shifts and norms came between.
      own: whether it is exactly the product, or the product and its bias.
      units: its axes that count the units of those sites, or of a view of a leaf those along which it was not broadcast; None where
        a change of layout mixed them with others.
      part: which part of the sites it is, where they were cut: the equations that cut, and the numbers of the outputs.
      acted: the activation that it is the value of, and of which sites, and of which part of them.
      uniform: whether it is one number, broadcast.
    """

    leaf: int = -1
    rank: int = 0
    data: bool = False
    deps: int = 0
    depth: int = 0
    tags: tuple[Path, ...] = ()
    own: bool = False
    units: tuple[int, ...] | None = None
    part: Path = ()
    acted: tuple[str, tuple[Path, ...], Path] = ("", (), ())
    uniform: bool = False


def of_turn(f: Flow) -> Flow:
    """The flow of what one turn of a loop gets of a value that the loop goes over."""
    return f._replace(units=None if f.units is None else tuple(a - 1 for a in f.units if a))


def merged(flows) -> Flow:
    """The flow of a value computed from several."""
    deps = 0
    for f in flows:
        deps |= f.deps
    return Flow(data=any(f.data for f in flows), deps=deps, depth=max((f.depth for f in flows), default=0))


def either(f: Flow, g: Flow) -> Flow:
    """The flow of a value that is one or the other."""
    both = merged([f, g])
    return both._replace(leaf=f.leaf, rank=min(f.rank, g.rank)) if f.leaf == g.leaf else both._replace(data=True)


def agreed(flows) -> dict:
    """`units` and `part` of a value whose sites come from several, where they say the same of them."""
    tagged = [f for f in flows if f.tags]
    units, parts = ({getattr(f, name) for f in tagged} for name in ("units", "part"))
    # Of two parts put together: neither of them, and no other's.
    return {"units": units.pop() if len(units) == 1 else None, "part": parts.pop() if len(parts) == 1 else (-1,) * len(parts)}
