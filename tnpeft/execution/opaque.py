"""Opaque layers, adapted: the base layer computes as it is, and the update is added to its output.

Its weight is quantised, computed from other parameters, or used in a `forward` of its own: it can be neither read nor
replaced. If its library can dequantise it, a plain layer may take the sum instead (`merge`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tnpeft.adapters.base_weight import base_weight, dequantised, is_computed
from tnpeft.adapters.offload import present, wrapper_of
from tnpeft.adapters.parked_states import set_to_base, translate
from tnpeft.errors import ExecutionError, Problem
from tnpeft.execution.base_call import call_opaque, pads_itself, passing_gradients
from tnpeft.execution.dropout import updates_dropping
from tnpeft.execution.forward_pass import ModelResults
from tnpeft.execution.layers import HOOKS, AdaptedLayer
from tnpeft.execution.modes import sum_deltas
from tnpeft.execution.rows import updates_of_rows
from tnpeft.execution.serving import updates_serving
from tnpeft.execution.site import Site, Ways
from tnpeft.execution.torch_call import add_weight
from tnpeft.execution.updates import with_updates
from tnpeft.network import Layer, layer_of
from tnpeft.network.signature import torch_kind

__all__ = ["AdaptedOpaque"]

_PLAIN = "_plain_layer"
"""On a merged layer: the plain one that stands for it."""
_MERGED_HOOKS = tuple(name for name in HOOKS if "state_dict" not in name)


class AdaptedOpaque(AdaptedLayer):
    """An adapted layer whose weight cannot be read or replaced.

    `weight` and `bias` are the base's own, whatever they are. State dicts are the base's, with the adapters' added.
    While it is merged, a plain layer with the dequantised weight and the update computes in its place.
    """

    _ways: ClassVar[Ways] = Ways(with_updates, updates_dropping, updates_of_rows, updates_serving)

    def __init__(self, base: nn.Module, results: ModelResults) -> None:
        super().__init__(base, results)
        layer = layer_of(base)
        self.__dict__.update(layer=layer, pads_itself=pads_itself(base, layer))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plain = self.__dict__.get(_PLAIN)
        if plain is not None and not self.disabled:
            return plain(*args, **kwargs)
        site: Site = self.site
        if site.idle:
            return site.base.forward(*args, **kwargs)
        if args and isinstance(args[0], torch.fx.Proxy):  # the graph has the layer as one node
            tracer: Any = args[0].tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(wrapper_of(site.base)), args, kwargs)
        layer: Layer = self.__dict__["layer"]
        called = call_opaque(site.base, layer, self.__dict__["pads_itself"], self.where, args, kwargs)
        output = called.output
        if torch.is_grad_enabled() and called.x.requires_grad and not torch.compiler.is_compiling():
            output = passing_gradients(site.base, layer, self.where, called.x, output)
        return site.way(site, layer, called, output)

    @property
    def alone(self) -> None:
        """None, because a forward pass contracts nothing of it together with other layers."""
        return

    @property
    def replaced_parts(self) -> tuple[str, ...]:
        """What makes the base's weight, as of a parametrization, while a plain layer stands for it."""
        merged = self.__dict__.get(_PLAIN) is not None and not self.disabled
        return tuple(self.base._modules) if merged else ()

    @property
    def weight(self) -> Any:
        """The effective weight if the base's is computed; else the base's own, or what its library shows as such."""
        base, site = self.base, self.site
        plain = self.__dict__.get(_PLAIN)
        if plain is not None and not self.disabled:
            return plain.weight
        if site.idle or not (is_computed(base) and torch_kind(type(base))):
            return base.weight
        weight = base.weight
        inputs = [acting.adapter.delta_inputs(weight) for acting in site.acting]
        return add_weight(sum_deltas(site.acting, weight.detach(), inputs, True), weight.detach(), True)

    @property
    def bias(self) -> Any:
        return self.base.bias

    def merge(self) -> None:
        """Make the plain layer whose weight is the dequantised weight plus the update."""
        if self.scales:
            base, layer = self.base, self.__dict__["layer"]
            with present(base), torch.inference_mode(False), torch.no_grad():
                weight = dequantised(base, layer)
                assert weight is not None  # it has been asked before
                site = self._site_of(self.scales)
                inputs = [acting.adapter.delta_inputs(weight) for acting in site.acting]
                total = add_weight(sum_deltas(site.acting, weight, inputs, False), weight, False)
                self.__dict__[_PLAIN] = _plain_layer(base, layer, total.clone()).train(self.training)
        self.merged = True
        self._settle()

    def unmerge(self) -> None:
        self.__dict__.pop(_PLAIN, None)
        super().unmerge()

    def keep_merged(self) -> None:
        """Make the plain layer the base, which `unwrap` then returns."""
        self.disable(False)
        self.merged = False
        self._settle()

    def unwrap(self) -> nn.Module:
        base = super().unwrap()
        assert base is not None
        plain: nn.Module | None = self.__dict__.get(_PLAIN)
        if plain is None:
            return base
        for name in _MERGED_HOOKS:
            plain.__dict__[name] = base.__dict__[name]
        for number in [number for number, hook in plain._forward_pre_hooks.items() if _computes_weight(hook)]:
            del plain._forward_pre_hooks[number]
        return plain

    def reset_parameters(self) -> None:
        for name in self.names:
            adapter = self.adapter(name)
            adapter.reset_parameters(base_weight(self.base, adapter.network))
        set_to_base(self.base)
        if self.merged:
            self.merge()

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return _Fixed(value, self.where) if name == "parametrizations" and isinstance(value, nn.ModuleDict) else value

    def train(self, mode: bool = True) -> AdaptedOpaque:
        super().train(mode)
        self.base.training = mode
        return self

    def __prepare_scriptable__(self) -> AdaptedLayer:
        """Raises ExecutionError: `torch.jit.script` would compile the call of any base."""
        fix = "Use `torch.jit.trace`, or take the adapters off: `tnpeft.detach(model, merge=True, dequantise=True)`."
        raise ExecutionError(Problem("torch.jit.script", "plain layers", "an opaque one", fix, where=self.where))

    def extra_repr(self) -> str:
        return f"{type(self.base).__name__}, {super().extra_repr()}"

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):  # as the hooks of weight normalisation do before each call
            setattr(self.base, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in ("weight", "bias"):
            delattr(self.base, name)
        else:
            super().__delattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedOpaque:
        plain = self.__dict__.get(_PLAIN)
        if plain is not None:
            plain._apply(fn)
        if type(self.base)._apply is nn.Module._apply:
            nn.Module._apply(self, fn, recurse)
        else:
            self.base._apply(fn, recurse)
            self.adapters._apply(fn)  # type: ignore[no-untyped-call]
        return self

    @property
    def _version(self) -> int:  # type: ignore[override]
        """What the base's state dicts say of their format."""
        version: int = self.base._version
        return version

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The base's own, as it writes it, and the adapters'."""
        if type(self.base).state_dict is nn.Module.state_dict or args:
            return super().state_dict(*args, **kwargs)
        destination = kwargs.setdefault("destination", OrderedDict())
        self.base.state_dict(**{"prefix": "", "keep_vars": False, **kwargs})
        kwargs["prefix"] = f"{kwargs.get('prefix', '')}adapters."
        self.adapters.state_dict(**kwargs)
        return destination

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        plain = self.__dict__.get(_PLAIN)
        shown = self.base if plain is None or self.disabled else plain
        shown._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        *_, unexpected, errors = rest
        if self.__dict__.get(_PLAIN) is not None:
            errors.append(f"{self.where or 'a layer'} is merged into a plain one: call `tnpeft.unmerge` first.")
            return
        translate(self.base, state_dict, prefix)
        self.base._load_from_state_dict(state_dict, prefix, *rest)
        unexpected[:] = [key for key in unexpected if not key.startswith(f"{prefix}adapters.")]


class _Fixed(nn.ModuleDict):
    """The parametrizations of a base layer, which torch would take off the adapted layer's class, for every layer."""

    where: str | None

    def __init__(self, own: nn.ModuleDict, where: str | None) -> None:
        super().__init__()
        self.__dict__["_modules"] = own._modules
        self.__dict__["where"] = where

    def __getitem__(self, key: str) -> nn.Module:
        fix = "Take the adapters off first (`tnpeft.detach`); `parametrizations.weight` reads it."
        found = "something that would add to it or take it off"
        expected = "to stay what it is while adapters are attached"
        raise ExecutionError(Problem(f"the parametrization of `{key}`", expected, found, fix, where=self.where))


def _computes_weight(hook: Any) -> bool:
    return "weight" in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None))


def _plain_layer(base: Any, layer: Layer, weight: Tensor) -> nn.Module:
    """torch's own layer with a weight, otherwise like the base."""
    bias = base.bias() if callable(base.bias) and not isinstance(base.bias, Tensor) else base.bias
    given: dict[str, Any] = {"bias": bias is not None, "device": "meta", "dtype": weight.dtype}
    kind: Any = getattr(nn, layer.kind)
    if layer.kernel_size:
        keys = ["stride", "padding", "dilation", "groups", "padding_mode"] + ["output_padding"] * layer.transposed
        given |= {key: getattr(base, key) for key in keys} | {"kernel_size": layer.kernel_size}
    plain: nn.Module = kind(layer.in_channels, layer.out_channels, **given)
    plain.weight = nn.Parameter(weight.T.contiguous() if layer.turned else weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone().to(weight.device, weight.dtype), requires_grad=False)
    return plain
