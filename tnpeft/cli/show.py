"""`tnpeft show`: a spec, and what it becomes on a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tnpeft.cli.arguments import EXAMPLE, parse_input, parse_layer, parse_settings
from tnpeft.cli.costs import Costs, bytes_text, print_costs
from tnpeft.cli.output import Output, UsageError, number, table
from tnpeft.cli.picture import picture
from tnpeft.errors import Problem
from tnpeft.network import BoundCore, Network, Spec, load_spec
from tnpeft.network.degenerate import factor_notes
from tnpeft.network.derived import DerivedCore
from tnpeft.network.wording import axes_text, core_rows, declared_text
from tnpeft.planning import nominal_call
from tnpeft.schedule import Plan, plan
from tnpeft.spec import Core, Declaration

__all__ = ["show_spec"]


def show_spec(
    output: Output, name: str, layer: str | None, input_: str | None, settings: Sequence[str], as_json: bool
) -> None:
    """Print a spec as it stands, or bound to a layer with its network, its plan and what a call costs in each mode."""
    spec = load_spec(name)
    params = parse_settings(settings)
    if layer is None:
        fix = f"Add --layer, e.g. --layer {EXAMPLE}."
        if params:
            raise UsageError(Problem("--set without --layer", "a layer to bind the params on", "none", fix))
        if input_ is not None:
            raise UsageError(Problem("--input without --layer", "a layer to call", "none", fix))
        output.data(_spec_data(spec)) if as_json else _print_spec(output, spec)
        return
    known = parse_layer(layer)
    call = nominal_call(known) if input_ is None else parse_input(input_, known)
    network = spec.bind(known, **params)
    contraction, costs = plan(network), Costs.of(network, call)
    if as_json:
        plans = {"plan": _plan_data(contraction), "execution": costs.data()}
        notes = {"notes": list(factor_notes(network))}
        output.data(_spec_data(spec) | _network_data(network) | plans | notes)
        return
    _print_network(output, network, contraction, costs)
    if input_ is not None:
        print_costs(output, costs)


def _print_head(output: Output, spec: Declaration) -> None:
    output.say(f"{spec.name}: {spec.title}" if spec.title else spec.name)
    if spec.source:
        output.say(spec.source)


def _print_spec(output: Output, spec: Spec) -> None:
    _print_head(output, spec)
    output.say(f"layers: {', '.join(spec.layers)}; start: {spec.start}\n")
    rows = ((core.name, axes_text(core.axes), declared_text(core)) for core in spec.cores)
    output.show(table("", {"core": "left", "legs": "left", "": "left"}, rows))
    output.say(f"\nAdd --layer for shapes, parameters and costs, e.g. --layer {EXAMPLE}")


def _print_network(output: Output, network: Network, contraction: Plan, costs: Costs) -> None:
    _print_head(output, network.spec)
    params = ", ".join(f"{name} = {number(value)}" for name, value in network.params.items())
    output.say(f"on {network.layer}{', ' + params if params else ''}\n")
    columns = {"core": "left", "legs": "left", "shape": "left", "init": "left", "elements": "right"}
    output.show(table("", columns, core_rows(network)))
    for term, part in zip(network.terms, network.plain.parts, strict=True):
        label = f"term of scale {number(term.scale)}\n" if len(network.terms) > 1 else ""
        output.say("\n" + label + picture(part, output.width, output.encoding, network))
    output.say()
    share = network.num_parameters / network.layer.numel
    facts = {
        "parameters": f"{network.num_parameters:,} = {network.formula}",
        "of the weight": f"{share:.2%} of {network.layer.numel:,}",
        "scale": number(network.scale),
        "start": network.start,
        **({"compose": network.compose} if network.compose else {}),
        "einsum": network.einsum,
        "path": "; ".join(map(_path_text, contraction.terms or (contraction,))),
        "FLOPs": f"{contraction.flops:,}",
        "memory": f"{bytes_text(contraction.peak_bytes)} at the peak",
        "largest": f"{contraction.largest_intermediate:,} elements in one step's result",
        **({"maps": f"{contraction.maps} in a pass"} if network.derived else {}),
        "mode": contraction.mode,
    }
    for name, fact in facts.items():
        output.say(f"{name:<14}{fact}")
    for line in str(contraction).splitlines()[0 if contraction.terms else 1 :]:
        output.say(line)
    output.say(f"{'auto':<14}{costs}")
    for note in factor_notes(network):
        output.say(f"{'note':<14}{note}")


def _path_text(contraction: Plan) -> str:
    return " ".join(f"({', '.join(map(str, pair))})" for pair in contraction.path)


def _spec_data(spec: Spec) -> dict[str, Any]:
    return {
        "spec": spec.name,
        "title": spec.title,
        "source": spec.source,
        "layers": list(spec.layers),
        "start": spec.start,
        "compose": spec.compose,
        "cores": [_core_data(core) for core in spec.cores],
    }


def _core_data(core: Core | BoundCore) -> dict[str, Any]:
    return {
        "name": core.name,
        "legs": list(core.legs),
        "frozen": core.frozen,
        "shared": core.shared,
        "from": core.origin,
    }


def _network_data(network: Network) -> dict[str, Any]:
    layer = network.layer
    return {
        "layer": asdict(layer),
        "params": dict(network.params),
        "sizes": dict(network.sizes),
        "cores": [
            _core_data(core)
            | {
                "shape": list(core.shape),
                "init": {"name": core.init.name, "arguments": dict(core.init.arguments)},
                "elements": core.numel,
            }
            for core in network.cores
        ],
        "weight": [list(axis) for axis in network.weight],
        "terms": [
            {"cores": list(term.cores), "weight": [list(axis) for axis in term.weight], "scale": term.scale}
            for term in network.terms
        ],
        "weight_shape": list(layer.weight_shape),
        "derived": [_derived_data(made) for made in network.derived],
        "scale": network.scale,
        "einsum": network.einsum,
        "parameters": network.num_parameters,
        "formula": network.formula,
        "share": network.num_parameters / layer.numel,
    }


def _derived_data(made: DerivedCore) -> dict[str, Any]:
    return {
        "name": made.name,
        "legs": list(made.legs),
        "shape": list(made.shape),
        "of": [{"cores": list(map(str, each.references)), "scale": each.scale} for each in made.summands],
        "map": list(map(str, made.maps)),
    }


def _plan_data(contraction: Plan) -> dict[str, Any]:
    return {
        "mode": contraction.mode,
        "maps": contraction.maps,
        "path": [list(pair) for pair in contraction.path],
        "terms": [[list(pair) for pair in term.path] for term in contraction.terms],
        "flops": contraction.flops,
        "largest_intermediate": contraction.largest_intermediate,
        "peak_bytes": contraction.peak_bytes,
    }
