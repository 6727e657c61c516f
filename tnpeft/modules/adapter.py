"""The adapter: a network's cores as a module, and the delta weight they make."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tnpeft.errors import BindError, ExecutionError, Problem
from tnpeft.modules.inits import initial_core
from tnpeft.network import Network
from tnpeft.plan import Plan, plan
from tnpeft.program import Program, build_program
from tnpeft.spec.document import clip

__all__ = ["Adapter", "memory_order"]

_CORE, _START = "core_", "start_"
_LARGEST_SEED = 2**63


class _Folded(NamedTuple):
    """What a program makes of the frozen copy `start` alone; never copied, moved, pickled or saved."""

    start: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]


class Adapter(nn.Module):
    """The cores of one network on one layer.

    Trainable cores are parameters `core_<name>`, frozen ones persistent buffers of that name, and
    with `start: frozen_copy` every trainable core has its copy in the persistent buffer
    `start_<name>`. They are contiguous, on the weight's device, fp32 or (on fp64 layers) fp64
    whatever the model is cast to, and hold no value until `reset_parameters` if made on meta.
    """

    def __init__(
        self,
        network: Network,
        weight: Tensor,
        *,
        seed: int | None = None,
        name: str = "",
        mode: str = "dense",
        initialise: bool = True,
    ) -> None:
        super().__init__()
        self.network = network
        self.plan: Plan = plan(network, mode=mode)
        self.seed = _whole(network.spec.seed if seed is None else seed)
        self.layer_name = name
        self._folded: _Folded | None = None
        self._initialised = False
        self._lay_out(weight.stride())
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        copies = network.start == "frozen_copy"
        # Tensors made under inference mode could never be trained.
        with torch.inference_mode(False):
            for core in network.cores:
                tensor = torch.empty(core.shape, dtype=dtype, device=weight.device)
                if core.frozen:
                    self.register_buffer(_CORE + core.name, tensor)
                    continue
                self.register_parameter(_CORE + core.name, nn.Parameter(tensor))
                if copies:
                    self.register_buffer(_START + core.name, torch.empty_like(tensor))
        self._core_keys = tuple(_CORE + core.name for core in network.cores)
        self._start_keys = tuple((_CORE if core.frozen else _START) + core.name for core in network.cores)
        if initialise:
            self.reset_parameters(weight)

    @property
    def cores(self) -> dict[str, Tensor]:
        """Every core by name, in file order, frozen ones included."""
        return {core.name: self._tensor(_CORE + core.name) for core in self.network.cores}

    @property
    def start(self) -> dict[str, Tensor]:
        """The frozen copies by core name; empty with `start: zero`."""
        names = [core.name for core in self.network.cores if not core.frozen]
        return {name: self._tensor(_START + name) for name in names if _START + name in self._buffers}

    @property
    def has_values(self) -> bool:
        """False while the cores are on meta, or come from there and were neither drawn nor loaded."""
        return self._initialised

    def network_weight(self) -> Tensor:
        """T(θ) in the shape of the layer's weight: the contracted cores, without scale and frozen copy."""
        self._require_values()
        return self._program.value([self._tensor(key) for key in self._core_keys])

    def delta_weight(self) -> Tensor:
        """What is added to the layer's weight: scale * (T(θ) - T(θ₀)), or scale * T(θ)."""
        if not self._initialised:
            self._require_values()
        cores = [self._tensor(key) for key in self._core_keys]
        if self.network.start == "zero":
            return self._program.delta(cores, None, ())
        start = tuple([self._tensor(key) for key in self._start_keys])
        return self._program.delta(cores, start, self._constants(start))

    def delta_for(self, weight: Tensor) -> Tensor:
        """The delta weight in the memory order of `weight`, a tensor that nothing else holds."""
        strides = weight.stride()
        # A graph takes the program it finds: building one is nothing to trace, and the sum copies to W's strides.
        if strides != self._strides and not torch.compiler.is_compiling():
            self._lay_out(strides)
        return self.delta_weight()

    def reset_parameters(self, weight: Tensor | None = None) -> None:
        """Draw the initial cores and copy them to the frozen copy; on meta, do nothing.

        `weight` is the layer's weight, which only `svd_us` and `svd_vs` need.
        """
        if any(tensor.device.type == "meta" for tensor in self.cores.values()):
            return
        drawn = {
            core.name: initial_core(self.network, core, self.seed, self.layer_name, weight)
            for core in self.network.cores
        }
        with torch.no_grad():
            for name, tensor in self.cores.items():
                tensor.copy_(drawn[name])
            for name, tensor in self.start.items():
                tensor.copy_(drawn[name])
        self._folded = None
        self._initialised = True

    def extra_repr(self) -> str:
        return f"{self.network.spec.name}, parameters={self.network.num_parameters}, mode={self.plan.mode}"

    def _tensor(self, key: str) -> Tensor:
        found = self._parameters[key] if key in self._parameters else self._buffers[key]
        assert found is not None
        return found

    def _lay_out(self, strides: tuple[int, ...]) -> None:
        """Take the program that writes a weight of these strides."""
        self._strides = strides
        self._program: Program = build_program(self.plan, memory_order(strides))
        self._folded = None

    def _constants(self, start: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        folded = self._folded
        # By identity, for `torch.func.functional_call` may pass other tensors.
        if folded is not None and all(one is other for one, other in zip(folded.start, start, strict=True)):
            return folded.constants
        with torch.inference_mode(False), torch.no_grad():
            constants = self._program.constants(start)
        if not torch.compiler.is_compiling():  # a graph must not leave its own tensors behind
            self._folded = _Folded(start, constants)
        return constants

    def _require_values(self) -> None:
        if self._initialised or any(tensor.device.type == "meta" for tensor in self.cores.values()):
            return
        raise ExecutionError(
            Problem(
                "cores",
                "initial or loaded values",
                "memory without values (they were made on the meta device)",
                "Call `reset_parameters` of the adapted layer, or load the adapter, before the first forward.",
                where=f"layer '{self.layer_name}'" if self.layer_name else None,
            )
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        self._folded = None
        super()._apply(lambda tensor: _moved(tensor, fn(tensor)), recurse)  # type: ignore[no-untyped-call]
        if any(tensor.device.type == "meta" for tensor in self.cores.values()):
            self._initialised = False
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if any(tensor.dtype.itemsize < 4 for tensor in self.cores.values()):  # `assign=True` takes what it is given
            super()._apply(lambda tensor: tensor.float())  # type: ignore[no-untyped-call]
        self._folded = None
        if all(prefix + key in state_dict for key in {*self._core_keys, *self._parameters, *self._buffers}):
            self._initialised = True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folded": None, "_program": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lay_out(self._strides)

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapter:
        # Network and plan never change: copies share them.
        memo[id(self.network)], memo[id(self.plan)] = self.network, self.plan
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied


def _whole(seed: object) -> int:
    """A seed, integers of other libraries too. Raises BindError for what is no whole number, or a huge one."""
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


def memory_order(strides: tuple[int, ...]) -> tuple[int, ...]:
    """The axes from the slowest varying to the fastest; equal strides keep their order."""
    return tuple(sorted(range(len(strides)), key=lambda axis: -strides[axis]))


def _moved(before: Tensor, after: Tensor) -> Tensor:
    """`after`, but never narrower than `before` and never restrided."""
    if before.is_floating_point() and after.dtype.itemsize < before.dtype.itemsize:
        after = before.to(after.device)
    return after.contiguous()
