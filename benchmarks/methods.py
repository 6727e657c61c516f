"""The methods that are compared: recipes, shipped specs, and the other libraries' adapters on the same layers.

A spec adapts the recipes' layers that it supports, at its recipe's rank or its own default. Biases and norms train as
with the recipes, also those of layers that it does not adapt.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from models import lycoris_model, matched, peft_model, train_biases_and_norms
from torch import nn

import tnpeft
from tnpeft.execution import AdaptedLayer
from tnpeft.surgery import adapters_of

__all__ = [
    "PEERS",
    "RECIPES",
    "UnsuitableError",
    "adapt",
    "families",
    "layers_of",
    "modes_of",
    "needs_weight_gradient",
    "specs_named",
]

RECIPES = ("lora_ddpm", "loha_ddpm", "lokr_ddpm", "tenvoo_l_ddpm", "tenvoo_q_ddpm")
# These are on every layer of their recipe, at its rank: there is nothing else to measure.
SAME_AS_RECIPE = {"lora": "lora_ddpm", "loha": "loha_ddpm", "lokr_both": "lokr_ddpm"}
ON_LINEAR = " on Linear"  # behind the name of a spec: on the model's Linear layers alone, where PEFT has no Conv3d
FULL_SPEC = "full as a spec"  # not the model that trains everything, `full`
# What a block of the model and a matrix of a block are, for cores that such layers share.
SCOPES = {"layer": r"^(\w+_blocks\.\d+|time_embed)", "matrix": r"(conv1|conv2|to_q|to_v|time_emb_proj|time_embed)"}


class UnsuitableError(Exception):
    """No layer of the model can have the method."""


class Peer(NamedTuple):
    """Another library's method: how it is put on a model, and the recipes and specs that are the same method."""

    build: Callable[[nn.Module], nn.Module]
    versions: tuple[str, ...]


def _lycoris(algorithm: str, rank: int, convolutions: bool = False, **options: object) -> Callable[..., nn.Module]:
    def build(model: nn.Module) -> nn.Module:
        layers = [name for name in matched(model) if "conv" in name] if convolutions else None
        return lycoris_model(model, algorithm, rank, layers, **options)

    return build


def _peft(config: str, linear: bool = False, **options: object) -> Callable[..., nn.Module]:
    def build(model: nn.Module) -> nn.Module:
        return peft_model(model, config, _linear_layers(model) if linear else None, **options)

    return build


def _linear_layers(model: nn.Module) -> list[str]:
    return [name for name in matched(model) if isinstance(model.get_submodule(name), nn.Linear)]


PEERS: Mapping[str, Peer] = {
    "peft LoRA r=2": Peer(_peft("LoraConfig", r=2, lora_alpha=2), ("lora_ddpm", "lora")),
    "peft OFT b=32 on Linear": Peer(_peft("OFTConfig", True, oft_block_size=32), ("oft" + ON_LINEAR,)),
    "peft HRA r=8 on Linear": Peer(_peft("HRAConfig", True, r=8), ("hra" + ON_LINEAR,)),
    "lycoris Diag-OFT r=4": Peer(_lycoris("diag-oft", 4), ("diag_oft",)),
    "lycoris LoCon r=2": Peer(_lycoris("lora", 2), ("lora_ddpm", "lora")),
    "lycoris LoHa r=1": Peer(_lycoris("loha", 1), ("loha_ddpm", "loha")),
    "lycoris LoKr r=24": Peer(_lycoris("lokr", 24, decompose_both=True, factor=-1), ("lokr_ddpm", "lokr_both")),
    "lycoris LoKr r=4": Peer(_lycoris("lokr", 4, factor=-1), ("lokr",)),
    "lycoris LoCon Tucker r=4": Peer(_lycoris("lora", 4, True, use_tucker=True), ("locon_tucker",)),
    "lycoris LoHa Tucker r=4": Peer(_lycoris("loha", 4, True, use_tucker=True), ("loha_tucker",)),
    "lycoris LoKr Tucker r=4": Peer(_lycoris("lokr", 4, True, use_tucker=True, factor=-1), ("lokr_tucker",)),
}


def specs_named(names: Iterable[str]) -> list[str]:
    """`all` is every shipped spec but those that a recipe measures, `peers` what other libraries have beside these."""
    every = {
        "all": [spec for spec in tnpeft.list_specs() if spec not in SAME_AS_RECIPE],
        "peers": [name for peer in PEERS.values() for name in peer.versions if name not in {*RECIPES, *SAME_AS_RECIPE}],
    }
    found = [spec for name in names for spec in every.get(name, [name])]
    return [FULL_SPEC if spec == "full" else spec for spec in dict.fromkeys(found)]


def families(names: Iterable[str], peers: bool) -> list[tuple[str, ...]]:
    """Each method with the other libraries' versions of it, which are timed in the same rounds."""
    found = []
    for name in names:
        others = [peer for peer, about in PEERS.items() if name in about.versions] if peers else []
        found.append((name, *others))
    return found


def adapt(model: nn.Module, name: str, mode: str) -> nn.Module:
    """The model with a method on it; `full` trains everything, `floor` biases and norms alone.

    Raises UnsuitableError, or TnpeftError where the method cannot be attached.
    """
    if name == "full":
        return model
    if name == "floor":
        train_biases_and_norms(model.requires_grad_(False), matched(model))
        return model
    if name in PEERS:
        return PEERS[name].build(model)
    if name in tnpeft.list_recipes():
        tnpeft.attach(model, name, mode=mode)
        return model
    return _with_spec(model, name.removesuffix(ON_LINEAR), mode, linear=name.endswith(ON_LINEAR))


def _with_spec(model: nn.Module, name: str, mode: str, linear: bool = False) -> nn.Module:
    spec = tnpeft.load_spec("full" if name == FULL_SPEC else name)
    params = _recipe_params().get(name, {})
    wanted = matched(model)
    asked = _linear_layers(model) if linear else wanted
    able = [layer for layer in asked if _can_be_bound(spec, model.get_submodule(layer), params)]
    if not able:
        raise UnsuitableError(f"supports {', '.join(spec.layers)}, none of which is adapted here")
    biases = "|".join(re.escape(layer) for layer in wanted)
    scopes = {scope: SCOPES[scope] for scope in spec.scopes}
    train = {"norm": True, "also": [rf"^(?:{biases})\.bias$"]}
    tnpeft.attach(model, spec, match=able, train=train, scopes=scopes, mode=mode, **params)
    return model


def _can_be_bound(spec: tnpeft.Spec, layer: nn.Module, params: Mapping[str, Any]) -> bool:
    try:
        spec.bind(layer, **params)
    except tnpeft.BindError:
        return False
    return True


def _recipe_params() -> dict[str, Mapping[str, Any]]:
    """The params that the recipes give their specs."""
    recipes = [tnpeft.load_recipe(name) for name in RECIPES]
    return {entry.spec.name: entry.params for recipe in recipes for entry in recipe.entries}


def layers_of(model: nn.Module) -> Counter[str]:
    """How many layers of each kind an adapter of tnpeft's is on."""
    return Counter(adapter.network.layer.kind for adapter in _adapters(model))


def modes_of(model: nn.Module) -> Counter[str]:
    """In which modes they ran when they were called last."""
    lasts = [module.calls("default").last for module in model.modules() if isinstance(module, AdaptedLayer)]
    return Counter("dense" if last is None else last.mode for last in lasts)


def needs_weight_gradient(model: nn.Module) -> bool:
    """Whether no mode can do without the weight's gradient: an update has the base weight, or a core with all legs."""
    return any(
        network.compose is not None or any(_has_all(network, core) for core in network.cores)
        for network in (adapter.network.plain for adapter in _adapters(model))
    )


def _has_all(network: tnpeft.Network, core: Any) -> bool:
    return core.origin == "weight" or set(network.open_legs) <= set(core.legs)


def _adapters(model: nn.Module) -> Sequence[Any]:
    try:
        return list(adapters_of(model, "default").values())
    except tnpeft.TnpeftError:  # another library's, or none
        return []
