"""Taking adapters off again."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from tnpeft.adapters.offload import unmark
from tnpeft.adapters.parked_states import note_tie
from tnpeft.errors import AttachError, Problem
from tnpeft.execution import AdaptedLayer
from tnpeft.surgery.adapted_model import AdaptedModel, adapted, known_adapter
from tnpeft.surgery.merge_into_base import merge_into_base, merging_problems
from tnpeft.surgery.passes import remove_pass
from tnpeft.surgery.rows import unhook
from tnpeft.surgery.switch import (
    acting,
    apply_state,
    merge_layers,
    refuse_disabled,
    refuse_merged,
    refuse_rows,
    warn_of_ties,
)
from tnpeft.surgery.trained import all_tied
from tnpeft.surgery.tree import adapted_layers, places, slots

__all__ = ["detach"]


def detach(model: nn.Module, merge: bool = False, name: str | None = None, *, dequantise: bool = False) -> None:
    """Give the model its plain layers back: original classes, state-dict keys and `requires_grad` flags.

    Without `merge` every parameter is the base's own, to the bit. With it the update of the active
    adapters stays: each adapted layer gets a new weight, and what was trained beside the cores is
    the model's own from now on.

    `name` takes one adapter off and leaves the others. With `merge` its update stays, at the scale at which it acted,
    or at 1 if it did not act. The base weights have then changed, and the other adapters add to the new ones. Their
    cores keep their bits; their biases, norms and statistics change by as much as the base's.

    `merge` refuses opaque layers (quantised, computed). With `dequantise` plain layers take their places, with the sum
    of the dequantised weight and the update, if a layer's library can dequantise.

    Raises AttachError where nothing, or no adapter of that name, is attached, and inside `tnpeft.rows`. One of several
    adapters cannot be taken off inside `disabled` or while it is merged. Nor can it with `merge` while the model is
    merged, or where the update of another adapter depends on a weight that would change. Warns (TnpeftWarning) where a
    merged weight was tied to another layer's.
    """
    root, state = adapted(model)
    refuse_rows(state)
    if name is None:
        _restore(root, state, state.active if merge else {}, dequantise)
    elif known_adapter(state, name) and len(state.adapters) == 1:
        _restore(root, state, {name: state.scale_of(name)} if merge else {}, dequantise)
    elif merge:
        refuse_disabled(state)
        refuse_merged(state)
        if problems := [*merging_problems(root, state, name)]:
            raise AttachError(*problems)
        merge_into_base(root, state, name, dequantise)
        _remove(root, state, name)
    else:
        refuse_disabled(state)
        if state.merged and name in state.active:
            fix = "Call `tnpeft.unmerge(model)` first."
            raise AttachError(Problem("model", f"'{name}' unmerged", "a merged model", fix))
        _remove(root, state, name)


def _remove(root: nn.Module, state: AdaptedModel, name: str) -> None:
    """Take one of several adapters off; layers that it alone adapted are plain again."""
    state.active.pop(name, None)
    state.before.pop(name, None)
    apply_state(root, state)
    trained = [tied for tied in all_tied(root, state) if name in tied.trainers]
    for tied in trained:
        tied.drop(name)
    for layer in adapted_layers(root):
        if name in layer.names:
            layer.remove_adapter(name)
    del state.adapters[name]
    _unwrap(root, [layer for layer in adapted_layers(root) if not layer.names])


def _restore(root: nn.Module, state: AdaptedModel, kept: dict[str, float], dequantise: bool) -> None:
    """Take all adapters off; the updates of some stay."""
    layers = adapted_layers(root)
    _keep(root, state, layers, kept, dequantise)
    for tied in all_tied(root, state):
        tied.settle()
    replaced = _unwrap(root, layers)
    for name, slot in slots(root).items():
        note_tie(slot.owner, None)
        if name in state.requires_grad or id(slot.owner) in replaced:
            slot.tensor.requires_grad_(_flag_of(name, state.requires_grad))
    remove_pass(root)
    unhook(root)
    unmark(root)
    state.drop_from(root)


def _flag_of(name: str, flags: Mapping[str, bool]) -> bool:
    """Whether a parameter trained before; for a new plain weight, whether the parameters that made it did."""
    if name in flags:
        return flags[name]
    place = f"{name.rpartition('.')[0]}."
    return any(flag for known, flag in flags.items() if known.startswith(place) and not known.endswith("bias"))


def _keep(
    root: nn.Module, state: AdaptedModel, layers: list[AdaptedLayer], kept: dict[str, float], dequantise: bool
) -> None:
    """Give the base the updates that stay. All are computed first: what follows cannot fail."""
    if kept and kept != state.active:
        refuse_merged(state)
    # A copy made inside a `disabled` context is disabled for good, and may be detached.
    disabled, state.disabled = state.disabled, 0
    try:
        with acting(root, state, kept):
            if kept and not state.merged:
                merge_layers(layers, dequantise)
    except BaseException:
        state.disabled = disabled
        apply_state(root, state)
        raise
    if kept:
        warn_of_ties(root, 5)
    for layer in layers:
        if kept:
            layer.keep_merged()
        elif layer.merged:
            layer.unmerge()


def _unwrap(root: nn.Module, layers: list[AdaptedLayer]) -> set[int]:
    """Put plain layers back in the places of adapted ones; returns the `id`s of those that replace the bases."""
    gone = {id(layer): layer for layer in layers}
    replaced = set()
    for place in places(root):
        if id(place.module) in gone:
            layer = gone[id(place.module)]
            left = layer.unwrap()
            place.put(left)
            replaced |= set() if left is None else {id(left)} - {id(layer.base)}
    return replaced
