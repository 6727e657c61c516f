"""The adapter: a network's cores as a module, and the delta weight they make."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.adapters.base_weight import base_weight, beside
from tnpeft.adapters.core_keys import CORE, DORA, MAGNITUDE, START, keys_of
from tnpeft.adapters.distributed import DISTRIBUTED, gathered, outline, refuse_flattened, whole, write
from tnpeft.adapters.dora import composed, magnitudes
from tnpeft.adapters.factors import Factors, Light
from tnpeft.adapters.given import unwritten
from tnpeft.adapters.inits import Decompositions, initial_core, whole_seed
from tnpeft.adapters.missing_values import without_values
from tnpeft.adapters.offload import Resident, present
from tnpeft.adapters.places import with_good_places
from tnpeft.adapters.sharing import Captured, Sharing, sharing_label
from tnpeft.adapters.start_std import scale_start
from tnpeft.adapters.strides import memory_order, moved, widened
from tnpeft.adapters.twin import Twinned
from tnpeft.network import BoundCore, Network
from tnpeft.network.dropout import Dropout, Mask, masks_of
from tnpeft.program import Program, build_program, needs_plain_ops, without_autocast
from tnpeft.schedule import DEFAULT_MODE, Plan, check_choices, check_mode, plan, side_of

__all__ = ["Adapter"]

_EARLIER = frozenset({"_kept", "_calling", "_writes"})  # attributes in pickles of earlier versions


class Adapter(Resident, Twinned, nn.Module):
    """The cores of one network on one layer.

    Trainable cores are parameters `core_<name>`, frozen ones persistent buffers of that name, and with
    `start: frozen_copy` every trainable core has its copy in the persistent buffer `start_<name>`. `compose: dora` adds
    the parameter `dora_magnitude` and its first value. All are contiguous and on the weight's device. They are fp32, or
    fp64 on fp64 layers, whatever the model is cast to. Those made on meta hold no values until `reset_parameters`.

    A core shared with other layers is a parameter or buffer of one adapter alone, its holder: that of the first of
    these layers. So it is moved, saved and counted once. A core that is the base weight is neither: it is read from the
    layer whenever it is needed.

    `mode` is the execution mode that was asked for. With `auto` and `autotune` the modes are timed once for each new
    kind of call. `choices` remembers the fastest: the call in words, and its mode. Choices are used without `autotune`
    too. `dropout` acts in calls of a layer that trains. `given` has first values of cores, checked already, in place of
    those that inits draw. Once a value is written, None stands under its name.
    """

    dropout: Dropout | None = None
    masks: tuple[Mask, ...] = ()
    given: Mapping[str, Tensor | None] = MappingProxyType({})
    factors: Factors | None = None  # where terms name others than the stored cores
    side: str | None = None  # of the layer, on which its chain acts instead of beside it

    def __init__(
        self,
        network: Network,
        layer: Any,
        *,
        seed: int | None = None,
        name: str = "",
        mode: str = DEFAULT_MODE,
        autotune: bool = False,
        choices: Mapping[str, str] | None = None,
        initialise: bool = True,
        sharing: Sharing | None = None,
        captured: Captured | None = None,
        dropout: Dropout | None = None,
        given: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        check_mode(mode)
        check_choices(choices or {})
        self.mode = mode
        self.autotune = autotune
        self.choices = dict(choices or {})
        if dropout is not None:
            self.dropout, self.masks = dropout, masks_of(network.plain, dropout)
        if given:
            self.given = dict(given)
        self.plan: Plan = plan(network)
        if network.factors:
            self.factors = Factors(network)
        if network.reads_weight and (side := side_of(network.plain)) is not None:
            self.side = side.name
        self.seed = whole_seed(network.spec.seed if seed is None else seed)
        self.layer_name = name
        self.captured: Captured = captured or {}
        # In a tuple, for it is no module of this one; kept only where it is asked for its weight.
        asked = network.reads_weight or {core.shared for core in network.cores} != {None}
        self._layer: tuple[Any, ...] = (layer,) if asked else ()
        self.changes = 0  # how often its tensors got other values than by training
        self._initialised = False
        # Until they have values: the tensors that have none, for `torch.func.functional_call` may pass others that do.
        self._empty: tuple[Tensor, ...] = ()
        self._holders: dict[str, Adapter] = {}
        self._core_keys, self._start_keys, self._stored_keys = keys_of(network)
        # Tensors made under inference mode could never be trained.
        with present(layer), torch.inference_mode(False):
            weight = base_weight(layer, network)
            self._lay_out(weight.stride())
            self._register(outline(weight) if DISTRIBUTED in sys.modules else weight, sharing or Sharing())
            self._empty = self._held()
            if initialise:
                self.reset_parameters(weight)

    def resident_keys(self) -> list[str]:
        return [*self._parameters, *self._buffers]

    def _register(self, weight: Tensor, sharing: Sharing) -> None:
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        copies = self.network.start == "frozen_copy"
        for core in self.network.cores:
            holder = self if core.shared is None else sharing.holder(self.network.spec, core, self.captured, self)
            if holder is not self:
                self._holders |= {CORE + core.name: holder, START + core.name: holder}
            elif core.origin != "weight":
                dtype = torch.int64 if self.factors is not None and core.is_index else wide
                self._register_one(CORE, core.name, weight.new_empty(core.shape, dtype=dtype), core.frozen, copies)
        if self.network.compose == "dora":
            like = weight.new_empty(self.network.magnitude_shape, dtype=wide)
            self._register_one(DORA, MAGNITUDE, like, False, True)

    def _register_one(self, prefix: str, name: str, tensor: Tensor, frozen: bool, copy: bool) -> None:
        if frozen:
            self.register_buffer(prefix + name, tensor)
            return
        self.register_parameter(prefix + name, nn.Parameter(tensor))
        if copy:
            self.register_buffer(START + name, torch.empty_like(tensor))

    @property
    def cores(self) -> dict[str, Tensor]:
        """Every stored core by name, in file order, frozen and shared ones too; none that is the base weight."""
        return {core.name: self._tensor(CORE + core.name) for core in self.network.cores if core.origin != "weight"}

    @property
    def start(self) -> dict[str, Tensor]:
        """The frozen copies by core name; empty with `start: zero`."""
        if self.network.start == "zero":
            return {}
        return {core.name: self._tensor(START + core.name) for core in self.network.cores if not core.frozen}

    @property
    def magnitude(self) -> nn.Parameter | None:
        """The trained norm of each output channel with `compose: dora`, else None."""
        return self._parameters.get(DORA + MAGNITUDE)

    @property
    def shared(self) -> dict[str, Adapter]:
        """The cores that are held elsewhere, by name, each with the adapter that holds it."""
        return {key.removeprefix(CORE): holder for key, holder in self._holders.items() if key.startswith(CORE)}

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What this adapter itself trains, by name: its cores but those held elsewhere, and its magnitude."""
        cores = {core.name: self._parameters.get(CORE + core.name) for core in self.network.cores}
        cores |= {MAGNITUDE: self.magnitude} if self.magnitude is not None else {}
        return {name: parameter for name, parameter in cores.items() if parameter is not None}

    @property
    def has_values(self) -> bool:
        """False while the cores are on meta, or came from there and were neither drawn nor loaded since."""
        return self._initialised and all(holder._initialised for holder in self._holders.values())

    def network_weight(self, weight: Tensor | None = None) -> Tensor:
        """T(θ) in the shape of the layer's weight: the contracted cores, without scale and frozen copy.

        Several terms are summed, each with its own scale. `weight` is used in place of the layer's base weight.
        """
        self._require_values()
        cores = self._tensors(self._core_keys, weight)
        return self._program.value(cores if self.factors is None else self.factors.values(cores))

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """What is added to the layer's weight, in its memory order: scale * (T(θ) - T(θ₀)), or scale * T(θ).

        With `compose: dora` it is W' - W: from the base weight to the updated one at the trained magnitudes.
        """
        program, inputs = self._program if weight is None else self.program_for(weight), self.delta_inputs(weight)
        (delta,) = program.deltas(inputs[: len(self.plan.network.cores)], program.start(self.start_tensors(weight)))
        return self.with_magnitude(delta, self._base(None) if weight is None and self._layer else weight, inputs)

    def delta_inputs(self, weight: Tensor | None = None, light: Light = None) -> list[Tensor]:
        """The tensors that make the delta weight and that gradients reach: the network's cores, and a magnitude."""
        cores = self.core_tensors(weight, light)
        magnitude = self._parameters.get(DORA + MAGNITUDE)
        return cores if magnitude is None else [*cores, *gathered([magnitude])]

    def core_tensors(self, weight: Tensor | None = None, light: Light = None) -> list[Tensor]:
        """The tensors to contract: the network's cores in its order; for a core that is the base weight, `weight`.

        A network with factors gives these, made of the derived cores in `light`, if a pass has them. Raises
        ExecutionError for cores without values.
        """
        if not self._initialised or self._holders:
            self._require_values()
        cores = self._tensors(self._core_keys, weight)
        if self.factors is None:
            return cores
        if self.network.start == "zero":
            return self.factors.values(cores, light)
        return self.factors.changes(cores, self._tensors(self._start_keys, weight), light)

    def start_tensors(self, weight: Tensor | None = None) -> list[Tensor]:
        """The frozen copies of these tensors, none with `start: zero`; a frozen core is its own copy."""
        if self.network.start == "zero":
            return []
        copies = self._tensors(self._start_keys, weight)
        return copies if self.factors is None else self.factors.start(copies)

    def with_magnitude(self, delta: Tensor, weight: Tensor | None, inputs: Sequence[Tensor]) -> Tensor:
        """`delta`, composed with a trained magnitude if there is one. Raises ExecutionError for cores on meta."""
        if self.network.compose is not None:
            assert weight is not None
            with without_autocast(delta):
                first = self._tensor(START + MAGNITUDE)
                delta = composed(self.network.layer, weight, delta, inputs[-1], first)
        if delta.is_meta and weight is not None and not weight.is_meta:
            raise without_values(self.layer_name, True)
        return delta

    def program_for(self, weight: Tensor) -> Program:
        """The program that writes delta weights in the memory order of the base `weight`."""
        if weight.stride() != self._strides and not needs_plain_ops(weight):  # building is nothing to record
            self._lay_out(weight.stride())
        return self._program

    @property
    def stored(self) -> list[Tensor]:
        """Its cores, their frozen copies and its magnitude, whether they are stored here or in another adapter."""
        return [tensor for tensor in self._found(self._stored_keys) if tensor is not None]

    @property
    def writes(self) -> tuple[int, ...]:
        """Counts that change when a core or copy in use here is drawn, loaded or moved; training changes none."""
        return (self.changes, *(holder.changes for holder in self._holders.values()))

    def reset_parameters(self, weight: Tensor | None = None) -> None:
        """Draw the initial cores and copy them to the frozen copies; on meta, do nothing.

        `weight` is the layer's weight. Inits and cores that are taken from it need it, and cores that are on meta get
        their memory on its device. A core that another adapter holds is drawn there.
        """
        if self._on_meta():
            if weight is None or weight.is_meta:
                return
            self.to_empty(device=weight.device)
        given, known = self.given, Decompositions()
        drawn = {
            core.name: unwritten(given, core.name) if core.name in given else self.initial(core, weight, known)
            for core in self.network.cores
            if (core.init.core is None or core.name in self.given)
            and core.origin != "weight"
            and CORE + core.name not in self._holders
        }
        if self.magnitude is not None:
            base = self._base(weight)
            drawn[MAGNITUDE] = magnitudes(self.network.layer, whole(base).detach().to(self.magnitude.dtype))
        with torch.no_grad():
            for name, values in drawn.items() if self.factors is None else self._first_values(drawn, weight):
                prefix = DORA if name == MAGNITUDE and self.magnitude is not None else CORE
                write(self._tensor(prefix + name), values)
                if START + name in self._buffers:
                    self._tensor(START + name).copy_(values)
        if self.given:
            self.given = dict.fromkeys(self.given)
        self._written()
        self._initialised, self._empty = True, ()
        if self.network.start_std is not None:
            scale_start(self.network, self.network_weight(weight), weight, self.trained, self.start)

    def take(self, other: Adapter) -> None:
        """Take the values and the seed of another adapter of the same network; tensors stay the same objects."""
        with torch.no_grad():
            for key in self.resident_keys():
                write(self._tensor(key), other._tensor(key))
        self.seed, self.given = other.seed, dict(other.given)  # which can be copied
        self._written()
        self._initialised, self._empty = True, ()

    def _first_values(self, drawn: Mapping[str, Tensor], weight: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        """The first values, then those that derived cores of these give, for `init: value(NAME)`."""
        yield from drawn.items()
        for core in self.network.cores:
            if core.init.core is not None and core.name not in drawn and self.factors is not None:
                yield core.name, self.factors.derived(self._tensors(self._core_keys, weight), core.init.core)

    def _held(self) -> tuple[Tensor, ...]:
        """All tensors that are its own."""
        tables = (*self._parameters.values(), *self._buffers.values())
        return tuple([tensor for tensor in tables if tensor is not None])

    def initial(self, core: BoundCore, weight: Tensor | None = None, known: Decompositions | None = None) -> Tensor:
        """A core's first value, fp32 on the CPU: the same bits on any machine, unless it is taken from the weight."""
        label = self.layer_name if core.shared is None else sharing_label(self.network.spec, core, self.captured)
        return initial_core(self.network, core, self.seed, label, weight, known)

    def extra_repr(self) -> str:
        return f"{self.network.spec.name}, parameters={self.network.num_parameters}, mode={self.mode}"

    def _tensor(self, key: str) -> Tensor:
        holder = self._holders.get(key, self) if self._holders else self
        tensor: Tensor | None = holder._parameters.get(key, holder._buffers.get(key))
        # FSDP takes parameters, and leaves views under their names while the module runs.
        return holder.__dict__[key] if tensor is None else tensor

    def _found(self, keys: Iterable[str | None]) -> list[Tensor | None]:
        """What stands under some keys, here or at a holder; None for the base weight, which has none."""
        tensors: list[Tensor | None] = []
        for key in keys:  # a loop without calls where nothing is shared: every layer of a pass asks
            stored = None if key is None or self._holders else self._parameters.get(key, self._buffers.get(key))
            tensors.append(self._tensor(key) if stored is None and key is not None else stored)
        return tensors

    def at(self, places: Iterable[int], start: bool = False) -> list[Tensor]:
        """The stored cores with these numbers in the network, or with `start` their frozen copies."""
        keys = self._start_keys if start else self._core_keys
        return [self._tensor(key) for place in places if (key := keys[place]) is not None]

    def _tensors(self, keys: tuple[str | None, ...], weight: Tensor | None) -> list[Tensor]:
        """The network's cores (or their frozen copies) in its order, the base weight among them where it is one."""
        tensors = self._found(keys)
        if self._layer:
            (base,) = gathered([self._base(weight).detach()])
            return beside(self.network, self._whole(tensors), base, self.layer_name)
        return self._whole(tensors) if DISTRIBUTED in sys.modules else tensors  # type: ignore[return-value]

    def _whole(self, tensors: Sequence[Tensor | None]) -> list[Any]:
        """The cores, gathered where processes hold parts of them. Raises ExecutionError where they cannot be."""
        tensors = gathered(tensors)
        refuse_flattened(self.layer_name, tensors, [core.shape for core in self.network.cores])
        return tensors

    def _base(self, weight: Tensor | None) -> Tensor:
        return base_weight(self._layer[0], self.network) if weight is None else weight

    def _on_meta(self) -> bool:
        return "meta" in {tensor.device.type for tensor in self.state_dict().values()}

    def _lay_out(self, strides: tuple[int, ...]) -> None:
        """Take the program that writes a weight of these strides."""
        self._program: Program = build_program(self.plan, memory_order(strides))
        self._strides = strides  # last, for other threads look at it first

    def _written(self) -> None:
        self.changes += 1

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
        super()._load_from_state_dict(with_good_places(self, state_dict, prefix, rest[-1]), prefix, *rest)
        # `assign=True` takes what it is given.
        if any(tensor.dtype.itemsize < 4 for tensor in self.state_dict().values()):
            super()._apply(widened)  # type: ignore[no-untyped-call]
        self._written()
        if all(prefix + key in state_dict for key in (*self._parameters, *self._buffers)):
            self._initialised, self._empty = True, ()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_program": None}  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"changes": 0} | {key: state[key] for key in state if key not in _EARLIER})  # type: ignore[no-untyped-call]
        self._core_keys, self._start_keys, self._stored_keys = keys_of(self.network)
        self._lay_out(self._strides)

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapter:
        # Network and plan never change: copies share them.
        memo[id(self.network)], memo[id(self.plan)] = self.network, self.plan
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied
