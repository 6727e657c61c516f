"""Recipes: which spec goes on which layers, and what else trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tnpeft.documents.nodes import Node, read_bytes, read_document
from tnpeft.documents.schema import FilePart, Schema, check_shape, entries_problem, with_text_keys
from tnpeft.errors import Position, Problem, Problems, SpecError, TnpeftError, clip, near_miss
from tnpeft.network import Spec, load_spec
from tnpeft.network.dropout import Dropout
from tnpeft.recipe.dropout import dropout_advice, dropout_of
from tnpeft.recipe.parameters import Parameters, parameters_from
from tnpeft.recipe.selection import Selection, compiled, selection_of
from tnpeft.spec import find_shipped
from tnpeft.spec.habits import advice_on, is_word, unknown_params, value_of_param
from tnpeft.spec.library import label_of, shipped_folder

__all__ = [
    "RECIPE",
    "SELECTION",
    "DropoutFile",
    "Entry",
    "Recipe",
    "Train",
    "list_recipes",
    "load_recipe",
    "train_from",
]

SELECTION = ("exclude", "kinds", "layers", "ranks")
"""The keys of an entry that narrow `match`, and give single layers params of their own."""

Norm = bool | Literal["all"]
Bias = Literal["none", "adapted", "all"]
Scalar = int | float


Numbers = int | str | list[int]


class DropoutFile(FilePart):
    input: Scalar = 0
    bond: Scalar = 0
    module: Scalar = 0


class EntryFile(FilePart):
    spec: str
    match: str | list[str]
    parameters: str | list[str] | dict[str, str] | None = None
    params: dict[str, Scalar] = Field(default_factory=dict)
    exclude: str | list[str] | None = None
    kinds: str | list[str] | None = None
    layers: Numbers | dict[str, Numbers] | None = None
    ranks: dict[str, dict[str, Scalar]] | None = None
    dropout: DropoutFile | None = None


class TrainFile(FilePart):
    bias: Bias = "none"
    norm: bool | Literal["all"] = False
    also: list[str] = Field(default_factory=list)


class RecipeFile(FilePart):
    tnpeft: Literal[1]
    name: str
    title: str = ""
    source: str = ""
    adapters: list[EntryFile]
    scopes: dict[str, str] = Field(default_factory=dict)
    train: TrainFile = Field(default_factory=TrainFile)


def _advice(path: tuple[str | int, ...], key: str, value: object) -> str:
    """What to write for a key that no recipe has, or that belongs elsewhere in a recipe."""
    if path == ("train",):
        return advice_on(key, ())
    if path[-1:] == ("dropout",):
        return dropout_advice(key, None)
    within = "" if path else " in an entry of `adapters`"
    if key.endswith("_dropout") and (said := dropout_advice(key, value)):
        return said.replace("`.", f"`{within}.")
    if key in EntryFile.model_fields:
        return f"Write it{within}."
    if key in TrainFile.model_fields:
        return "Write it in `train`, beside `adapters`."
    if params := value_of_param(key, value):
        return f"Write `{params}`{within}."
    return advice_on(key, () if within else [*EntryFile.model_fields])


RECIPE = Schema(
    what="recipe",
    model=RecipeFile,
    expected={
        "tnpeft": ("the language version 1", "Write `tnpeft: 1`."),
        "name": ("a word", "Write `name: my_recipe`; quote it if it looks like a number."),
        "title": ("a text", "Quote it."),
        "source": ("a text", "Quote it."),
        "adapters": ("a list of specs with their layers", "For example `adapters: [{spec: lora, match: to_q}]`."),
        "spec": ("a spec's name or path", "For example `spec: lora`."),
        "match": (
            "a regular expression, a list of layer names, or `all`",
            r"For example `match: 'conv[12]\.conv$'`; `match: all` takes every layer of the spec's kinds.",
        ),
        "parameters": (
            "regular expressions on parameters' names with orientations, or parameters of known owners",
            r"For example `parameters: {'experts\.down_proj$': e o i}`: slices, outputs, inputs, as they are stored.",
        ),
        "params": ("names with numbers", "For example `params: {r: 4}`."),
        "exclude": (
            "a regular expression or a list of names: what `match` finds and is left out",
            "For example `exclude: 'lm_head$'`.",
        ),
        "kinds": ("kinds of layers that the spec takes: which of them are meant", "For example `kinds: Linear`."),
        "layers": (
            "numbers of blocks: only layers in these are adapted",
            "For example `layers: 0-5, 8`; `layers: {decoder.layers: 0-5}` where a model has several lists of blocks.",
        ),
        "ranks": (
            "params by regular expressions on layers' names, in place of those in `params`",
            r"For example `ranks: {'q_proj$': {r: 8}}`; of each param the first pattern that finds a layer counts.",
        ),
        "dropout": (
            "what training drops at random, with probabilities",
            "For example `dropout: {input: 0.05, bond: 0.1}`.",
        ),
        "input": ("a probability below 1: of an entry that the update reads", "For example `input: 0.05`."),
        "bond": ("a probability below 1: of an entry of a bond", "For example `bond: 0.1`."),
        "module": ("a probability below 1: of a layer's update, for a call", "For example `module: 0.1`."),
        "scopes": ("scopes with regular expressions", r"For example `scopes: {block: 'layers\.(\d+)\.'}`."),
        "train": ("what trains beside the cores", "For example `train: {bias: adapted, norm: true}`."),
        "bias": ("`none`, `adapted` or `all`", "Write `bias: adapted`, say."),
        "norm": ("`true`, `false` or `all`", "Write `norm: true`, say."),
        "also": ("a list of regular expressions", r"For example `also: ['^out\.']`."),
    },
    advice=_advice,
    is_word=is_word,
    instead={"match": "parameters"},
)


_WHOLE = Selection()


@dataclass(frozen=True)
class Entry:
    """One spec of a recipe with its layers: `match` is a regular expression, exact names, or `all`.

    `all` stands for every layer of the spec's kinds that can carry an adapter; an empty `match` matches nothing.
    `parameters` are weights adapted beside layers. `selection` narrows both. `dropout` acts in training.
    """

    spec: Spec
    match: str | tuple[str, ...]
    params: Mapping[str, Any] = field(default_factory=dict)
    where: Position | str | None = None
    selection: Selection = _WHOLE
    parameters: Parameters | None = None
    dropout: Dropout | None = None

    def params_of(self, layer: str) -> Mapping[str, Any]:
        """The params of one of its layers: those that `ranks` has for it, else the entry's."""
        return {**self.params, **self.selection.params_at(layer)} if self.selection.ranks else self.params


@dataclass(frozen=True)
class Train:
    """What trains beside the cores.

    `bias`: `none`, `adapted` (of the adapted layers) or `all`. `norm`: the affine parameters of normalisation layers.
    `True` takes layers with "norm" in their names, as the TenVOO paper's code does, or all if there are none; `"all"`
    takes all. `also`: regular expressions on the names of other parameters to train.
    """

    bias: Bias = "none"
    norm: Norm = False
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """Which spec goes on which layers of a model, and what else trains.

    `scopes` binds the scopes of shared cores to regular expressions. Layers share one tensor if the expression captures
    the same text in their names.
    """

    name: str
    entries: tuple[Entry, ...]
    train: Train = Train()
    title: str = ""
    source: str = ""
    file: str = "<recipe>"
    scopes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_yaml(cls, text: str | bytes, file: str = "<recipe>") -> Recipe:
        """Read a recipe from YAML text; raises SpecError with every mistake found, in its specs too."""
        if not isinstance(text, str | bytes):
            fix = "Pass the YAML itself, or use `load_recipe` for a file."
            raise SpecError(Problem("recipe", "YAML text", clip(text), fix))
        return _read(read_document(text, file), file, Path(file).parent)


def list_recipes() -> tuple[str, ...]:
    """The names of the shipped recipes."""
    return tuple(sorted(path.stem for path in shipped_folder().glob("recipes/*.yaml")))


def load_recipe(name: str | Path) -> Recipe:
    """A shipped recipe by name (`tenvoo_l_ddpm`) or a recipe file by path.

    Its specs are shipped names, or paths relative to the recipe's folder. Raises SpecError with every mistake in the
    file and in its specs, each with file, line and column.
    """
    path = find_shipped(name, "recipe", "recipes")
    file = label_of(path)
    return _read(read_document(read_bytes(path, "recipe"), file), file, path.parent)


def train_from(value: Train | Mapping[str, Any] | None) -> Train:
    """The `train` argument of `attach`, a mapping such as a recipe's `train`, checked. Raises SpecError."""
    if value is None or isinstance(value, Train):
        return value or Train()
    problems = Problems()
    if not isinstance(value, Mapping):
        fix = "For example `train={'bias': 'adapted', 'norm': True}`."
        raise SpecError(Problem("`train`", "a mapping", clip(value), fix))
    root = with_text_keys(_node({"train": dict(value)}), problems)
    broken = check_shape(root, problems, _TRAIN)
    problems.raise_if_any()
    return _train(root, broken, problems)


class _TrainArgument(FilePart):
    train: TrainFile


_TRAIN = Schema("`train` argument", _TrainArgument, RECIPE.expected, advice=_advice)


def _node(value: Any) -> Node:
    """Python data as a node, so that arguments and files meet the same checks."""
    where = Position("train", 1, 1)
    if isinstance(value, Mapping):
        return Node("mapping", tuple((_node(key), _node(item)) for key, item in value.items()), where)
    if isinstance(value, list | tuple):
        return Node("list", tuple(_node(item) for item in value), where)
    return Node("scalar", value, where, str(value))


def _read(root: Node, file: str, folder: Path) -> Recipe:
    if problem := entries_problem(root, "a recipe, with `tnpeft`, `name` and `adapters`"):
        raise SpecError(problem)
    problems = Problems()
    root = with_text_keys(root, problems)
    broken = check_shape(root, problems, RECIPE)
    entries = []
    adapters = root.get("adapters")
    for number, node in enumerate(adapters.value if adapters is not None and adapters.kind == "list" else ()):
        if not any(path[:2] == ("adapters", number) for path in broken) and ("adapters",) not in broken:
            entry = _entry(node, folder, problems)
            entries += [entry] if entry is not None else []
    if adapters is not None and adapters.kind == "list" and not adapters.value:
        problems.add(adapters.position, "`adapters`", "at least one entry", "none", RECIPE.expected["adapters"][1])
    train = _train(root, broken, problems)
    scopes = _scopes(root, broken, entries, problems)
    problems.raise_if_any()
    texts = {key: root.get(key) for key in ("name", "title", "source")}
    words = {key: str(node.value) if node is not None else "" for key, node in texts.items()}
    return Recipe(words["name"], tuple(entries), train, words["title"], words["source"], file, scopes)


def _entry(node: Node, folder: Path, problems: Problems) -> Entry | None:
    spec_node, match, params = node.get("spec"), node.get("match"), node.get("params")
    assert spec_node is not None  # the shape holds
    spec = _spec(spec_node, folder, problems)
    layers = () if match is None else _match(match, problems)
    parameters = _parameters(node, problems)
    given = {key: value.plain() for key in SELECTION if (value := node.get(key)) is not None}
    selection, told = selection_of(given, spec)
    for path, problem in told:
        problems.put(replace(problem, where=node.along(path)[-1].position))
    dropping = node.get("dropout")
    dropout, told = dropout_of(None if dropping is None else dropping.plain())
    for path, problem in told:
        problems.put(replace(problem, where=node.along(("dropout", *path))[-1].position))
    if spec is None:
        return None
    values = params.plain() if params is not None else {}
    where = params.position if params is not None else node.position
    for problem in unknown_params(f"params of spec '{spec.name}'", values, spec.params):
        problems.put(replace(problem, where=where))
    return Entry(spec, layers, values, node.position, selection, parameters, dropout)


def _parameters(entry: Node, problems: Problems) -> Parameters | None:
    node = entry.get("parameters")
    if node is None:
        return None
    parameters, told = parameters_from(node.plain())
    for path, problem in told:
        problems.put(replace(problem, where=entry.along(path)[-1].position))
    return parameters


def _match(node: Node, problems: Problems) -> str | tuple[str, ...]:
    for item in node.value if node.kind == "list" else ():
        if not item.text:
            problems.add(item.position, "`match`", "a layer's name", "an empty one", "Remove it.")
    if node.kind == "scalar":
        _check_regex(node, problems)
    return node.value if isinstance(node.value, str) else tuple(item.value for item in node.value)


def _spec(node: Node, folder: Path, problems: Problems) -> Spec | None:
    try:
        return load_spec(find_shipped(node.value, "spec", "", beside=folder))
    except SpecError as error:
        for problem in error.problems:
            if problem.where is None:
                problems.add(node.position, problem.what, problem.expected, problem.found, problem.fix)
            else:
                problems.found.append(problem)
        return None


def _check_regex(node: Node, problems: Problems) -> None:
    try:
        compiled(node.value)
    except TnpeftError as error:
        problem = error.problems[0]
        problems.add(node.position, problem.what, problem.expected, problem.found, problem.fix)


def _scopes(root: Node, broken: set[Any], entries: Sequence[Entry], problems: Problems) -> dict[str, str]:
    node = root.get("scopes")
    if node is None or any(path[0] == "scopes" for path in broken):
        return {}
    known = dict.fromkeys(scope for entry in entries for scope in entry.spec.scopes)
    for key, value in node.items():
        _check_regex(value, problems)
        if key.value not in known and not len(problems):
            expected = f"one of {', '.join(known)}" if known else "none: no spec here has one"
            fix = near_miss(key.value, known) or "Remove it."
            problems.add(key.position, f"scope '{key.value}'", expected, f"`{key.value}`", fix)
    return {key.value: value.value for key, value in node.items()}


def _train(root: Node, broken: set[Any], problems: Problems) -> Train:
    node = root.get("train")
    if node is None or any(path[0] == "train" for path in broken):
        return Train()
    also = node.get("also")
    for item in also.value if also is not None else ():
        _check_regex(item, problems)
    values = node.plain()
    return Train(values.get("bias", "none"), values.get("norm", False), tuple(values.get("also", ())))
