"""The process behind a page: what takes longer than a keystroke, one JSON document a line, in and out."""

from __future__ import annotations

import json
import os
import warnings
from typing import Any, TextIO

from tnpeft.editing.live_picture import LivePicture
from tnpeft.editing.trial import Trial
from tnpeft.errors import BindError, Problem, TnpeftError, in_one_line
from tnpeft.network import Network, Spec
from tnpeft.planning import Call
from tnpeft.schedule import plan
from tnpeft.schedule.costs import Costs
from tnpeft.verify.case import Case
from tnpeft.verify.conditioning import conditioning_of
from tnpeft.verify.directions import directions_on

__all__ = ["computed", "serve"]

_NICER = 5  # than the page, in a scheduler's steps
_LARGEST = 2**24  # entries of a weight, or of cores, that are made, with the update, to see how it starts


def computed(stage: str, text: str, trial: Trial, picture: LivePicture) -> dict[str, Any]:
    """The answer of one stage for a text on a trial. Raises TnpeftError."""
    spec = Spec.from_yaml(text)
    layer = trial.layer()
    network = spec.bind(layer, **dict(trial.params))
    if stage == "placements":
        return {key: list(map(list, places)) for key, places in picture.search(network).items()}
    if stage == "costs":
        return costs_of(network, trial.call(layer))
    cores = sum(core.numel for core in network.cores if core.origin is None)
    for what, entries, smaller in (("this weight", layer.numel, "layer"), ("these cores", cores, "size of the cores")):
        if entries > _LARGEST:
            found, fix = f"{entries:,}", f"Try a smaller {smaller}."
            raise BindError(Problem(what, f"at most {_LARGEST:,} entries here", found, fix))
    if stage == "spread":
        return spread_of(spec, network, trial)
    return directions_of(spec, network, trial)


def serve(source: TextIO, target: TextIO) -> None:
    """Answer questions line by line until there are no more, and leave the page its core."""
    if hasattr(os, "nice"):
        os.nice(_NICER)
    picture = LivePicture()
    warnings.simplefilter("ignore")
    for line in source:
        question = json.loads(line)
        trial = Trial.from_data(question["trial"])
        answer: dict[str, Any]
        try:
            answer = {"answer": computed(question["stage"], question["text"], trial, picture)}
        except TnpeftError as error:
            answer = {"refused": str(error)}
        except (ArithmeticError, MemoryError, RuntimeError, ValueError) as error:  # torch, on layers as they may be
            answer = {"refused": in_one_line(f"{type(error).__name__}: {error}")}
        said = json.dumps({"number": question["number"], **answer})
        target.write(f"\n{said}\n")  # on a line of its own, whatever else was printed
        target.flush()


def costs_of(network: Network, call: Call) -> dict[str, Any]:
    """The contraction path of the delta weight, and what each execution mode takes for a call."""
    costs = Costs.of(network, call)
    return {"path": str(plan(network)), "auto": str(costs), "rows": [list(row) for row in costs.rows()]}


def spread_of(spec: Spec, network: Network, trial: Trial) -> dict[str, Any]:
    """Standard deviations of T and of the first step, relative to the weight's; empty if the layer is refused."""
    rows = conditioning_of(spec, dict(trial.params), network.layer)
    return rows[0].as_dict() if rows else {}


def directions_of(spec: Spec, network: Network, trial: Trial) -> dict[str, Any]:
    """The share of directions in which the first steps move."""
    return directions_on(spec, Case.on(network.layer, params=dict(trial.params))).as_dict()
