"""Execution modes: each plans a network for a call; `auto` takes the one that takes least, of time and saved bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from tnpeft.errors import Problem, TnpeftError, clip, near_miss
from tnpeft.network.model import Network
from tnpeft.planning.call import Call, nominal_call
from tnpeft.planning.device_model import device_model
from tnpeft.schedule.memory import FLOAT_BYTES
from tnpeft.schedule.model import Plan
from tnpeft.schedule.plans import plan_dense, plan_factored, plan_hybrid
from tnpeft.schedule.predict import predict

__all__ = ["DEFAULT_MODE", "MODES", "best_plan", "check_choices", "check_mode", "feasible_plans", "plan"]


MODES = ("dense", "factored", "hybrid", "auto")
# What layers get that are attached, compiled or loaded from another library's file.
DEFAULT_MODE = "auto"
# Bytes that `auto` may spend on a layer for speed, and those of an input and output for which it need not ask: the
# copies that a chain makes of them are a few times as much.
ROOM, LITTLE = 256 << 20, 16 << 20
# How a dense plan runs on an opaque layer.
_PRODUCT = "one product with the delta weight beside the layer's own"


def plan(network: Network, mode: str = "dense", call: Call | None = None, *, inference: bool = False) -> Plan:
    """The plan of `network` in the execution mode `mode`, for calls like `call`; paths are cached per signature.

    `dense` contracts the cores to the delta weight. `factored` contracts them with the layer's input, `hybrid` uses the
    delta weight forward and the factored chain for the cores' gradients; where a network cannot be factored the plan
    is the dense one, and its `reason` says why. `auto` is the one of the three with the least predicted time of a
    forward and a backward pass, where bytes saved between the two count as well; with `inference`, of a forward pass
    alone, where hybrid does what dense does. Without a `call` one of moderate size is assumed.

    An opaque layer is called as it is, and the update is added to its output. In `auto` and `factored` the chain
    computes it. In `dense` and `hybrid`, and where a network cannot be factored, one product with the delta weight
    does.

    Raises:
        TnpeftError: `mode` is unknown, or `network` is no `Network`.
        BindError: the cores' sizes contradict each other, or an index dangles.
    """
    check_mode(mode)
    if not isinstance(network, Network):
        fix = "Bind a spec to a layer: `tnpeft.plan(spec.bind(layer))`."
        raise TnpeftError(Problem("plan", "a network", type(network).__name__, fix))
    call = call or nominal_call(network.layer)
    if network.layer.opaque:
        return _plan_opaque(network, mode, call)
    if mode == "auto":
        return best_plan(feasible_plans(network, call, inference), call, inference)
    dense = plan_dense(network)  # checks the sizes first
    if mode == "dense":
        return dense
    chain = plan_factored(network, call)
    if isinstance(chain, str):
        return replace(dense, reason=chain)
    if chain.side is not None and mode == "hybrid":
        return replace(dense, reason="a core is the base weight itself")
    return chain if mode == "factored" else plan_hybrid(dense, chain)


def _plan_opaque(network: Network, mode: str, call: Call) -> Plan:
    dense = plan_dense(network)
    chain = plan_factored(network, call) if mode in ("auto", "factored") else ""
    if not isinstance(chain, str) and chain.side is not None:
        chain = "a core is the base weight itself"
    if isinstance(chain, str):
        return replace(dense, reason=f"{chain}: {_PRODUCT}" if chain else _PRODUCT)
    return chain


def check_mode(mode: object) -> None:
    """Raises TnpeftError for what is no execution mode."""
    if not isinstance(mode, str) or mode not in MODES:
        known = ", ".join(f"`{name}`" for name in MODES)
        fix = near_miss(str(mode), MODES) or "Leave `mode` out for the default."
        raise TnpeftError(Problem("the execution mode", f"one of {known}", f"`{str(mode)[:40]}`", fix))


def check_choices(choices: Mapping[str, str]) -> None:
    """Raises TnpeftError for a mode that no call can run in."""
    known = [name for name in MODES if name != "auto"]
    for call, mode in choices.items():
        if mode not in known:
            expected = f"one of {', '.join(f'`{name}`' for name in known)}"
            fix = near_miss(mode, known) or "Leave it out: it is chosen again."
            raise TnpeftError(Problem(f"the mode chosen for {clip(call)}", expected, f"`{mode[:40]}`", fix))


def feasible_plans(network: Network, call: Call, inference: bool = False) -> list[Plan]:
    """The plans that `auto` chooses from: the dense one first, the others where the network can be factored.

    Without a backward pass a hybrid layer does what a dense one does. Plans whose copies of a large input take far more
    memory than dense are left out, however quick they are.
    """
    dense = plan_dense(network)
    chain = plan_factored(network, call)
    if isinstance(chain, str):
        return [replace(dense, reason=chain)]
    others = [chain] if inference or chain.side is not None else [plan_hybrid(dense, chain), chain]
    return [dense, *(other for other in others if _has_room(other, dense, call, inference))]


def _has_room(candidate: Plan, dense: Plan, call: Call, inference: bool) -> bool:
    """Whether a plan takes no more than `ROOM` beyond dense, or twice the layer's input and output if that is more."""
    layer = candidate.network.layer
    elements = call.batch * (call.inputs * layer.in_channels + call.outputs * layer.out_channels)
    if FLOAT_BYTES * elements <= LITTLE:
        return True
    needs, dense_needs = candidate.memory, dense.memory
    more = needs.forward - dense_needs.forward if inference else needs.peak - dense_needs.peak
    return more <= max(ROOM, 2 * FLOAT_BYTES * elements)


def best_plan(plans: Iterable[Plan], call: Call, inference: bool = False) -> Plan:
    """The plan that takes least: predicted seconds, and what it saves for a backward pass at its price there.

    The first of equals. Without a backward pass nothing is saved.
    """
    worth = device_model(call.device).saved * 1e-9

    def seconds(plan: Plan) -> float:
        prediction = predict(plan, call)
        return prediction.forward if inference else prediction.step + worth * plan.saved_bytes

    return min(plans, key=seconds)
