"""Published starts that need data, gradients or several layers at once, for `attach(init=...)`.

    start = tnpeft.starts.Eva(model, batches)
    handle = tnpeft.attach(model, "lora", match="q_proj$", r=16, init=start)

Starts that need only a layer's own weight are functions of a dozen lines, in docs/starts.md. Each batch is what the
model is called with: a tensor, a tuple of arguments, or a mapping of keyword arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tnpeft.adapters.base_weight import dequantised, described
from tnpeft.adapters.inits import canonical_weight
from tnpeft.adapters.parked import own_weight
from tnpeft.errors import AttachError, Problem, clip
from tnpeft.network import BoundCore, Network
from tnpeft.surgery.parameters import bases_of

__all__ = ["AdaMss", "Eva", "Frod", "LoraGa", "UniLora"]


class _Start:
    """What these starts share: the layers, and values by layer and core."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.values: dict[tuple[str, str], Tensor] = {}

    def prepare(self, layers: Mapping[str, Network]) -> None:
        """Prepare for all layers that will be adapted; `attach` calls this first."""
        raise NotImplementedError

    def __call__(self, layer: str, core: str, network: Network) -> Tensor | None:
        """The first value of one core; None if it keeps its init."""
        return self.values.get((layer, core))


class Eva(_Start):
    """EVA: `down` spans the principal directions of a layer's inputs.

    down[r,i] is the r-th right singular vector of the inputs minus their mean, found batch by batch (incremental PCA),
    with the sign that makes its largest entry positive. Ranks are those of the spec (`rho = 1`): no rank moves between
    layers.
    Source: Paischer et al., NeurIPS 2025, arXiv:2410.07170, Sec. 3; Ross et al., IJCV 2008, for the increments.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], *, core: str = "down") -> None:
        super().__init__(model)
        self.batches, self.core = batches, core

    def prepare(self, layers: Mapping[str, Network]) -> None:
        wanted = {name: _core(network, self.core) for name, network in layers.items()}
        bases = bases_of(self.model, {name: network.layer for name, network in layers.items()})
        odd = [name for name, base in bases.items() if layers[name].layer.kind != "Linear" or not _is_called(base)]
        if odd:
            fix = "Match Linear layers, or leave the others to their inits by a function of your own."
            raise AttachError(Problem("EVA", "Linear layers, whose inputs are rows", "others", fix, layers=tuple(odd)))
        parts = {name: _Principal(core.shape[0]) for name, core in wanted.items()}

        def listen(part: _Principal) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            return lambda module, inputs: part.add(inputs[0].detach())

        hooks = [bases[name].register_forward_pre_hook(listen(part)) for name, part in parts.items()]  # type: ignore[union-attr]
        try:
            with torch.no_grad(), _evaluating(self.model):
                for batch in self.batches:
                    _call(self.model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        for name, part in parts.items():
            self.values[name, self.core] = part.directions(name).reshape(wanted[name].shape)


class _Principal:
    """Principal directions of rows that come in batches; it keeps the directions, the mean and the count so far."""

    def __init__(self, rank: int) -> None:
        self.rank, self.count = rank, 0
        self.mean: Tensor | None = None
        self.scaled: Tensor | None = None  # singular values times directions, (rank, features)
        self.waiting: list[Tensor] = []

    def add(self, inputs: Tensor) -> None:
        """Take rows; fewer than the rank wait for the next ones."""
        self.waiting.append(inputs.reshape(-1, inputs.shape[-1]).double())
        if sum(map(len, self.waiting)) < self.rank:
            return
        rows, self.waiting = torch.cat(self.waiting), []
        mean = rows.mean(0)
        stacked = rows - mean
        if self.scaled is not None and self.mean is not None:
            total = self.count + len(rows)
            between = (self.count * len(rows) / total) ** 0.5 * (self.mean - mean)
            stacked = torch.cat([self.scaled, stacked, between[None]])
            mean = (self.count * self.mean + len(rows) * mean) / total
        _, sizes, directions = torch.linalg.svd(stacked, full_matrices=False)
        self.scaled = (sizes[:, None] * directions)[: self.rank]
        self.found = directions[: self.rank]
        self.mean, self.count = mean, self.count + len(rows)

    def directions(self, layer: str) -> Tensor:
        """(rank, features). Raises AttachError for a layer that saw too few rows."""
        if self.scaled is None or len(self.found) < self.rank:
            found = str(self.count + sum(map(len, self.waiting)))
            fix = "Give more batches, lower the rank, or leave out layers that the model does not call."
            raise AttachError(
                Problem("EVA", f"inputs of at least {self.rank} rows and features", found, fix, layers=(layer,))
            )
        return _signed(self.found.T).T.float()


class LoraGa(_Start):
    """LoRA-GA: the first step of LoRA follows the gradient of the full weight. For specs with `start: frozen_copy`.

    Let G = U S V^T be the mean gradient of `loss(model, batch)` over the batches, unfolded as out x rest, and r the
    rank:

        up = f U[:, r:2r],  down = f V[:, :r]^T,  f = out^(1/4) / gamma^(1/2)

    With `peft=True` it is as in PEFT 0.21.2, where `up` is f U[:, r:2r] S[r:2r] and `down` is V[:, :r]^T.
    Source: Wang et al., NeurIPS 2024, arXiv:2407.05000, Alg. 1, and its authors' code (`ArB2r`, `stable`).
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss: Callable[[nn.Module, Any], Tensor],
        *,
        gamma: float = 16.0,
        peft: bool = False,
        cores: tuple[str, str] = ("up", "down"),
    ) -> None:
        super().__init__(model)
        self.batches, self.loss, self.gamma, self.peft, self.cores = batches, loss, gamma, peft, cores

    def prepare(self, layers: Mapping[str, Network]) -> None:
        bases = bases_of(self.model, {name: network.layer for name, network in layers.items()})
        weights: dict[str, Tensor] = {}
        for name, network in layers.items():
            if network.start == "zero":
                fix = "Use a spec with `start: frozen_copy`, such as `pissa`, whose inits this start replaces."
                raise AttachError(Problem("LoRA-GA", "a frozen copy", "`start: zero`", fix, layers=(name,)))
            if network.layer.opaque:
                found, fix = described(bases[name]), "Take the gradients on the unquantised model."  # type: ignore[arg-type]
                raise AttachError(Problem("LoRA-GA", "a weight that has gradients", found, fix, layers=(name,)))
            weights[name] = own_weight(bases[name])
        for name, gradient in self._gradients(weights).items():
            self._values(name, layers[name], canonical_weight(layers[name].layer, gradient).flatten(1))

    def _gradients(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        flags = {name: weight.requires_grad for name, weight in weights.items()}
        total: dict[str, Tensor] = {}
        count = 0
        try:
            for weight in weights.values():
                weight.requires_grad_(True)
            for batch in self.batches:
                with torch.enable_grad():
                    loss = self.loss(self.model, batch)
                found = torch.autograd.grad(loss, [*weights.values()], allow_unused=True)
                for name, gradient in zip(weights, found, strict=True):
                    if gradient is not None:
                        total[name] = total.get(name, torch.zeros_like(gradient)) + gradient
                count += 1
        finally:
            for name, weight in weights.items():
                weight.requires_grad_(flags[name])
        if missing := tuple(name for name in weights if name not in total):
            fix = "Give batches whose loss depends on these layers, or leave them out."
            raise AttachError(Problem("LoRA-GA", "a gradient", "none", fix, layers=missing))
        return {name: gradient / count for name, gradient in total.items()}

    def _values(self, name: str, network: Network, gradient: Tensor) -> None:
        up, down = (_core(network, core) for core in self.cores)
        rank = up.shape[-1]
        if 2 * rank > min(gradient.shape):
            expected, fix = f"a rank of at most {min(gradient.shape) // 2}, half of the gradient's", "Lower the rank."
            raise AttachError(Problem("LoRA-GA", expected, str(rank), fix, layers=(name,)))
        u, s, vh = torch.linalg.svd(gradient.double(), full_matrices=False)
        signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()  # those of LAPACK are a whim
        u, vh = u * signs, vh * signs.T
        factor = gradient.shape[0] ** 0.25 / self.gamma**0.5
        left, right = factor * u[:, rank : 2 * rank], vh[:rank]
        left, right = (left * s[rank : 2 * rank], right) if self.peft else (left, factor * right)
        self.values[name, up.name] = left.reshape(up.shape).float()
        self.values[name, down.name] = right.reshape(down.shape).float()


class Frod(_Start):
    """FRoD: V joins all layers of a role, W = U diag(l) V^T in each of them. For the spec `frod`.

    The stacked W_j = Q R, and V = R^T X with X the eigenvectors of mean_j (Q_j^T Q_j + a I)^-1. With fewer rows than
    columns V has the right singular vectors. U diag(l) = W V^-T, where U has unit columns. Places are drawn off the
    diagonal. `role` is the regular expression that `attach(scopes={"matrix": role})` gets; layers with equal captures
    have one V.
    Source: Wan et al., AAAI 2026, arXiv:2512.23485; PEFT 0.21.2, FRoD.
    """

    def __init__(self, model: nn.Module, role: str, *, ridge: float = 1e-3, seed: int = 0) -> None:
        super().__init__(model)
        self.role, self.ridge, self.seed = re.compile(role), ridge, seed

    def prepare(self, layers: Mapping[str, Network]) -> None:
        weights, roles = _matrices(self.model, layers), dict[tuple[Any, ...], list[str]]()
        for name, weight in weights.items():
            match = self.role.search(name)
            if match is None:
                fix = "Give the expression that `attach` has for the scope `matrix`."
                found = clip(self.role.pattern)
                raise AttachError(Problem("FRoD, `role`", "an expression that finds it", found, fix, layers=(name,)))
            roles.setdefault((match.groups(), weight.shape[1]), []).append(name)
        for names in roles.values():
            basis = self._basis([weights[name] for name in names])
            for name in names:
                scaled = torch.linalg.lstsq(basis, weights[name].T).solution.T  # (out, in)
                sizes = torch.linalg.vector_norm(scaled, dim=0)
                units = torch.where(sizes > 1e-12, scaled / sizes.clamp(min=1e-12), 0.0)
                parts = {"V": basis, "l": sizes, "U": units}
                self.values |= {(name, core): value.float() for core, value in parts.items()}
                self.values[name, "places"] = self._places(_core(layers[name], "places").numel, len(basis))

    def _basis(self, weights: list[Tensor]) -> Tensor:
        stacked = torch.cat(weights)
        side = stacked.shape[1]
        if len(stacked) < side:
            right: Tensor = torch.linalg.svd(stacked)[2]
            return right.T
        q, r = torch.linalg.qr(stacked)
        parts = torch.split(q, [len(weight) for weight in weights])
        ridge = self.ridge * torch.eye(side, dtype=q.dtype, device=q.device)
        mean = torch.stack([torch.linalg.inv(part.T @ part + ridge) for part in parts]).mean(0)
        basis: Tensor = r.T @ torch.linalg.eigh(mean)[1]
        return basis

    def _places(self, count: int, side: int) -> Tensor:
        """Flat places in (in, in), off the diagonal."""
        off = side * (side - 1)
        if count > off:
            fix = "Lower `share`."
            raise AttachError(Problem("FRoD", f"at most {off} places off the diagonal", str(count), fix))
        drawn = torch.randperm(off, generator=torch.Generator().manual_seed(self.seed))[:count]
        row, column = drawn // (side - 1), drawn % (side - 1)
        return row * side + column + (column >= row)


class UniLora(_Start):
    """Uni-LoRA: every entry of the model's A and B is one of d numbers, used equally often. For the spec `unilora`.

    The indices 0 to d - 1, each floor or ceil of entries / d times, are shuffled over the A and B of one layer after
    the other. norm[j] = 1 / sqrt(uses of j), so that the map from theta to all entries keeps lengths.
    Source: Li et al., 2025, arXiv:2506.00799, Sec. 3; the balance and its generator as in PEFT 0.21.2.
    """

    def __init__(self, model: nn.Module, *, seed: int = 42) -> None:
        super().__init__(model)
        self.seed = seed

    def prepare(self, layers: Mapping[str, Network]) -> None:
        places = [(name, _core(layers[name], core)) for name in layers for core in ("index_a", "index_b")]
        length = _core(next(iter(layers.values())), "theta").numel
        total = sum(core.numel for _, core in places)
        generator = np.random.default_rng(self.seed)
        numbers = np.repeat(np.arange(length), total // length)
        if total % length:
            numbers = np.concatenate([numbers, generator.choice(length, size=total % length, replace=False)])
        generator.shuffle(numbers)
        uses = torch.from_numpy(np.bincount(numbers, minlength=length))
        norm = torch.where(uses > 0, uses.clamp(min=1).double().rsqrt(), 0.0).float()
        parts = torch.split(torch.from_numpy(numbers), [core.numel for _, core in places])
        for (name, core), part in zip(places, parts, strict=True):
            self.values[name, core.name] = part.reshape(core.shape)
            self.values[name, "norm"] = norm


class AdaMss(_Start):
    """AdaMSS: outputs are clustered by their rows of U and train in their cluster's directions. For the spec `adamss`.

    With W = U S V^T cut to the spec's rank, `V` has its right vectors, `cluster` the k-means labels of U's rows, and
    A[j] the right singular vectors of U's rows in cluster j. The argument `cluster(rows, count)` gives labels of your
    own, from 0 to count - 1.
    Source: Zheng et al., NeurIPS 2025; PEFT 0.21.2, AdaMSS, for layers without bias.
    """

    def __init__(
        self, model: nn.Module, *, seed: int = 0, cluster: Callable[[Tensor, int], Tensor] | None = None
    ) -> None:
        super().__init__(model)
        self.seed, self.cluster = seed, cluster

    def prepare(self, layers: Mapping[str, Network]) -> None:
        for name, weight in _matrices(self.model, layers).items():
            cores = {core: _core(layers[name], core) for core in ("V", "A", "cluster")}
            count, rank, width = cores["A"].shape
            u, _, vh = torch.linalg.svd(weight, full_matrices=False)
            rows, vh = u[:, :width], vh[:width]
            labels = self.cluster(rows.float(), count) if self.cluster else self._labels(rows, count)
            labels = labels.to("cpu", torch.int64)
            parts = [rows[(labels == number).to(rows.device)] for number in range(count)]
            directions = torch.stack([torch.linalg.svd(part)[2][:rank] for part in parts])
            self.values[name, "A"] = directions.float()
            self.values[name, "V"] = vh.reshape(cores["V"].shape).float()
            self.values[name, "cluster"] = labels

    def _labels(self, rows: Tensor, count: int) -> Tensor:
        """Lloyd's k-means from `count` of the rows, at most ten rounds."""
        rows = rows.cpu()
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))[:count]
        centres, labels = rows[chosen], torch.zeros(len(rows), dtype=torch.int64)
        for _ in range(10):
            distances = torch.cdist(rows, centres)
            labels = distances.argmin(1)
            for number in range(count):
                mine = rows[labels == number]
                # An empty cluster begins again at the row that is farthest from its own centre.
                centres[number] = mine.mean(0) if len(mine) else rows[distances.amin(1).argmax()]
        return torch.cdist(rows, centres).argmin(1)


def _core(network: Network, name: str) -> BoundCore:
    """A core by name. Raises AttachError for a spec that has none."""
    for core in network.cores:
        if core.name == name:
            return core
    known = ", ".join(core.name for core in network.cores)
    fix = "Use the spec that this start is for, or name its core."
    raise AttachError(Problem(f"spec '{network.spec.name}'", f"a core '{name}'", known, fix))


def _matrices(model: nn.Module, layers: Mapping[str, Network]) -> dict[str, Tensor]:
    """The base weights as (out, rest), in float64. Raises AttachError for weights that cannot be read."""
    bases = bases_of(model, {name: network.layer for name, network in layers.items()})
    matrices: dict[str, Tensor] = {}
    for name, network in layers.items():
        base: Any = bases[name]
        weight = dequantised(base, network.layer) if network.layer.opaque else own_weight(base)
        if weight is None or weight.is_meta or network.layer.slices:
            found = "none" if weight is None or weight.is_meta else "a stack of them"
            fix = "Give the model its weights first, unquantised, and match layers by themselves."
            raise AttachError(Problem("the start", "a base weight with values", found, fix, layers=(name,)))
        matrices[name] = canonical_weight(network.layer, weight.detach()).flatten(1).cpu().double()
    return matrices


def _is_called(base: object) -> bool:
    return isinstance(base, nn.Module)


def _signed(columns: Tensor) -> Tensor:
    """Columns whose entry of largest size is positive."""
    return columns * columns.gather(0, columns.abs().argmax(0, keepdim=True)).sign()


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in evaluation mode; then each is as it was."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag
