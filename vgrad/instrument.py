"""Running somebody else's program with probes in it.

The equations of a traced function are evaluated one by one through jax's own evaluator, and at every site of a `vgrad.sites.Plan`
the output passes a probe (see `vgrad.probes`). The result is the same function, of the same value, with one argument more,

    loss(params, args)  ->  run(plan, jaxpr, [params, args], probes) = (loss, token, facts),

whose gradient with respect to the probes is the measurement. After every site all values in flight that depend on a site go through
`split`, so that their cotangents arrive there at order 1: the range of the readings is that of an integer exponent, whatever the
range of the program's floats.

Functions under `jit` are entered as if they were written out. A loop, a rematerialised function and the branches of a conditional
are entered with a token of their own, and what comes back from them is brought to one exponent with what went past them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vgrad.base import Array
from vgrad.flows import Path
from vgrad.jaxprs import CHECKPOINTS, INLINED, Weights, bodies, evaluate, is_float, is_literal, opened, split_operands
from vgrad.probes import NUM_STATS, flatness, norm_of, of_turn_before, probe, seen, split, stats_dtype, zero_token
from vgrad.sites import Plan

__all__ = ["probes_for", "run"]

Facts = dict[tuple[Path, str], Array]


def probes_for(plan: Plan) -> dict[Path, Array]:
    """Zeros for every site, with an axis per loop around it: [T_1, ..., NUM_STATS]."""
    return {
        path: jnp.zeros((*(length for _, length, _, _ in site.loops), NUM_STATS), stats_dtype(site))
        for path, site in plan.sites.items()
    }


def run(plan: Plan, jaxpr, values: list, probes: dict[Path, Array], zero: Array) -> tuple[list, Array, Facts]:
    """Evaluates a traced function with its probes, on the values of its constants and arguments.

    `zero` is the token to begin with, an argument of the compiled program: the compiler is not to know its value, see `split`.

    Returns:
      (outputs, token, facts). The cotangent to give the token is the exponent of the cotangents given to the outputs. Facts are
      what the forward pass saw, with an axis per loop in front: (site, "z") -> [3], as of `seen`, of the preactivation; (site, "w")
      -> [2], the norm of the weights; (site, "phi") -> [2], as of `flatness`.
    """
    inside = frozenset(path[:k] for path in plan.sites for k in range(len(path)))
    phi_at: dict[Path, list[Path]] = {}
    for site, (at, *_) in plan.phi.items():
        phi_at.setdefault(at, []).append(site)
    scope = _Scope(plan, inside, phi_at, probes, {"token": zero}, {}, [])
    out, _, _ = scope.walk(jaxpr, values, [False] * len(values), (), {})
    return out, scope.state["token"], scope.facts


class _Frame(NamedTuple):
    """Values of one jaxpr that is being evaluated: `hot` are those that depend on a site, `last` is where each is used last."""

    env: dict
    hot: set
    last: dict
    at: dict

    def live(self):
        return [v for v in self.env if v in self.hot and self.last.get(v, -1) > self.at["eqn"]]


class _Scope(NamedTuple):
    """One level of tracing: the top, or the body of a loop, a branch, a rematerialised function.

    `inside` are the equations with sites in them, `phi_at` those that act on a site's preactivation; probes, the token, facts and
    frames are those of this level.
    """

    plan: Plan
    inside: frozenset[Path]
    phi_at: dict[Path, list[Path]]
    probes: dict[Path, Array]
    state: dict
    facts: Facts
    frames: list[_Frame]

    def walk(self, jaxpr, values, hot, path, weights):
        """Evaluates a jaxpr on the values of its constants and arguments; `weights` are the `Weights` among them, by position.

        Returns the outputs, which of them are hot, and their `Weights`.
        """
        variables = [*jaxpr.constvars, *jaxpr.invars]
        last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if not is_literal(v)}
        last |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if not is_literal(v)}
        frame = _Frame(dict(zip(variables, values, strict=True)), set(), last, {"eqn": -1})
        frame.hot.update(v for v, h in zip(variables, hot, strict=True) if h)
        weights = {variables[k]: w for k, w in weights.items()}
        read = lambda v: v.val if is_literal(v) else frame.env[v]  # noqa: E731
        is_hot = lambda v: not is_literal(v) and v in frame.hot  # noqa: E731
        self.frames.append(frame)
        for i, eqn in enumerate(jaxpr.eqns):
            frame.at["eqn"] = i
            xs, hs = [read(v) for v in eqn.invars], [is_hot(v) for v in eqn.invars]
            known = [(k, v) for k, v in enumerate(eqn.invars) if not is_literal(v)]
            if (*path, i) in self.plan.derived or eqn.primitive.name in INLINED:
                for k, v in known:
                    weights.setdefault(v, Weights.leaf_of(xs[k]))
            mine = {k: weights[v] for k, v in known if v in weights}
            out, out_hot, out_weights = self.equation(jaxpr, eqn, xs, hs, (*path, i), mine)
            weights |= {eqn.outvars[k]: w for k, w in out_weights.items()}
            for v, x, h in zip(eqn.outvars, out, out_hot, strict=True):
                frame.env[v] = x
                if h and is_float(x):
                    frame.hot.add(v)
            if (*path, i) in self.plan.sites:
                self.settle()
            for v in {v for v in (*eqn.invars, *eqn.outvars) if not is_literal(v) and last.get(v, -1) <= i}:
                frame.env.pop(v, None)
        self.frames.pop()
        kept = {k: weights[v] for k, v in enumerate(jaxpr.outvars) if not is_literal(v) and v in weights}
        return [read(v) for v in jaxpr.outvars], [is_hot(v) for v in jaxpr.outvars], kept

    def equation(self, jaxpr, eqn, xs, hot, here, weights):
        name = eqn.primitive.name
        reads_phi = self.phi_at.get(here, [])
        if name in INLINED and not reads_phi:
            body, consts = opened(bodies(eqn)[0])
            num = len(consts)
            return self.walk(body, [*consts, *xs], [*[False] * num, *hot], here, {k + num: w for k, w in weights.items()})
        if here in self.inside and name in _ENTER:
            return (*_ENTER[name](self, eqn, xs, hot, here), {})
        if name == "while":  # has no transpose: a loss that depends on it differentiably has no gradient either
            xs = lax.stop_gradient(xs)
        out = evaluate(jaxpr, eqn, xs)
        site, hot = self.plan.sites.get(here), [any(hot) and name != "stop_gradient"] * len(out)
        if site is not None:
            out, hot = list(out), [True] * len(out)
            out[site.output] = self.probed(jaxpr, eqn, xs, out[site.output], site, weights.get(site.operand))
        for path in self.plan.biased.get(here, ()):
            self.facts[path, "z"] = seen(out[0])
        for path in reads_phi:
            _, operand, phi, units = self.plan.phi[path]
            self.facts[path, "phi"] = flatness(phi, xs[operand], units)
        derived = self.plan.derived.get(here)
        return out, hot, {} if derived is None else {0: Weights.derived(jaxpr, eqn, xs, weights, derived)}

    def probed(self, jaxpr, eqn, xs, z, site, weights):
        weights_vjp = None
        if site.operand >= 0:
            weights, rest = weights or Weights.leaf_of(xs[site.operand]), lax.stop_gradient(xs)
            self.facts[site.path, "w"] = norm_of(weights.leaf)

            def product(leaf):
                return evaluate(jaxpr, eqn, _put(rest, [site.operand], [weights.make({weights.key: leaf})]))[site.output]

            if eqn.primitive.name != "while":
                _, weights_vjp = jax.vjp(product, weights.leaf)
        self.facts[site.path, "z"] = seen(z)
        z, self.state["token"] = probe(z, self.probes[site.path], self.state["token"], weights_vjp)
        return z

    def settle(self):
        """Brings the cotangents of everything in flight to order 1."""
        refs = [(frame, v) for frame in self.frames for v in frame.live()]
        if refs:
            values = [frame.env[v] for frame, v in refs]
            (values,), (self.state["token"],) = split((values,), (zero_token(),), self.state["token"])
            for (frame, v), x in zip(refs, values, strict=True):
                frame.env[v] = x

    def fork(self, groups, ports):
        """Splits off tokens for groups of values, one for each port, from that of everything in flight."""
        refs = [(frame, v) for frame in self.frames for v in frame.live()]
        flying = [frame.env[v] for frame, v in refs]
        (*groups, flying), (*ports, self.state["token"]) = split((*groups, flying), (*ports, zero_token()), self.state["token"])
        for (frame, v), x in zip(refs, flying, strict=True):
            frame.env[v] = x
        return groups, ports

    def enter(self, probes, token, *frames):
        """The scope of what an equation holds."""
        return self._replace(probes=probes, state={"token": token}, facts={}, frames=list(frames))

    def own(self, here):
        """The probes of the sites within an equation."""
        return {p: x for p, x in self.probes.items() if p[: len(here)] == here}


def _checkpoint(scope: _Scope, eqn, xs, hot, here):
    body, consts = opened(bodies(eqn)[0])
    carried = [k for k, h in enumerate(hot) if h]
    ([inner], [token]) = scope.fork([[xs[k] for k in carried]], [zero_token()])
    xs = _put(xs, carried, inner)
    static = {}

    def call(probes, token, xs):
        within = scope.enter(probes, token)
        out, static["hot"], _ = within.walk(body, [*consts, *xs], [*[False] * len(consts), *hot], here, {})
        return out, within.state["token"], within.facts

    options = {k: eqn.params[k] for k in ("policy", "prevent_cse") if k in eqn.params}
    out, token, facts = jax.checkpoint(call, **options)(scope.own(here), token, xs)
    scope.facts.update(facts)
    scope.state["token"] = scope.state["token"] + token
    return out, static["hot"]


def _cond(scope: _Scope, eqn, xs, hot, here):
    carried = [k for k, h in enumerate(hot) if h]
    ([inner], [token]) = scope.fork([[xs[k] for k in carried]], [zero_token()])
    xs = _put(xs, carried, inner)
    static, own = [], scope.own(here)

    def branch(k):
        body, consts = opened(bodies(eqn)[k])

        def call(probes, token, *xs):
            within = scope.enter(probes, token)
            out, out_hot, _ = within.walk(body, [*consts, *xs], [*[False] * len(consts), *hot[1:]], (*here, k), {})
            static.append(out_hot)
            return out, within.state["token"], within.facts

        return call

    calls = [branch(k) for k in range(len(bodies(eqn)))]
    shapes = {}
    for call in calls:
        shapes |= jax.eval_shape(call, own, token, *xs[1:])[2]

    def filled(call):
        def whole(*operands):
            out, token, facts = call(*operands)
            return out, token, {key: facts.get(key, jnp.zeros(s.shape, s.dtype)) for key, s in shapes.items()}

        return whole

    out, token, facts = lax.switch(xs[0], [filled(c) for c in calls], own, token, *xs[1:])
    scope.facts.update(facts)
    scope.state["token"] = scope.state["token"] + token
    return out, [any(h) for h in zip(*static, strict=True)]


def _scan(scope: _Scope, eqn, xs, hot, here):
    body, consts = opened(bodies(eqn)[0])
    num_consts, num_carry = split_operands(eqn, body)
    length, num = eqn.params["length"], len(xs)
    # The cotangent of a constant adds up over the iterations, each at an exponent of its own. So a constant that depends on a site
    # travels in the carry, where it is rescaled with the rest.
    moved = [k for k in range(num_consts) if hot[k]]
    carried = [*moved, *(k for k in range(num_consts, num_consts + num_carry))]
    floats = [k for k in carried if is_float(xs[k])]
    scanned = list(range(num_consts + num_carry, num))
    hot_scanned = [k for k in scanned if hot[k] and is_float(xs[k])]
    (inner, over), (token, ports) = scope.fork(
        [[xs[k] for k in floats], [xs[k] for k in hot_scanned]], [zero_token(), zero_token(length)]
    )
    xs = _put(_put(xs, floats, inner), hot_scanned, over)
    body_hot = [k in floats or k in hot_scanned for k in range(num)]
    static = {}

    def step(carry, slices):
        token, values = carry
        port, own, sliced = slices
        inputs = _put(_put(xs, carried, values), scanned, sliced)
        passing = _Frame(dict(zip(moved, values, strict=False)), set(moved), dict.fromkeys(moved, 1), {"eqn": 0})
        within = scope.enter(own, token + port, passing)
        out, out_hot, _ = within.walk(body, [*consts, *inputs], [*[False] * len(consts), *body_hot], here, {})
        static["hot"] = out_hot
        new, ys = [*passing.env.values(), *out[:num_carry]], list(out[num_carry:])
        # What leaves for the next iteration and what leaves the loop come back at exponents of their own.
        leaving = [k for k, y in enumerate(ys) if out_hot[num_carry + k] and is_float(y)]
        staying = [k for k, x in enumerate(new) if is_float(x)]
        (kept, left), (token, port) = split(
            ([new[k] for k in staying], [ys[k] for k in leaving]), (zero_token(), zero_token()), within.state["token"]
        )
        return (token, _put(new, staying, kept)), (_put(ys, leaving, left), port, within.facts)

    start = (token, [xs[k] for k in carried])
    over = (ports, scope.own(here), [xs[k] for k in scanned])
    options = {k: eqn.params[k] for k in ("reverse", "unroll") if k in eqn.params}
    (token, values), (ys, ports, facts) = lax.scan(step, start, over, length=length, **options)
    for (path, kind), x in facts.items():
        before = path[: len(here)] != here  # then it was activated in the loop, which it came into
        late = kind == "phi" and (before or scope.plan.late.get(path) == here)
        scope.facts[path, kind] = of_turn_before(x, before, eqn.params["reverse"]) if late else x
    scope.state["token"] = scope.state["token"] + token + jnp.sum(ports)
    return [*values[len(moved) :], *ys], [True] * num_carry + static["hot"][num_carry:]


_ENTER = {"scan": _scan, "cond": _cond} | {name: _checkpoint for name in CHECKPOINTS}


def _put(xs, where, values):
    out = list(xs)
    for k, x in zip(where, values, strict=True):
        out[k] = x
    return out
