"""Where a program keeps its layers: the analysis behind `vgrad.diagnose`.

A JAX function is traced to a jaxpr, a list of equations, and a layer is recognised there without the help of any framework: it is a
matrix product or a convolution one of whose operands is a **view** of a parameter leaf, that is

    operand = layout(leaf),    layout made of reshape, transpose, convert, slice, broadcast, ...

Such an equation is a *site*, named by the leaf's path in the parameter tree. A value marked by `tap` is one too. The analysis walks
the equations once, without numbers, and carries a `Flow` for every value: which leaf it is a view of, which leaves it depends on,
how many sites lie before it, and of which sites it is still the preactivation. From the last comes the guess at the activation.

A loop's body is walked until the flows of its carry no longer change, which takes two or three rounds.
"""

import math
from typing import Any, NamedTuple

from jax.ad_checkpoint import checkpoint_name

from vgrad import jaxprs
from vgrad.flows import Flow, Path, agreed, either, merged, of_turn
from vgrad.jaxprs import bodies, is_float, is_literal, opened, products

__all__ = ["Plan", "Site", "analyse", "tap"]

_GATED = {"sigmoid": "silu", "erf": "gelu", "tanh": "gelu_tanh"}  # what z times the activation of z is


def tap(x, name: str):
    """Marks x as a site that `vgrad.diagnose` shows under `name`. The identity, under every transformation of jax.

    For what is not a product with a parameter: an embedding, a norm's output or scale, a residual stream. It is
    `jax.ad_checkpoint.checkpoint_name`, so values that are named for a rematerialisation policy are sites as well.

    Args:
      x: array, or pytree of arrays, of any shape.
      name: how the report calls it.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"the name of a tap is {name!r}, expected a string: tap(x, 'embedding').")
    return checkpoint_name(x, name)


class Site(NamedTuple):
    """One product, convolution, tap or opaque equation that a parameter feeds.

    Attributes:
      path: where it stands: the index of its equation, preceded by those of the equations and branches around it.
      kind: "dot", "conv", "tap" or "opaque".
      name: of the leaf, or of the tap.
      depth: number of sites on the longest way from the input to this one, itself included; of the first iteration of a loop.
      operand: which operand the weights are; -1 for none.
      output: which output is read.
      units: the axes of the output that count units.
      shape, dtype: of the output.
      loops: for every loop around it, the length of its path up to the loop's equation, the number of iterations, by how much the
        depth grows per iteration, and whether it runs from the last to the first.
    """

    path: Path
    kind: str
    name: str
    depth: int
    operand: int
    output: int
    units: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: Any
    loops: tuple[tuple[int, int, int, bool], ...] = ()


class Plan(NamedTuple):
    """What there is to read in a program, by path.

    Attributes:
      sites: the sites.
      biased: equation that adds the bias -> the sites whose preactivation is then complete.
      phi: site -> (equation, its operand, name, axes of the operand that count units) of the activation behind it.
      late: sites whose activation is that equation in the next turn of a loop -> the loop.
      derived: equations that compute something from parameters alone -> the operand that comes from the leaf to name.
      biases: the leaves that are added to a product.
      stacked: the leaves that are scanned over.
      joined: name of weights put together from several leaves -> the names of those.
      used: the leaves the output depends on, as bits.
    """

    sites: dict[Path, Site]
    biased: dict[Path, tuple[Path, ...]]
    phi: dict[Path, tuple[Path, int, str, tuple[int, ...] | None]]
    late: dict[Path, Path]
    derived: dict[Path, int]
    biases: set[int]
    stacked: set[int]
    joined: dict[str, list[str]]
    used: int = 0


def analyse(closed, leaves: list[str]) -> Plan:
    """Finds the sites of a traced function whose first arguments are the parameter leaves of these names."""
    plan, leaves = _empty(), list(leaves)
    jaxpr, consts = opened(closed)
    flows = [Flow(leaf=i, rank=3, deps=1 << i, units=_axes(v)) for i, v in zip(range(len(leaves)), jaxpr.invars, strict=False)]
    flows += [Flow(data=True)] * (len(jaxpr.invars) - len(leaves))
    out = _Walk(plan, leaves, ()).walk(jaxpr, [Flow()] * len(consts), flows, ())
    return plan._replace(used=out[0].deps)


def _axes(v) -> tuple[int, ...]:
    return tuple(range(len(v.aval.shape)))


def _empty() -> Plan:
    return Plan({}, {}, {}, {}, {}, set(), set(), {})


class _Walk(NamedTuple):
    """A walk over the equations of one scope. `loops` are those around it."""

    plan: Plan
    leaves: list[str]
    loops: tuple

    def walk(self, jaxpr, const_flows, flows, path) -> list[Flow]:
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*const_flows, *flows], strict=True))
        look = lambda v: Flow() if is_literal(v) else env[v]  # noqa: E731
        for i, eqn in enumerate(jaxpr.eqns):
            out = self.equation(eqn, [look(v) for v in eqn.invars], (*path, i))
            for v, flow in zip(eqn.outvars, out, strict=True):
                env[v] = flow if is_float(v.aval) else flow._replace(deps=0)
        return [look(v) for v in jaxpr.outvars]

    def equation(self, eqn, flows, here) -> list[Flow]:
        name = eqn.primitive.name
        if name in jaxprs.PRODUCTS:
            return self.product(eqn, flows, here)
        if name == "name" and is_float(eqn.outvars[0].aval):
            return [self.site(eqn, flows, here, "tap", str(eqn.params["name"]), -1, 0, flows[0])]
        tagged = [k for k, f in enumerate(flows) if f.tags]
        if tagged and jaxprs.activation(eqn):
            return self.activated(eqn, flows, here, tagged[0], jaxprs.activation(eqn))
        if name in jaxprs.INLINED | jaxprs.CHECKPOINTS:
            body, consts = opened(bodies(eqn)[0])
            return self.walk(body, [Flow()] * len(consts), flows, here)
        if name == "scan":
            return self.scan(eqn, flows, here)
        if name == "cond":
            return self.cond(eqn, flows, here)
        if name == "stop_gradient":
            return [flows[0]._replace(leaf=-1, rank=0, deps=0)]
        if name == "optimization_barrier":
            return flows
        if bodies(eqn) and any(products(b) for b in bodies(eqn)):
            return self.opaque(eqn, flows, here)
        if name in jaxprs.LAYOUT:
            return self.layout(eqn, flows, here)
        if name in ("concatenate", "stack") and all(f.rank == 3 for f in flows):
            return [self.joined(flows)._replace(units=_axes(eqn.outvars[0]))]
        return [self.elementwise(eqn, flows, here, v) for v in eqn.outvars]

    def site(self, eqn, flows, here, kind, name, operand, output, out: Flow) -> Flow:
        """Records a site and returns the flow of its output."""
        depth = 1 + max(f.depth for f in flows)
        aval = eqn.outvars[output].aval
        # Of weights looked up by data every sample has its own.
        own = (flows[operand].rank > 1 and flows[operand].units) or ()
        units = jaxprs.units(eqn, operand, output, own)
        self.plan.sites[here] = Site(here, kind, name, depth, operand, output, units, aval.shape, aval.dtype, self.loops)
        tags, part = (here,), ()
        if kind == "tap" and out.tags:
            tags, units, part = (*out.tags, here), out.units, out.part
        return out._replace(depth=depth, tags=tags, own=True, units=units, part=part, acted=("", (), ()), uniform=False)

    def product(self, eqn, flows, here):
        both = merged(flows)
        operand = max(range(2), key=lambda k: (flows[k].rank, k))
        if not flows[operand].rank or not is_float(eqn.outvars[0].aval):
            return [both._replace(data=True)]
        # A product of two views may be a factorised weight; what is computed from parameters otherwise may be data closed over.
        factors = all(f.rank == 3 for f in flows[:2])
        out = both._replace(leaf=flows[operand].leaf, rank=2) if factors else both._replace(data=True)
        return [self.site(eqn, flows, here, jaxprs.PRODUCTS[eqn.primitive.name], self.leaves[flows[operand].leaf], operand, 0, out)]

    def opaque(self, eqn, flows, here):
        """An equation that is not entered, for it has a derivative of its own or none: one site, its largest output."""
        both = merged(flows)._replace(data=True)
        out = [both] * len(eqn.outvars)
        weights = [k for k, f in enumerate(flows) if f.rank and is_float(eqn.invars[k].aval)]
        readable = [j for j, v in enumerate(eqn.outvars) if is_float(v.aval)]
        if weights and readable:
            operand = max(weights, key=lambda k: (len(eqn.invars[k].aval.shape) > 1, flows[k].rank, -k))
            output = max(readable, key=lambda j: math.prod(eqn.outvars[j].aval.shape))
            inside = [k for b in bodies(eqn) for k in products(b)]
            kind = inside[0] if eqn.primitive.name == "custom_jvp_call" and len(inside) == 1 else "opaque"
            depth = self.site(eqn, flows, here, kind, self.leaves[flows[operand].leaf], operand, output, both)
            out = [depth if j == output else both._replace(depth=depth.depth) for j in range(len(out))]
        return out

    def scan(self, eqn, flows, here):
        body, consts = opened(bodies(eqn)[0])
        num_consts, num_carry = jaxprs.split_operands(eqn, body)
        base = max([0, *(f.depth for f in flows)])
        plain = lambda f: f._replace(depth=base, tags=(), own=False, acted=("", (), ()), uniform=False)  # noqa: E731
        inner = [plain(f) for f in flows]
        inner[num_consts + num_carry :] = map(of_turn, inner[num_consts + num_carry :])
        carry = slice(num_consts, num_consts + num_carry)
        length, reverse = eqn.params["length"], eqn.params["reverse"]
        self.plan.stacked.update(f.leaf for f in flows[num_consts + num_carry :] if f.rank)
        scratch = self._replace(plan=_empty())
        while True:
            out = scratch.walk(body, [Flow()] * len(consts), inner, here)
            joined = [either(f, plain(g)) for f, g in zip(inner[carry], out[:num_carry], strict=True)]
            if joined == inner[carry]:
                break
            inner[carry] = joined
        step = max([0, *(f.depth - base for f in out[:num_carry])])
        loops = (*self.loops, (len(here), length, step, reverse))
        out = self._replace(loops=loops).walk(body, [Flow()] * len(consts), inner, here)
        # A block that starts with its activation meets the preactivations of the iteration before, or of before the loop.
        before = zip(flows[carry], inner[carry], out[:num_carry], strict=True)
        inner[carry] = [f._replace(tags=(*first.tags, *last.tags), **agreed([first, last])) for first, f, last in before]
        scratch.walk(body, [Flow()] * len(consts), inner, here)
        for site, phi in scratch.plan.phi.items():
            if site not in self.plan.phi:
                self.plan.phi[site] = phi
                self.plan.late[site] = here
        return [plain(f)._replace(depth=f.depth + step * (length - 1)) for f in out]

    def cond(self, eqn, flows, here):
        plain = lambda f: f._replace(tags=(), own=False, acted=("", (), ()))  # noqa: E731
        every = []
        for k, branch in enumerate(bodies(eqn)):
            body, consts = opened(branch)
            every.append(self.walk(body, [Flow()] * len(consts), [plain(f) for f in flows[1:]], (*here, k)))
        out = every[0]
        for other in every[1:]:
            out = [either(f, g) for f, g in zip(out, other, strict=True)]
        return [plain(f)._replace(data=f.data or flows[0].data) for f in out]

    def layout(self, eqn, flows, here) -> list[Flow]:
        f, name = flows[0], eqn.primitive.name
        if any(g.data for g in flows[1:]) or (name == "gather" and math.prod(eqn.invars[1].aval.shape[:-1]) > 1):
            f = f._replace(rank=min(f.rank, 1), data=f.data or any(g.data for g in flows[1:]))
        if f.deps and name not in ("slice", "dynamic_slice", "split", "unstack") and (f.rank or not f.data):
            self.plan.derived[here] = 0
        uniform = f.uniform or math.prod(eqn.invars[0].aval.shape) == 1
        f = f._replace(depth=max(g.depth for g in flows), uniform=uniform)
        if f.units is not None:
            f = f._replace(units=jaxprs.moved(eqn, f.units))
        if name in ("slice", "dynamic_slice", "split", "unstack", "gather"):
            return [f._replace(part=(*f.part, *here, j)) for j in range(len(eqn.outvars))]
        return [f] * len(eqn.outvars)

    def joined(self, flows):
        """Weights put together from several leaves: queries, keys and values in one, or a list of layers to be scanned over."""
        parts = list(dict.fromkeys(n for f in flows for n in self.plan.joined.get(self.leaves[f.leaf], [self.leaves[f.leaf]])))
        name = "+".join(parts if len(parts) < 4 else [parts[0], "...", parts[-1]])
        if name not in self.leaves:
            self.leaves.append(name)
        self.plan.joined[name] = parts
        return merged(flows)._replace(leaf=self.leaves.index(name), rank=3)

    def elementwise(self, eqn, flows, here, out):
        shape = lambda k: eqn.invars[k].aval.shape  # noqa: E731
        both = merged(flows)
        same = [k for k in range(len(flows)) if shape(k) == out.aval.shape]
        # Weights computed from a leaf: by parameters and constants alone, or divided by one number such as a spectral norm.
        leaf = max(same, key=lambda k: flows[k].rank, default=-1)
        if (
            leaf >= 0
            and flows[leaf].rank >= 2
            and all(k == leaf or not f.data or f.uniform or math.prod(shape(k)) == 1 for k, f in enumerate(flows))
        ):
            self.plan.derived[here] = leaf
            units = {a for k in same if flows[k].rank for a in flows[k].units or ()}
            both = both._replace(leaf=flows[leaf].leaf, rank=2, data=False, units=tuple(sorted(units)))
        elif both.deps and not both.data:
            self.plan.derived[here] = next(k for k, f in enumerate(flows) if f.deps)
        tags = tuple(dict.fromkeys(t for k in same for t in flows[k].tags))
        own = False
        if tags and eqn.primitive.name == "add":
            bias = [f for f in flows if not f.tags]
            own = len(bias) == 1 and not bias[0].data and any(f.own for f in flows)
            if own and bias[0].leaf >= 0:
                self.plan.biased[here] = tags
                self.plan.biases.add(bias[0].leaf)
        acted = next((f.acted for k, f in enumerate(flows) if f.acted[0] and k in same), ("", (), ()))
        if acted[0]:  # a gate that looks at another part of the product is no such activation
            tagged = [k for k in same if set(flows[k].tags) & set(acted[1]) and flows[k].part == acted[2]]
            if eqn.primitive.name == "mul" and tagged and acted[0] in _GATED:
                return self.activated(eqn, flows, here, tagged[0], _GATED[acted[0]], upgrade=True)[0]
        return both._replace(tags=tags, own=own, acted=acted, **(agreed([flows[k] for k in same]) if tags else {}))

    def activated(self, eqn, flows, here, operand, name, *, upgrade=False):
        """Records that `name` is what acts on the sites of an operand, unless another activation came first."""
        tags = flows[operand].tags
        for site in tags:
            if upgrade or site not in self.plan.phi:
                self.plan.phi[site] = (here, operand, name, flows[operand].units)
        return [merged(flows)._replace(data=True, acted=(name, tags, flows[operand].part))] * len(eqn.outvars)
