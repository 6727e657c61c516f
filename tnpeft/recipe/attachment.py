"""`attach`: from a spec or recipe to an adapted model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from tnpeft.adapters import Adapter, Captured
from tnpeft.adapters.hashing import digest_of_modules
from tnpeft.adapters.parked import ParameterLayer
from tnpeft.adapters.processes import holders_of, in_step
from tnpeft.documents.nodes import read_file
from tnpeft.errors import AttachError, Problem, SpecError, clip
from tnpeft.network import Network, Spec, load_spec, param_problems
from tnpeft.recipe.compilation import bound_layers, compiled_layers
from tnpeft.recipe.dropout import dropout_of
from tnpeft.recipe.given_values import Start
from tnpeft.recipe.handle import Handle
from tnpeft.recipe.model import Entry, Recipe, Train, load_recipe, train_from
from tnpeft.recipe.parameter_targets import signatures
from tnpeft.recipe.parameters import Parameters, parameters_from
from tnpeft.recipe.scopes import captures, scopes_from
from tnpeft.recipe.selection import compiled, selection_of
from tnpeft.recipe.targets import Trained, passed_over, skipped, targets, trained
from tnpeft.schedule import DEFAULT_MODE
from tnpeft.spec import find_shipped
from tnpeft.spec.habits import ATTACH, unknown_params
from tnpeft.spec.library import shipped_folder
from tnpeft.surgery import base_shown, install
from tnpeft.surgery.checks import flat_problem, model_problems
from tnpeft.surgery.parameters import bases_of

__all__ = ["Handle", "attach", "recipe_of"]

Match = str | Sequence[str]

_SAME_CALL = "Call it in each with the same arguments, on the same model."
_SAME_VALUES = "Give each process the same weights, and let registered inits draw from their generator alone."


def attach(
    model: nn.Module,
    what: Recipe | Spec | str | Path,
    *,
    match: Match | None = None,
    exclude: Match | None = None,
    kinds: Match | None = None,
    layers: int | str | Iterable[int] | Mapping[str, int | str | Iterable[int]] | None = None,
    ranks: Mapping[str, Mapping[str, float]] | None = None,
    parameters: Match | Mapping[str, str] | None = None,
    name: str = "default",
    train: Train | Mapping[str, Any] | None = None,
    scopes: Mapping[str, str] | None = None,
    dropout: Mapping[str, float] | None = None,
    init: Start | None = None,
    seed: int | None = None,
    mode: str = DEFAULT_MODE,
    autotune: bool = False,
    **params: float,
) -> Handle:
    """Put an adapter on a model; until the first optimiser step the model computes what it did, bit for bit.

    `what` is a spec or a recipe, or the name or path of one. With a spec, `match` says which layers: a regular
    expression (searched in full module names), a list of names, or `"all"`: every layer of the spec's kinds that can
    carry an adapter. `exclude` leaves some out, by a regular expression or names (of layers or of modules around them),
    `kinds` says which kinds are meant ("Linear"), `layers` which numbered blocks ("0-5", {"decoder.layers": "0-5, 8"}).
    `params` override the specs' own numbers, `ranks` those of some layers ({"q_proj$": {"r": 8}}). `parameters` names
    weights that are adapted beside layers, or alone. It has expressions or names, or maps expressions to the stored
    axes ({"mlp.w1$": "o i", "experts.down_proj$": "e o i"}: outputs, inputs, slices of a stack).

    `train` says what trains beside the cores ({"bias": "adapted", "norm": True, "also": [...]}); all else is frozen.
    `dropout` has the probabilities of dropout in training ({"input": 0.05, "bond": 0.1, "module": 0.1}): of entries of
    the update's input, of entries of a bond, of a layer's whole update. `scopes` binds the scopes of shared cores to
    regular expressions ({"block": r"layers\\.(\\d+)\\."}), `seed` overrides the specs', `name` is the adapter's.

    `init` gives first values of stored cores, index cores too, in place of what inits draw: `{"layer.core": tensor}`,
    or a function (layer, core, network) -> tensor or None, of two names and a `Network`. A callable may also have
    `prepare(layers)`, which is called first. `save` writes such values, of frozen cores too. See `tnpeft.starts`.

    `mode` says how layers apply their update: `dense` builds the delta weight and calls the layer once with the sum;
    `factored` contracts the cores with the layer's input; `hybrid` calls the layer with the sum and takes the cores'
    gradients from the factored chain. All agree but for rounding. What cannot be factored (groups, DoRA, several active
    adapters, other scales than 1, most cores that are the base weight) runs dense. `auto` takes the mode with the least
    predicted time; with `autotune` it times the modes once for each new kind of call. Second derivatives need `dense`.

    An adapter that would need more than the device's memory is refused (`tnpeft.memory_limit`). If FSDP2 has sharded
    the model, every process must call `attach`; each then holds all of the new cores. Raises SpecError, BindError or
    AttachError with every mistake found; the model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise AttachError(Problem("model", "a torch.nn.Module", clip(model), "Pass the model itself."))
    where = {"exclude": exclude, "kinds": kinds, "layers": layers, "ranks": ranks, "parameters": parameters}
    holders = holders_of(model)
    with in_step(holders, lambda: _unlike("attach", _SAME_CALL)) as said:
        recipe = _with(recipe_of(what, match, params, **where), train, scopes, dropout)
        claims = _claims(model, recipe, mode)
        said.append(lambda: (name, seed, mode, claims.in_words))
    adapters = _compiled(model, claims, holders, seed, mode, autotune, init)
    install(model, name, adapters, claims.also.names, _about(model, recipe, claims.layers, claims.also))
    return Handle(model, name)


def _compiled(model: nn.Module, claims: _Claims, holders: Sequence[Any], *options: Any) -> dict[str, Adapter]:
    """The adapters of all layers, with first values that are the same in every process."""
    with base_shown(model):  # cores may be made of weights that another adapter trains as a whole
        adapters = compiled_layers(claims.networks, claims.bases, claims.layers, claims.captured, *options)
    with in_step(holders, lambda: _unlike("initial cores", _SAME_VALUES)) as said:
        said.append(lambda: digest_of_modules(adapters))
    return adapters


def _unlike(what: str, fix: str) -> AttachError:
    return AttachError(Problem(what, "the same in every process that holds parts of the model", "others in some", fix))


class _Claims(NamedTuple):
    """What a recipe does to a model: the layers it adapts, the networks on them, and what trains beside the cores."""

    layers: Mapping[str, Entry]
    also: Trained
    captured: Mapping[str, Captured]
    bases: Mapping[str, nn.Module | ParameterLayer]
    networks: Mapping[str, Network]

    @property
    def in_words(self) -> list[object]:
        """All that must be the same in processes that hold parts of one model."""
        layers = [(name, each.spec.text, dict(each.params)) for name, each in self.networks.items()]
        return [layers, self.also, [dict(each) for each in self.captured.values()]]


def _claims(model: nn.Module, recipe: Recipe, mode: str) -> _Claims:
    """Raises AttachError for a model to which nothing, or not this recipe, can be attached."""
    flat = flat_problem(model)
    if problems := [*model_problems(model)] if flat is None else [flat]:
        raise AttachError(*problems)
    layers = targets(model, recipe)
    also = trained(model, recipe.train, layers)
    captured = captures(layers, recipe.scopes)
    bases = bases_of(model, signatures(model, layers))
    return _Claims(layers, also, captured, bases, bound_layers(bases, layers, mode))


def _with(recipe: Recipe, train: Any, scopes: Mapping[str, str] | None, given: object) -> Recipe:
    """The recipe with `attach`'s arguments for what trains, for scopes and for dropout. Raises AttachError."""
    recipe = recipe if train is None else replace(recipe, train=train_from(train))
    recipe = replace(recipe, scopes=scopes_from(scopes, recipe))
    if given is None:
        return recipe
    dropout, told = dropout_of(given)
    if told:
        raise AttachError(*(problem for _, problem in told))
    return replace(recipe, entries=tuple(replace(entry, dropout=dropout) for entry in recipe.entries))


def _about(model: nn.Module, recipe: Recipe, claimed: Mapping[str, Entry], also: Trained) -> dict[str, Any]:
    """What the adapter's record and files hold on how it was attached, as JSON-like data."""
    trained_names = {reason: list(names) for reason, names in asdict(also).items()}
    about: dict[str, Any] = {"recipe": recipe.name, "trained": trained_names}
    if left_out := skipped(model, recipe):
        about["skipped"] = left_out
    if others := passed_over(model, recipe, claimed):
        about["passed"] = others
    return about


def recipe_of(what: object, match: Match | None, params: Mapping[str, Any], **selection: Any) -> Recipe:
    """What `attach` takes, as a recipe: a spec becomes a recipe of one entry. Raises SpecError and AttachError."""
    recipe = _recipe_of(what, match, params, {key: value for key, value in selection.items() if value is not None})
    if problems := [each for entry in recipe.entries for each in param_problems(entry.spec, entry.params, ATTACH)]:
        raise AttachError(*problems)
    return recipe


def _recipe_of(what: object, match: Match | None, params: Mapping[str, Any], selection: Mapping[str, Any]) -> Recipe:
    found = _find(what) if isinstance(what, str | Path) else what
    if isinstance(found, Spec):
        entry = _entry(found, match, params, selection)
        return Recipe(found.name, (entry,), Train(), found.title, found.source, found.file)
    if not isinstance(found, Recipe):
        fix = "Pass the name or path of one, `load_spec(...)` or `load_recipe(...)`."
        raise AttachError(Problem("attach", "a spec or a recipe", type(what).__name__, fix))
    for key, value in {"match": match, **selection}.items():
        if value is not None:
            fix = f"Remove `{key}`, or attach a spec."
            raise AttachError(Problem(f"recipe '{found.name}'", "its own patterns", f"{key}={clip(value)}", fix))
    return _override(found, params)


def _find(what: str | Path) -> Spec | Recipe:
    """A spec or recipe by name or path; a file with `adapters` is a recipe."""
    path = find_shipped(what, "recipe or spec", "recipes", "")
    if path.parent == shipped_folder() / "recipes":
        return load_recipe(path)
    try:
        return load_spec(path)
    except SpecError:
        if not _is_recipe(path):
            raise
    return load_recipe(path)


def _is_recipe(path: Path) -> bool:
    try:
        return path.suffix in (".yaml", ".yml") and read_file(path).get("adapters") is not None
    except SpecError:
        return False


def _entry(spec: Spec, match: Match | None, params: Mapping[str, Any], given: Mapping[str, Any]) -> Entry:
    parameters: Parameters | None = None
    if "parameters" in given:
        given = dict(given)
        parameters, wrong = parameters_from(given.pop("parameters"))
        if wrong:
            raise AttachError(*(problem for _, problem in wrong))
        match = () if match is None else match
    if match is None:
        fix = r"For example `match=r'attn\.to_[qv]$'`, a list of names from `model.named_modules()`, or `match='all'`."
        unknown = unknown_params(f"params of spec '{spec.name}'", params, spec.params, ATTACH)
        raise AttachError(*unknown, Problem(f"spec '{spec.name}'", "`match`", "none", fix))
    if isinstance(match, str):
        compiled(match)
        layers: str | tuple[str, ...] = match
    else:
        layers = tuple(match) if isinstance(match, list | tuple | set | frozenset) else ()
        empty = not layers and (parameters is None or match != ())
        if empty or not all(isinstance(item, str) and item for item in layers):
            fix = "Give full module names, as `model.named_modules()` has them."
            raise AttachError(Problem("`match`", "a regular expression or layer names", clip(match), fix))
    if not given:
        return Entry(spec, layers, params, parameters=parameters)
    selection, told = selection_of(given, spec, ATTACH)
    if told:
        raise AttachError(*(problem for _, problem in told))
    return Entry(spec, layers, params, selection=selection, parameters=parameters)


def _override(recipe: Recipe, params: Mapping[str, Any]) -> Recipe:
    """Each entry takes the overrides its spec knows; one that none knows is a mistake."""
    known = dict.fromkeys(key for entry in recipe.entries for key in entry.spec.params)
    if problems := [*unknown_params(f"params of recipe '{recipe.name}'", params, known, ATTACH)]:
        raise AttachError(*problems)
    entries = tuple(
        replace(entry, params={**entry.params, **{key: params[key] for key in params if key in entry.spec.params}})
        for entry in recipe.entries
    )
    return replace(recipe, entries=entries)
