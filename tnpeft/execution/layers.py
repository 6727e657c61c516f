"""Adapted layers: a base layer with named adapters on its weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from tnpeft.adapters import Adapter
from tnpeft.adapters.distributed import refuse_distributed
from tnpeft.adapters.offload import Resident, is_bare, move_hook, present
from tnpeft.adapters.parked import (
    ORIGINAL,
    acting,
    acting_scales,
    bare,
    combined,
    is_parked,
    keep,
    own,
    own_weight,
    park,
    parked_key,
    remake,
    set_own,
    show,
    take_back,
)
from tnpeft.adapters.parked_states import forget_hook, make_again, set_to_base, translate
from tnpeft.adapters.showing import READ, SHOWN
from tnpeft.adapters.units import stand_for
from tnpeft.execution.calls import Acting, Calls
from tnpeft.execution.dispatch import execute
from tnpeft.execution.dropout import execute_dropping
from tnpeft.execution.forward_pass import ModelResults
from tnpeft.execution.modes import fixed_weight, summed_weight
from tnpeft.execution.refusals import replace_own, replicated, taken_away
from tnpeft.execution.rows import execute_rows
from tnpeft.execution.scripting import hidden_attributes, refuse_unmerged
from tnpeft.execution.serving import execute_serving, read_weight
from tnpeft.execution.site import Site, Ways
from tnpeft.program import needs_plain_ops

__all__ = ["HOOKS", "AdaptedLayer", "make_layer_again"]

_TAKEN = frozenset(dir(nn.ModuleDict()))
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


# What a layer's tensors were called while it hung below the adapted one as a module of its own.
_EARLIER = "base."
_NOT_OF_BASE = ("_hf_hook", "_old_forward")
_LOADING = "_tnpeft_loading"


class AdaptedLayer(Resident, nn.Module):
    """A frozen layer whose weight carries the updates of named adapters.

    The base layer's tensors are registered here under their own names, so that a state dict has the plain model's
    names. `weight` and `bias` are the effective ones; other attributes (`stride`, `in_channels`, ...) are the base
    layer's. `scales` holds the active adapters. Nothing here writes into a base tensor.

    TorchScript takes `weight` and `bias` from the tables: those of a merged layer.
    """

    _ways: ClassVar[Ways] = Ways(execute, execute_dropping, execute_rows, execute_serving)
    __jit_unused_properties__: ClassVar[list[str]] = [
        "__jit_ignored_attributes__", "alone", "base", "bias", "layer_name", "margins", "names", "place",
        "replaced_parts", "results", "site", "weight", "where", "zeros",
    ]  # fmt: skip

    if TYPE_CHECKING:  # TorchScript would read them
        scales: dict[str, float]
        disabled: bool
        merged: bool
        results: ModelResults
        site: Site

    def __init__(self, base: nn.Module, results: ModelResults) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict().train(base.training)
        # Into the table: attributes of modules take three calls each, and a model may have a thousand layers.
        self.__dict__.update(scales={}, disabled=False, merged=False, training=base.training, results=results)
        self._calls: dict[str, Calls] = {}
        self._take(base)
        self._settle()

    def _take(self, base: nn.Module) -> None:
        """Hold the base layer: the same tables of tensors, the same hooks, its submodules beside the adapters."""
        self.__dict__["_base"] = base
        for table in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[table] = base.__dict__[table]
        self._modules.update(base._modules)
        base.__dict__["_tnpeft_wrapper"] = self
        # Shared, not copied: hooks of the base layer run, can be removed, and outlive the adapter.
        self.__dict__.update({name: base.__dict__[name] for name in HOOKS})
        self.register_load_state_dict_post_hook(make_layer_again)  # type: ignore[no-untyped-call]
        move_hook(base, self)
        stand_for(base, self)

    @property
    def base(self) -> Any:
        """The layer that was wrapped, with its own class and parameters."""
        return self.__dict__["_base"]  # not through `__getattr__`: every forward comes here

    @property
    def place(self) -> tuple[nn.Module, str, str]:
        """Where the weight is: the module, its table, and the key."""
        return self.base, "_parameters", "weight"

    @property
    def weight(self) -> Tensor:
        """The effective weight: the base weight's dtype and strides, differentiable in the active cores."""
        if is_bare(self):
            return bare(self.base, "weight")  # type: ignore[return-value]
        weight: Tensor = self.base.weight
        if self.site.idle:
            return weight
        refuse_distributed(self.layer_name, [weight])
        plain = needs_plain_ops(weight)
        kept = None if plain else read_weight(self.site)
        return summed_weight(self.site, weight, plain) if kept is None else kept

    @property
    def bias(self) -> Tensor | None:
        """The effective bias: that of the base layer, or the copy that an adapter trains."""
        bias: Tensor | None = bare(self.base, "bias") if is_bare(self) else self.base.bias
        return bias

    def calls(self, name: str) -> Calls:
        """How the layer's calls ran with one of its adapters."""
        return self._calls.setdefault(name, Calls())  # a copy begins without

    def chosen(self, name: str) -> str | None:
        """The mode in which the layer last ran, if it is another than the one asked for; else None."""
        mode = self.calls(name).mode
        return None if mode == self.adapter(name).mode else mode

    def act(self, scales: Mapping[str, float], results: ModelResults | None = None) -> None:
        """Let these adapters act; `results` is where the model's layers keep their results."""
        self.__dict__["scales"] = dict(scales)
        if results is not None:
            self.__dict__["results"] = results
        self._settle()

    def _settle(self) -> None:
        """Make the site anew, after a change of what acts."""
        site = self._site_of(() if self.merged or self.disabled else self.scales)
        if self.results.rows_opened and not (self.merged or self.disabled):
            scales = {name: self.scales.get(name, 1.0) for name in self.names}
            every = {name: Acting(self.adapter(name), scale, self.calls(name)) for name, scale in scales.items()}
            site = site._replace(way=self._ways.rows, every=every, usual=site, idle=False)
        if self.results.weights.opened and site.acting:
            site = site._replace(way=self._ways.serving, usual=site)
        self.__dict__["site"] = site

    def _site_of(self, names: Iterable[str]) -> Site:
        acting = tuple([Acting(self.adapter(name), self.scales[name], self.calls(name)) for name in names])
        idle = self.disabled or not self.scales
        alone = acting[0] if len(acting) == 1 and acting[0].scale == 1.0 else None
        way = self._ways.usual
        for each in acting:  # a call asks whether they train: flags may be written to, as Lightning does
            way = self._ways.dropping if each.adapter.dropout is not None else way
        return Site(self.layer_name, self.base, type(self)._call_base, acting, idle, self.results, alone, way)

    @property
    def alone(self) -> Acting | None:
        """The only adapter that acts, if its scale is 1 and the layer is not merged; also while it is disabled."""
        return None if self.merged else self._site_of(self.scales).alone

    @property
    def replaced_parts(self) -> tuple[str, ...]:
        """Submodules of the base that a layer which computes in its place does not have."""
        return ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all adapters, in the order in which they were attached."""
        keys = self._modules["adapters"]._modules  # type: ignore[union-attr]
        return tuple([key.removeprefix("_") for key in keys])

    def adapter(self, name: str) -> Adapter:
        adapter = self._modules["adapters"]._modules[_key(name)]  # type: ignore[union-attr]
        assert isinstance(adapter, Adapter)
        return adapter

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Carry one more adapter, or replace one; it does not act before `act` says so."""
        self.adapters[_key(name)] = adapter.train(self.training)
        self._calls.pop(name, None)

    def remove_adapter(self, name: str) -> None:
        del self.adapters[_key(name)]
        self._calls.pop(name, None)
        self.act({known: scale for known, scale in self.scales.items() if known != name})

    def merge(self) -> None:
        """Compute the effective weight and put it in place of the base weight, which is parked."""
        owner, table, key = self.place
        with present(owner), torch.inference_mode(False), torch.no_grad():
            scales, base_weight = acting_scales(owner, key), own(owner, table, key)
            # That of an adapter that trains the layer as a whole, or the base's own.
            weight = combined(owner, table, key, scales) if scales else base_weight.detach()
            if self.scales:
                weight = fixed_weight(self._site_of(self.scales), weight)
            if self.scales or scales:
                park(owner, table, key, scales, weight)
        self.merged = True
        self.disable(self.disabled)  # parking shows what is merged

    def unmerge(self) -> None:
        take_back(*self.place)
        self.merged = False
        self._settle()

    def disable(self, disabled: bool) -> None:
        """With `disabled`, compute what the base layer computes, merged or not; else stop doing so."""
        self.disabled = disabled
        if is_parked(*self.place):
            show(*self.place, parked_key(ORIGINAL, self.place[2]) if disabled else None)
        self._settle()

    def keep_merged(self) -> None:
        """Give the merged weight to the base layer as its own; the old weight is not written to."""
        self.disable(False)
        keep(*self.place, acting(*self.place))
        self.merged = False
        self._settle()

    def unwrap(self) -> nn.Module | None:
        """The base layer, with the hooks that were registered here meanwhile."""
        base: nn.Module = self.base
        base._is_full_backward_hook = self._is_full_backward_hook
        base.training = self.training
        base.__dict__.pop("_tnpeft_wrapper", None)  # a layer with several names comes here once for each
        forget_hook(base._load_state_dict_post_hooks, make_layer_again)
        make_again(base, False)
        move_hook(self, base)
        stand_for(self, base)
        return base

    def reset_parameters(self) -> None:
        """Draw the initial cores of every adapter; the base layer keeps its values."""
        for name in self.names:
            self.adapter(name).reset_parameters(own_weight(self.base))
        set_to_base(self.place[0])
        if self.merged:
            self.merge()

    @property
    def __jit_ignored_attributes__(self) -> list[str]:
        return hidden_attributes(self)

    def __prepare_scriptable__(self) -> AdaptedLayer:
        """Asked by `torch.jit.script`, which compiles `forward` as it is for scripts. Raises ExecutionError."""
        refuse_unmerged(self)
        return self

    @staticmethod
    def _call_base(base: Any, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        """The base layer's own function of an input and another weight."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        states = [f"{name}: {scale:g}" for name, scale in self.scales.items()]
        active = f"active={{{', '.join(states)}}}" + ", merged" * self.merged + ", disabled" * self.disabled
        ran = ", ".join(f"{name}: {mode}" for name in self.names if (mode := self.chosen(name)))
        return f"{self.base.extra_repr()}, {active}" + f", runs={{{ran}}}" * bool(ran)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("weight", "bias"):
            super().__setattr__(name, value)
        elif is_bare(self) or _LOADING in self.__dict__:
            set_own(self.base, name, value)
        else:
            replace_own(self, name, value)

    def __delattr__(self, name: str) -> None:
        if name not in ("weight", "bias"):
            super().__delattr__(name)
        elif name not in self._parameters:
            del self.base.__dict__[name]
        elif is_bare(self):
            super().__delattr__(name)
        else:
            raise taken_away(self.layer_name, name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name.startswith(("weight_", "bias_")):  # as weight normalisation and pruning do
            own = name.partition("_")[0]
            raise taken_away(self.layer_name, own, own not in self._parameters)
        super().register_parameter(name, param)

    @property
    def layer_name(self) -> str:
        """The name of the layer in its model, as its adapters know it."""
        for adapter in self._modules["adapters"]._modules.values():  # type: ignore[union-attr]
            return adapter.layer_name  # type: ignore[union-attr, return-value]
        return ""

    @property
    def where(self) -> str | None:
        """The layer's name for a message."""
        return f"layer '{self.layer_name}'" if self.layer_name else None

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias") and "_base" in self.__dict__:
            if is_bare(self):
                raise AttributeError(name)
            return getattr(type(self), name).fget(self)  # a mistake of its own, for which the table has an answer
        if name == "site" and "_base" in self.__dict__:  # of a copy, whose adapters are complete only now
            self._settle()
            return self.__dict__["site"]
        base = self.__dict__.get("_base")
        if base is not None and (name in base.__dict__.get(READ, ()) or name in base.__dict__.get(SHOWN, ())):
            return getattr(base, name)  # another parameter of the base's, that is adapted or trains beside cores
        try:
            return super().__getattr__(name)
        except AttributeError:
            if base is None or name in _NOT_OF_BASE or name.startswith("__"):
                raise
        return getattr(base, name)

    def _replicate_for_data_parallel(self) -> AdaptedLayer:
        # Tensors of the copy would be no parameters, and cores that are held elsewhere on another device.
        raise replicated(self.where)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLayer:
        self.results.weights.forget()
        before = own_weight(self.base).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.merged and own_weight(self.base).dtype != before:
            self.merge()  # the sum of the cast weight, as unmerged layers compute it
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix + _EARLIER)]:
            state_dict.setdefault(prefix + key.removeprefix(prefix + _EARLIER), state_dict.pop(key))
        translate(self.base, state_dict, prefix)
        self.__dict__[_LOADING] = True  # `assign=True` puts what it is given in place of the base's own
        try:
            super()._load_from_state_dict(state_dict, prefix, *rest)
        finally:
            del self.__dict__[_LOADING]

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {key: value for key, value in state.items() if key not in ("site", "_calls")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        super().__setstate__({"results": ModelResults(), "_calls": {}, **state})  # type: ignore[no-untyped-call]
        if "_base" not in self.__dict__:
            self._adopt_earlier()

    def _adopt_earlier(self) -> None:
        """Adopt an old pickle, in which the base layer is a module below this one and merged weights are buffers."""
        merged = self._buffers.pop("_merged", None)
        self._take(self._modules.pop("base"))  # type: ignore[arg-type]
        self.merged = merged is not None
        if merged is not None and self.scales:
            park(self.base, "_parameters", "weight", {}, merged)


def _key(name: str) -> str:
    """An adapter's key in the ModuleDict, whose own methods (`keys`, `type`, `half`, ...) are no keys for it."""
    return f"_{name}" if name in _TAKEN else name


def make_layer_again(layer: nn.Module, _incompatible: object) -> None:
    """Drop what was computed from the cores: after `load_state_dict` they have other values."""
    if isinstance(layer, AdaptedLayer):
        remake(layer.place[0])
        if layer.merged:
            layer.merge()


_merge_again = _make_again = make_layer_again  # as pickled models of the first version know it
