"""Taking adapters off again."""

from __future__ import annotations

from torch import nn

from tnpeft.errors import AttachError, Problem
from tnpeft.modules import AdaptedLayer
from tnpeft.surgery.passes import remove_pass
from tnpeft.surgery.state import ModelState, adapted, known_adapter
from tnpeft.surgery.switch import apply_state, refuse_disabled
from tnpeft.surgery.trained import all_tied
from tnpeft.surgery.tree import adapted_layers, places, slots

__all__ = ["detach"]


def detach(model: nn.Module, merge: bool = False, name: str | None = None) -> None:
    """Give the model its plain layers back: original classes, state-dict keys and `requires_grad` flags.

    Without `merge` every parameter is the base's own, to the bit. With it the update of the active
    adapters stays: each adapted layer gets a new weight, and what was trained beside the cores is
    the model's own from now on. `name` takes one adapter off and leaves the others; with `merge` it
    must be the only one.

    Raises AttachError where nothing, or no adapter of that name, is attached.
    """
    root, state = adapted(model)
    if name is not None:
        known_adapter(state, name)
        others = [f"'{other}'" for other in state.adapters if other != name]
        if others and merge:
            fix = "Detach the others first, or detach all with `merge=True`."
            raise AttachError(Problem("detach", f"'{name}' alone to merge", f"also {', '.join(others)}", fix))
        if others:
            _remove(root, state, name)
            return
    _restore(root, state, merge)


def _remove(root: nn.Module, state: ModelState, name: str) -> None:
    """Take one of several adapters off; layers that it alone adapted are plain again."""
    refuse_disabled(state)
    if state.merged and name in state.active:
        fix = "Call `tnpeft.unmerge(model)` first."
        raise AttachError(Problem("model", f"'{name}' unmerged", "a merged model", fix))
    state.active.pop(name, None)
    apply_state(root, state)
    trained = [tied for tied in all_tied(root, state) if name in tied.trainers]
    for tied in trained:
        tied.drop(name)
    for layer in adapted_layers(root):
        if name in layer.names:
            layer.remove_adapter(name)
    del state.adapters[name]
    _unwrap(root, [layer for layer in adapted_layers(root) if not layer.names])


def _restore(root: nn.Module, state: ModelState, merge: bool) -> None:
    state.disabled = 0  # a copy made inside a `disabled` context is disabled for good, and may be detached
    if not merge:
        state.active = {}
    apply_state(root, state)
    layers = adapted_layers(root)
    if merge:
        for layer in layers:
            layer.merge()  # all of them first: this takes memory, and what follows cannot fail
        for layer in layers:
            layer.keep_merged()
    for tied in all_tied(root, state):
        tied.settle()
    _unwrap(root, layers)
    for name, slot in slots(root).items():
        if name in state.requires_grad:
            slot.tensor.requires_grad_(state.requires_grad[name])
    remove_pass(root)
    state.drop_from(root)


def _unwrap(root: nn.Module, layers: list[AdaptedLayer]) -> None:
    gone = {id(layer): layer for layer in layers}
    for place in [*places(root)]:
        if id(place.module) in gone:
            place.parent._modules[place.key] = gone[id(place.module)].unwrap()
