"""Initial values of cores: the same bits on any machine, in any order of attaching."""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tnpeft.adapters.distributed import whole
from tnpeft.adapters.entries import entries
from tnpeft.adapters.given import misfit
from tnpeft.adapters.places import place_problem
from tnpeft.errors import BindError, Problem, clip
from tnpeft.network import BoundCore, Layer, Network
from tnpeft.spec import init_function
from tnpeft.spec.expression import Expression, ExpressionError

__all__ = ["OF_WEIGHT", "Decompositions", "canonical_weight", "initial_core", "is_drawn", "stream", "whole_seed"]

_Shape = tuple[int, ...]
_Draw = Callable[[BoundCore, torch.Generator, Mapping[str, float]], Tensor]

Decompositions = dict[str, tuple[Tensor, Tensor, Tensor]]
"""U, S and V of base weights, by the layer's label."""

_OTHER = "Give the core another `init`."
_LARGEST_SEED = 2**63


def stream(seed: int, layer: str, core: str, shape: _Shape) -> torch.Generator:
    """The random stream of one core, which depends on nothing but its arguments."""
    key = json.dumps([seed, layer, core, list(shape)]).encode()
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big"))
    return generator


def initial_core(
    network: Network,
    core: BoundCore,
    seed: int,
    layer: str,
    weight: Tensor | None,
    known: Decompositions | None = None,
) -> Tensor:
    """Draw one core: fp32 (places: int64), on the CPU, whatever the default device is. `weight` is the base weight,
    which singular vectors and places by size are taken from; `known` keeps its decomposition for the next core.

    Raises BindError where the distribution does not fit the core.
    """
    with torch.device("cpu"):
        weight = weight if core.init.name in OF_WEIGHT else None
        one = network.slice_network
        if one is None or core.shared is not None:
            return _initial_core(one or network, core, seed, layer, weight, known)
        slice_core = one.cores[network.cores.index(core)]
        # As if each slice were a layer of its own, with its number at the end of its name.
        weights = [None] * network.layer.slices if weight is None else whole(weight).unbind(0)
        slices = [_initial_core(one, slice_core, seed, f"{layer}.{n}", part, known) for n, part in enumerate(weights)]
        return torch.stack(slices)


def _initial_core(
    network: Network, core: BoundCore, seed: int, layer: str, weight: Tensor | None, known: Decompositions | None
) -> Tensor:
    name, arguments = core.init.name, core.init.arguments
    if name in _PARTS:
        return _svd(network, core, weight, layer, {} if known is None else known)
    if name in _WAVES:
        return _wave(core, seed, layer)
    if core.init.entry is not None:
        return _by_position(network, core, core.init.entry)
    generator = stream(seed, layer, core.name, core.shape)
    if name in _BY_SIZE:
        return _by_size(network, core, weight)
    if name in ("choice", "random"):
        return _PLACES[name](core, generator, [network.sizes[leg] for leg in core.init.legs])
    draw = _DRAWS.get(name)
    if draw is not None:
        return _same(core, generator, draw) if core.init.legs else draw(core, generator, arguments)
    function = init_function(name)
    if function is None:
        fix = f'Call `tnpeft.register_init("{name}", function)` first.'
        raise BindError(_misfit(core, "a registered function", "none of that name", fix))
    try:
        values = function(core.shape, generator, **arguments)
    except Exception as error:
        found = clip(f"{type(error).__name__}: {error}")[1:-1]
        raise BindError(_misfit(core, "a tensor", found, _mend(core))) from error
    return _checked(core, values)


def is_drawn(core: BoundCore) -> bool:
    """Whether the seed alone gives the core's first value, to the bit on any machine.

    It does not if the base weight, a function of the user's or LAPACK takes part.
    """
    drawn = {*_DRAWS, *_WAVES, *_PLACES} - {"orthogonal"}
    return core.origin is None and (core.init.name in drawn or core.init.entry is not None)


def canonical_weight(layer: Layer, weight: Tensor) -> Tensor:
    """A stored weight as (out_channels, in_channels // groups, kernel axes...).

    A grouped transposed convolution stores [g * a + i, o] where the canonical weight has [g * b + o, i].
    """
    if not layer.input_first:
        return weight
    split, outputs, inputs, *kernel = layer.split_shape
    return weight.reshape(split, inputs, outputs, *kernel).transpose(1, 2).reshape(layer.weight_shape)


def _constant(value: float) -> Callable[[BoundCore, torch.Generator, Mapping[str, float]], Tensor]:
    return lambda core, generator, arguments: torch.full(core.shape, value, dtype=torch.float32, device="cpu")


def _given(core: BoundCore, generator: torch.Generator, arguments: Mapping[str, float]) -> Tensor:
    return torch.full(core.shape, float(arguments["value"]), dtype=torch.float32, device="cpu")


def _eye(core: BoundCore, generator: torch.Generator, arguments: Mapping[str, float]) -> Tensor:
    """Ones where all positions agree: the identity for two legs, the copy tensor for more."""
    tensor = torch.zeros(core.shape, dtype=torch.float32, device="cpu")
    places = torch.arange(min(core.shape, default=1))
    tensor[(places,) * max(tensor.ndim, 0)] = 1.0
    return tensor


def _normal(core: BoundCore, generator: torch.Generator, arguments: Mapping[str, float]) -> Tensor:
    # torch's fp32 normal is vectorised and differs between processors in the last bit; rounding the fp64 one hides it.
    drawn = torch.randn(core.shape, dtype=torch.float64, device="cpu", generator=generator)
    return (drawn * float(arguments["std"])).float()


def _uniform(core: BoundCore, generator: torch.Generator, bound: float) -> Tensor:
    drawn = torch.rand(core.shape, dtype=torch.float32, device="cpu", generator=generator)
    return (drawn * 2 - 1) * bound


def _bounded(core: BoundCore, generator: torch.Generator, arguments: Mapping[str, float]) -> Tensor:
    return _uniform(core, generator, float(arguments["bound"]))


def _kaiming(core: BoundCore, generator: torch.Generator, arguments: Mapping[str, float]) -> Tensor:
    """U(-b, b) with b = gain * sqrt(3 / fan), torch's `kaiming_uniform_`."""
    return _uniform(core, generator, float(arguments["gain"]) * math.sqrt(3 / float(arguments["fan"])))


def _orthogonal(core: BoundCore, generator: torch.Generator, arguments: Mapping[str, float]) -> Tensor:
    """Orthonormal columns, or rows if there are fewer rows, of the core unfolded as (first leg, rest)."""
    if len(core.shape) < 2:
        raise BindError(_misfit(core, "two legs or more", str(len(core.shape)), _OTHER))
    rows, columns = core.shape[0], math.prod(core.shape[1:])
    size = (max(rows, columns), min(rows, columns))
    q, r = torch.linalg.qr(torch.randn(size, dtype=torch.float64, device="cpu", generator=generator))
    q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)  # uniform over the group, and free of LAPACK's choice of signs
    flat: Tensor = (q if rows >= columns else q.T) * float(arguments.get("gain", 1))
    return flat.float().reshape(core.shape).contiguous()


_DRAWS: dict[str, _Draw] = {
    "zeros": _constant(0.0),
    "ones": _constant(1.0),
    "constant": _given,
    "eye": _eye,
    "normal": _normal,
    "uniform": _bounded,
    "kaiming_uniform": _kaiming,
    "orthogonal": _orthogonal,
}


def _same(core: BoundCore, generator: torch.Generator, draw: _Draw) -> Tensor:
    """A draw that is equal along some legs: one entry is drawn there, and all get it."""
    legs = core.init.legs
    sizes = {leg: 1 if leg in legs else size for leg, size in zip(core.legs, core.unfolded, strict=True)}
    one = draw(replace(core, shape=tuple(sizes.values())), generator, core.init.arguments)
    return one.expand(core.unfolded).reshape(core.shape).contiguous()


def _choice(core: BoundCore, generator: torch.Generator, sizes: Sequence[int]) -> Tensor:
    """Different flat places in a tensor of these sizes."""
    places = math.prod(sizes)
    _require_places(core, places)
    if places <= 1 << 24:
        return torch.randperm(places, generator=generator)[: core.numel].reshape(core.shape)
    found: dict[int, None] = {}  # of a large tensor few are taken: what is drawn again is left out
    while len(found) < core.numel:
        found |= dict.fromkeys(torch.randint(places, (core.numel,), generator=generator).tolist())
    return torch.tensor([*found][: core.numel]).reshape(core.shape)


def _random(core: BoundCore, generator: torch.Generator, sizes: Sequence[int]) -> Tensor:
    """Whole numbers below a leg's size."""
    return torch.randint(math.prod(sizes), core.shape, generator=generator)


def _by_size(network: Network, core: BoundCore, weight: Tensor | None) -> Tensor:
    """Flat places of the base weight's largest or smallest entries by size; the first of equal ones."""
    if weight is None or weight.device.type == "meta":
        fix = "Give the model its weights first, then call `reset_parameters` with the layer's weight."
        raise BindError(_misfit(core, "the base weight's values", "none", fix))
    if core.init.legs != tuple(leg for axis in network.terms[0].weight for leg in axis):
        expected = "the legs of the weight, which is looked at entry by entry"
        raise BindError(_misfit(core, expected, " ".join(core.init.legs), "Name the legs of `weight`."))
    sizes = canonical_weight(network.layer, whole(weight.detach())).to("cpu", torch.float32).abs().flatten()
    _require_places(core, sizes.numel())
    order = sizes.sort(descending=core.init.name == "largest", stable=True).indices
    return order[: core.numel].reshape(core.shape)


def _require_places(core: BoundCore, places: int) -> None:
    if core.numel > places:
        raise BindError(_misfit(core, f"at most {places} places", str(core.numel), "Lower its size."))


_PLACES: dict[str, Callable[[BoundCore, torch.Generator, Sequence[int]], Tensor]] = {
    "choice": _choice,
    "random": _random,
}


def _by_position(network: Network, core: BoundCore, entry: Expression) -> Tensor:
    """The expression's value at each position; places must be such that maps can use them."""
    try:
        table = entries(entry, core.legs, core.unfolded, core.init.numbers).reshape(core.shape)
    except ExpressionError as error:
        raise BindError(_misfit(core, error.expected, error.found, error.fix)) from error
    if not core.is_index:
        return table.float().contiguous()
    fix = "Change the expression, or the sizes."
    broken = table[table != table.round()]
    if broken.numel():
        raise BindError(_misfit(core, "whole numbers", f"{float(broken[0]):g}", "Use `//` or `floor`."))
    if problem := place_problem(network, {core.name: table.long()}):
        raise BindError(_misfit(core, problem.expected, problem.found, fix))
    return table.long().contiguous()


_BY_SIZE = ("largest", "smallest")
_WAVES = {"cosine": torch.cos, "sine": torch.sin}


def _wave(core: BoundCore, seed: int, layer: str) -> Tensor:
    """cos or sin of 2 pi f[n] x / size, with legs (n, x) and random whole frequencies f[n] below the size.

    The frequencies come from a stream with the number `draw`, not the core's name: a cosine and a sine of the same
    number have the same ones.
    """
    if len(core.shape) != 2:
        raise BindError(_misfit(core, "two legs, waves and positions", str(len(core.shape)), _OTHER))
    waves, size = core.shape
    generator = stream(seed, layer, f"draw {core.init.arguments['draw']:g}", core.shape)
    frequencies = torch.randint(size, (waves, 1), generator=generator, device="cpu")
    phases = frequencies * torch.arange(size) % size  # whole numbers: the sine of a large angle would lose digits
    return _WAVES[core.init.name](2 * math.pi * phases.double() / size).float()


# What is taken from the base weight's singular value decomposition, by the name of the init: which side, and which
# power of the singular values goes with it.
_PARTS = {
    "svd_u": ("left", 0.0),
    "svd_s": ("values", 1.0),
    "svd_v": ("right", 0.0),
    "svd_us": ("left", 0.5),
    "svd_vs": ("right", 0.5),
    "from svd_u": ("left", 0.0),
    "from svd_s": ("values", 1.0),
    "from svd_v": ("right", 0.0),
}
OF_WEIGHT = frozenset({*_PARTS, *_BY_SIZE})
"""The inits that the base weight's values have a part in."""


def _svd(network: Network, core: BoundCore, weight: Tensor | None, layer: str, known: Decompositions) -> Tensor:
    """A factor of the base weight unfolded as out x rest, cut to the core's bond."""
    side, power = _PARTS[core.init.name]
    term = network.term_of(core)
    axes = {"left": slice(0, 1), "right": slice(1, None), "values": slice(0, 0)}[side]
    legs = [leg for axis in term.weight[axes] for leg in axis]
    (bond,) = (leg for leg in core.legs if leg not in network.open_legs_of(core))
    if weight is None or weight.device.type == "meta":
        fix = "Give the model its weights first, then call `reset_parameters` with the layer's weight."
        raise BindError(_misfit(core, "the base weight's values", "none", fix))
    matrix = canonical_weight(network.layer, whole(weight.detach())).to("cpu", torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        fix = "Mend the layer's weight, or match other layers."
        raise BindError(_misfit(core, "a base weight of finite numbers", "nan or inf", fix))
    first = int(core.init.arguments.get("skip", 0))
    part = slice(first, first + network.sizes[bond])
    if layer not in known:
        known[layer] = _decomposed(matrix)
    u, s, v = known[layer]
    scaled = s[part] ** power
    if side == "values":
        return scaled.float()
    values = ((u if side == "left" else v)[:, part] * scaled).reshape(*matrix.shape[axes], len(scaled))
    padded = [math.prod(network.sizes[leg] for leg in axis) for axis in term.weight[axes]]
    full = values.new_zeros(*padded, len(scaled))
    full[tuple(slice(0, size) for size in values.shape)] = values  # a padded axis is zero where no weight is
    legs.append(bond)
    folded = full.reshape([network.sizes[leg] for leg in legs])
    return folded.permute([legs.index(leg) for leg in core.legs]).float().reshape(core.shape).contiguous()


def _decomposed(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V of out x rest, singular vectors as columns.

    All of them are computed, in float64, however few a core takes: 2048 x 2048 takes 5 s on one CPU core, and the time
    grows with the third power of the sides. A layer's cores share one decomposition.
    """
    u, s, vh = torch.linalg.svd(matrix.flatten(1), full_matrices=False)
    # The sign of a singular pair is LAPACK's whim: the largest entry of each left vector is made positive.
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()[0]
    return u * signs, s, vh.T * signs


def _checked(core: BoundCore, value: object) -> Tensor:
    """What a registered function returned, or the BindError that says why it cannot be used."""
    if found := misfit(core, value):
        raise BindError(_misfit(core, *found, _mend(core)))
    assert isinstance(value, Tensor)
    return value.detach().to("cpu", torch.float32).contiguous()


def _mend(core: BoundCore) -> str:
    return f"Mend the function registered as `{core.init.name}`."


def _misfit(core: BoundCore, expected: str, found: str, fix: str) -> Problem:
    return Problem(f"core `{core.name}`, init `{core.init.name}`", expected, found, fix, core=core.name)


def whole_seed(seed: object) -> int:
    """A seed as an int; integers of other libraries are accepted. Raises BindError for other values, or huge ones."""
    try:
        number = None if isinstance(seed, (bool, Tensor)) else operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        number = None
    fix = "For example `seed=0`."
    if number is None:
        found = f"a {type(seed).__name__}" if isinstance(seed, Tensor) else clip(seed)
        raise BindError(Problem("seed", "a whole number", found, fix))
    if not -_LARGEST_SEED <= number < _LARGEST_SEED:  # what every reader of a file can read
        raise BindError(Problem("seed", "a whole number of at most 64 bits", "a larger one", fix))
    return number
