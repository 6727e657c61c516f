"""The adapter: a network's cores as a module, and the delta weight they make."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tnpeft.modules.dispatch import Calling
from tnpeft.modules.distributed import refuse_distributed
from tnpeft.modules.dora import composed, magnitudes
from tnpeft.modules.inits import canonical_weight, initial_core, whole_seed
from tnpeft.modules.offload import Resident, present
from tnpeft.modules.parked import own_weight
from tnpeft.modules.refusals import without_values
from tnpeft.modules.results import ResultCache, same_tensors
from tnpeft.modules.sharing import Captured, Sharing, sharing_label
from tnpeft.modules.strides import memory_order, moved
from tnpeft.network import BoundCore, Network
from tnpeft.planning import DEFAULT_MODE, Plan, check_choices, check_mode, plan
from tnpeft.program import Constants, Program, Weight, build_program, is_lasting, versions, without_autocast
from tnpeft.program.observers import needs_plain_ops

__all__ = ["Adapter"]

_CORE, _START, _DORA, _MAGNITUDE = "core_", "start_", "dora_", "magnitude"


class _StartConstants(NamedTuple):
    """What a program makes of the frozen copy `start` alone; never copied, moved, pickled or saved."""

    key: tuple[Program, list[int]]  # with how often the copies were written to
    start: tuple[Tensor, ...]
    constants: Constants


class Adapter(Resident, nn.Module):
    """The cores of one network on one layer.

    Trainable cores are parameters `core_<name>`, frozen ones persistent buffers of that name, and
    with `start: frozen_copy` every trainable core has its copy in the persistent buffer
    `start_<name>`. `compose: dora` adds the parameter `dora_magnitude` and its first value. They are
    contiguous, on the weight's device, fp32 or (on fp64 layers) fp64 whatever the model is cast to,
    and hold no value until `reset_parameters` if made on meta.

    A core shared with other layers is a parameter (buffer) of the adapter of the first of them, its
    holder, and of no other, so that it is moved, saved and counted once. A core that is the base weight
    is none of them: it is read from the layer whenever it is needed.

    `mode` is the execution mode that was asked for. With `auto` and `autotune` the modes are timed once for
    each new call, which `choices` remembers: the call in words, and the mode. Choices are used without
    `autotune` too.
    """

    def __init__(
        self,
        network: Network,
        layer: nn.Module,
        *,
        seed: int | None = None,
        name: str = "",
        mode: str = DEFAULT_MODE,
        autotune: bool = False,
        choices: Mapping[str, str] | None = None,
        initialise: bool = True,
        sharing: Sharing | None = None,
        captured: Captured | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        check_mode(mode)
        check_choices(choices or {})
        self.mode = mode
        self.autotune = autotune
        self.choices = dict(choices or {})
        self.plan: Plan = plan(network)
        self._calling: Calling | None = Calling(self)  # from the start, so that all threads have the same
        self.seed = whole_seed(network.spec.seed if seed is None else seed)
        self.layer_name = name
        self.captured: Captured = captured or {}
        # In a tuple, for it is no module of this one; kept only where it is asked for its weight.
        asked = network.reads_weight or any(core.shared for core in network.cores)
        self._layer: tuple[nn.Module, ...] = (layer,) if asked else ()
        self._kept: _StartConstants | None = None
        self._writes = 0  # how often its tensors got other values, for those that keep what they make of them
        self._initialised = False
        # Until they have values: the tensors that have none, for `torch.func.functional_call` may pass others that do.
        self._empty: tuple[Tensor, ...] = ()
        self._holders: dict[str, Adapter] = {}
        self._core_keys = tuple(None if core.origin == "weight" else _CORE + core.name for core in network.cores)
        self._start_keys = tuple(
            key if core.frozen else _START + core.name for key, core in zip(self._core_keys, network.cores, strict=True)
        )
        # Tensors made under inference mode could never be trained.
        with present(layer), torch.inference_mode(False):
            weight = layer.weight
            assert isinstance(weight, Tensor)
            self._lay_out(weight.stride())
            self._register(weight, sharing or Sharing())
            self._empty = self._held()
            if initialise:
                self.reset_parameters(weight)

    def resident_keys(self) -> list[str]:
        return [*self._parameters, *self._buffers]

    def _register(self, weight: Tensor, sharing: Sharing) -> None:
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        copies = self.network.start == "frozen_copy"
        for core in self.network.cores:
            holder = self if core.shared is None else sharing.holder(self, core)
            if holder is not self:
                self._holders |= {_CORE + core.name: holder, _START + core.name: holder}
            elif core.origin != "weight":
                like = weight.new_empty(core.shape, dtype=dtype)
                self._register_one(_CORE, core.name, like, core.frozen, copies)
        if self.network.compose == "dora":
            like = weight.new_empty(self.network.layer.out_channels, dtype=dtype)
            self._register_one(_DORA, _MAGNITUDE, like, False, True)

    def _register_one(self, prefix: str, name: str, tensor: Tensor, frozen: bool, copy: bool) -> None:
        if frozen:
            self.register_buffer(prefix + name, tensor)
            return
        self.register_parameter(prefix + name, nn.Parameter(tensor))
        if copy:
            self.register_buffer(_START + name, torch.empty_like(tensor))

    @property
    def cores(self) -> dict[str, Tensor]:
        """Every core by name, in file order, frozen and shared ones included; not those that are the base weight."""
        return {core.name: self._tensor(_CORE + core.name) for core in self.network.cores if core.origin != "weight"}

    @property
    def start(self) -> dict[str, Tensor]:
        """The frozen copies by core name; empty with `start: zero`."""
        if self.network.start == "zero":
            return {}
        return {core.name: self._tensor(_START + core.name) for core in self.network.cores if not core.frozen}

    @property
    def magnitude(self) -> nn.Parameter | None:
        """The trained norm of each output channel with `compose: dora`, else None."""
        return self._parameters.get(_DORA + _MAGNITUDE)

    @property
    def shared(self) -> dict[str, Adapter]:
        """The cores that are held elsewhere, by name, each with the adapter that holds it."""
        return {key.removeprefix(_CORE): holder for key, holder in self._holders.items() if key.startswith(_CORE)}

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What this adapter itself trains, by name: its cores but those held elsewhere, and its magnitude."""
        own = {core.name: self._parameters.get(_CORE + core.name) for core in self.network.cores}
        own |= {_MAGNITUDE: self.magnitude} if self.magnitude is not None else {}
        return {name: parameter for name, parameter in own.items() if parameter is not None}

    @property
    def has_values(self) -> bool:
        """False while the cores are on meta, or come from there and were neither drawn nor loaded."""
        return self._initialised and all(holder._initialised for holder in self._holders.values())

    def network_weight(self, weight: Tensor | None = None) -> Tensor:
        """T(θ) in the shape of the layer's weight: the contracted cores, without scale and frozen copy.

        Of several terms it is their sum, each with its own scale. `weight` stands in for the layer's base weight.
        """
        self._require_values()
        return self._program.value(self._tensors(self._core_keys, weight))

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """What is added to the layer's weight: scale * (T(θ) - T(θ₀)), or scale * T(θ).

        With `compose: dora`, what leads from the weight to its update at the trained magnitudes.
        """
        return self._delta(weight, self.delta_inputs(weight))

    def delta_inputs(self, weight: Tensor | None = None) -> list[Tensor]:
        """What the delta weight is made of, and gradients reach: the network's cores, and a magnitude."""
        if not self._initialised or self._holders:
            self._require_values()
        magnitude = self.magnitude
        return self._tensors(self._core_keys, weight) + ([] if magnitude is None else [magnitude])

    def _delta(self, weight: Tensor | None, inputs: Sequence[Tensor]) -> Tensor:
        cores, program = inputs[: len(self.network.cores)], self._program
        if self.network.start == "zero":
            delta = program.delta(cores, None, ())
        else:
            start = tuple(self._tensors(self._start_keys, weight))
            delta = program.delta(cores, start, self._constants(program, start))
        if self.magnitude is None:
            return delta
        with without_autocast(delta):
            first = self._tensor(_START + _MAGNITUDE)
            return composed(self.network.layer, self._base(weight), delta, inputs[-1], first)

    def delta_for(self, weight: Tensor, inputs: Sequence[Tensor] | None = None) -> Tensor:
        """ΔW on the base `weight` in its memory order, a tensor of its own; `inputs` stand in for `delta_inputs`."""
        self._fit(weight)
        delta = self._delta(weight, self.delta_inputs(weight) if inputs is None else inputs)
        if delta.is_meta and not weight.is_meta:
            raise without_values(self.layer_name, True)
        return delta

    def batched_for(self, weight: Tensor) -> Weight | None:
        """How adapters like it make their delta weights at once, on base weights like this; None if they cannot."""
        self._fit(weight)
        return self._program.batched

    @property
    def calling(self) -> Calling:
        """What it needs to run in another mode than dense."""
        if self._calling is None:
            self._calling = Calling(self)
        return self._calling

    @property
    def chosen(self) -> str | None:
        """The mode in which its layer runs, as far as it was called, if that is another than was asked for."""
        mode = None if self._calling is None else self._calling.mode
        return None if mode == self.mode else mode

    @property
    def cache(self) -> ResultCache | None:
        """Where results of its cores are kept, if they are to be."""
        cache = None if self._calling is None or needs_plain_ops() else self._calling.cache
        return cache if cache is not None and cache.is_open and not torch.is_inference_mode_enabled() else None

    @property
    def stored(self) -> list[Tensor]:
        """Its cores with their frozen copies and its magnitude, as they are stored here or elsewhere."""
        copies = self._start_keys if self.network.start == "frozen_copy" else ()
        found = [self._tensor(key) for key in (*self._core_keys, *copies) if key is not None]
        return found if self.magnitude is None else [*found, self.magnitude]

    @property
    def memory_order(self) -> tuple[int, ...]:  # of the weights that the program writes
        return memory_order(self._strides)

    @property
    def writes(self) -> tuple[int, ...]:
        """Counts that change whenever a core or copy that it uses got other values other than by training."""
        return (self._writes, *(holder._writes for holder in self._holders.values()))

    def core_tensors(self) -> list[Tensor]:
        """The network's cores in its order, where none is the base weight. Raises ExecutionError without values."""
        if not self._initialised or self._holders:
            self._require_values()
        return self._tensors(self._core_keys, None)

    def start_tensors(self) -> list[Tensor]:
        """Their frozen copies; a core that is frozen is its own."""
        return self._tensors(self._start_keys, None)

    def reset_parameters(self, weight: Tensor | None = None) -> None:
        """Draw the initial cores and copy them to the frozen copy; on meta, do nothing.

        `weight` is the layer's weight, which inits and cores that are taken from it need, and where cores on meta get
        their memory. A core that is held elsewhere is drawn there.
        """
        if self._on_meta():
            if weight is None or weight.is_meta:
                return
            self.to_empty(device=weight.device)
        drawn = {core.name: self.initial(core, weight) for core in self.network.cores if self._holds(core)}
        if self.magnitude is not None:
            base = self._base(weight).detach()
            drawn[_MAGNITUDE] = magnitudes(self.network.layer, base.to(self.magnitude.dtype))
        with torch.no_grad():
            for name, values in drawn.items():
                own = self._tensor((_DORA if name == _MAGNITUDE and self.magnitude is not None else _CORE) + name)
                own.copy_(values)
                if _START + name in self._buffers:
                    self._tensor(_START + name).copy_(own)
        self._written()
        self._initialised, self._empty = True, ()

    def _held(self) -> tuple[Tensor, ...]:
        """All tensors that are its own."""
        return tuple(tensor for tensor in (*self._parameters.values(), *self._buffers.values()) if tensor is not None)

    def initial(self, core: BoundCore, weight: Tensor | None = None) -> Tensor:
        """A core's first value, fp32 on the CPU: the same bits on any machine, unless it is taken from the weight."""
        label = self.layer_name if core.shared is None else sharing_label(self.network.spec, core, self.captured)
        return initial_core(self.network, core, self.seed, label, weight)

    def extra_repr(self) -> str:
        mode = f"{self.mode}: {self.chosen}" if self.chosen else self.mode
        return f"{self.network.spec.name}, parameters={self.network.num_parameters}, mode={mode}"

    def _tensor(self, key: str) -> Tensor:
        holder = self._holders.get(key, self) if self._holders else self
        tensor = holder._parameters.get(key, holder._buffers.get(key))
        # FSDP takes parameters, and leaves views under their names while the module runs.
        return holder.__dict__[key] if tensor is None else tensor

    def _tensors(self, keys: tuple[str | None, ...], weight: Tensor | None) -> list[Tensor]:
        """The network's cores (or their frozen copies) in its order, the base weight among them where it is one."""
        if not self._layer:  # nothing is taken from the layer
            return refuse_distributed(self.layer_name, [self._tensor(key) for key in keys if key is not None])
        found = [None if key is None else self._tensor(key) for key in keys]
        # Layers that share cores may live on several devices, and be wider than those that hold them.
        base = self._base(weight).detach()
        refuse_distributed(self.layer_name, [base, *(core for core in found if core is not None)])
        if not base.is_meta and any(core is not None and core.is_meta for core in found):
            raise without_values(self.layer_name, True)
        dtype = torch.promote_types(torch.float32, base.dtype)
        for core in found:
            dtype = dtype if core is None else torch.promote_types(dtype, core.dtype)
        both = zip(found, self.network.cores, strict=True)
        return [(self._weight_as(core, base) if own is None else own).to(base.device, dtype) for own, core in both]

    def _base(self, weight: Tensor | None) -> Tensor:
        return own_weight(self._layer[0]) if weight is None else weight

    def _weight_as(self, core: BoundCore, base: Tensor) -> Tensor:
        """The base weight with the legs of a core."""
        return canonical_weight(self.network.layer, base).reshape(core.shape)

    def _holds(self, core: BoundCore) -> bool:
        return core.origin != "weight" and _CORE + core.name not in self._holders

    def _on_meta(self) -> bool:
        return any(tensor.device.type == "meta" for tensor in self.state_dict().values())

    def _fit(self, weight: Tensor) -> None:
        if weight.stride() != self._strides and not needs_plain_ops(weight):  # building is nothing to record
            self._lay_out(weight.stride())

    def _lay_out(self, strides: tuple[int, ...]) -> None:
        """Take the program that writes a weight of these strides."""
        self._program: Program = build_program(self.plan, memory_order(strides))
        self._kept = None
        self._strides = strides  # last, for other threads look at it first

    def _constants(self, program: Program, start: tuple[Tensor, ...]) -> Constants:
        # They may depend on the base weight, which may be written to unseen; a graph holds no tensor made elsewhere.
        if None in self._core_keys or needs_plain_ops(*start):
            return program.constants(start)
        kept, key = self._kept, (program, versions(start))
        # By identity, for `torch.func.functional_call` may pass other tensors.
        if kept is not None and kept.key == key and same_tensors(kept.start, start):
            return kept.constants
        with torch.inference_mode(False), torch.no_grad():
            constants = program.constants(start)
        if is_lasting(constants):
            self._kept = _StartConstants(key, start, constants)
        return constants

    def _written(self) -> None:
        """Forget what was made of its tensors' earlier values, here and where they are shared."""
        self._kept = None
        self._writes += 1

    def _require_values(self) -> None:
        cores = self.cores.values()
        if self.has_values or any(tensor.is_meta for tensor in cores):
            return
        empty = [tensor for holder in (self, *self._holders.values()) for tensor in holder._empty]
        if not any(core is tensor for core in cores for tensor in empty):
            return
        raise without_values(self.layer_name, False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        self._written()
        super()._apply(lambda tensor: moved(tensor, fn), recurse)  # type: ignore[no-untyped-call]
        if self._on_meta():
            self._initialised = False
        if not self._initialised:
            self._empty = self._held()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        # `assign=True` takes what it is given.
        if any(tensor.dtype.itemsize < 4 for tensor in self.state_dict().values()):
            super()._apply(lambda tensor: tensor.float())  # type: ignore[no-untyped-call]
        self._written()
        if all(prefix + key in state_dict for key in (*self._parameters, *self._buffers)):
            self._initialised, self._empty = True, ()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "_program": None, "_calling": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_calling": Calling(self)})  # type: ignore[no-untyped-call]
        self._lay_out(self._strides)

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapter:
        # Network and plan never change: copies share them.
        memo[id(self.network)], memo[id(self.plan)] = self.network, self.plan
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied
