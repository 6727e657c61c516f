"""Does an observer of an adapted layer (a tracer, compiler or transform) see what the eager layer computes?

Each row is one observer of one adapted layer of the smallest shape that its spec takes; cores are a tenth of the way to
random ones. A row has the largest difference of outputs and gradients from the eager layer in the same mode, relative
to the largest value (to 1, if all are smaller), or the sentence with which the observer is refused. There are rows for
every spec, mode and kind of layer. Rows that the output file has are not measured again.

* trace, onnx: `torch.jit.trace`, and the exporter that rests on it, run by onnxruntime; a second batch size too;
* per-sample: `vmap(grad(functional_call))`, summed, against `backward`; jvp; jacrev;
* export, compile: `torch.export` (also with a batch that varies) and `torch.compile` (aot_eager, fullgraph), each spec
  on one kind of layer; script: `torch.jit.script` after `tnpeft.merge`;
* inductor, onnx-dynamo: twelve pairs.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import common
import torch
from smallest import KINDS, MODES, attached
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

import tnpeft
from tnpeft.verify.model_under_test import fill

TOLERANCE = 1e-5
FAILED = "failed: "
PAIRS = (
    ("Linear", "lora", "factored"), ("Linear", "dora", "auto"), ("Linear", "quanta", "factored"),
    ("Linear", "tt_lora", "auto"), ("Linear", "hira", "dense"), ("Conv1d", "loha", "hybrid"),
    ("Conv2d", "lokr", "factored"), ("Conv2d", "ia3", "auto"), ("Conv3d", "tenvoo_l", "factored"),
    ("Conv3d", "tenvoo_q", "dense"), ("Conv3d", "lora", "hybrid"), ("ConvTranspose2d", "glora", "auto"),
)  # fmt: skip


def subject(kind: str, spec: str, mode: str, started: bool = True) -> tuple[nn.Sequential, Tensor]:
    """A model of one adapted layer of this kind, away from its start if `started`, and an input for it.

    Raises TnpeftError where the spec takes none of the sizes tried.
    """
    torch.manual_seed(0)
    model, shape = attached(kind, spec, mode)
    if started:
        adapter = model[0].adapter("default")
        before = {name: core.detach().clone() for name, core in adapter.trained.items()}
        fill(adapter, 0)
        with torch.no_grad():
            for name, core in adapter.trained.items():
                core.copy_(before[name] + 0.1 * (core - before[name]))
    return model, torch.randn(shape)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Those of the sum of all squared outputs, of the model's trained parameters and of the input."""
    leaf = x.detach().clone().requires_grad_()
    wanted = {**trained(model), "input": leaf}
    loss = run(leaf).square().sum()
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


def eager_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return gradients(model, model, x)


def error(seen: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value expected (to 1, if that is smaller)."""
    if seen.shape != expected.shape:
        return float("inf")
    seen, expected = seen.detach(), expected.detach()
    return float((seen - expected).abs().max()) / max(1.0, float(expected.abs().max()))


def worst(seen: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    return max(error(seen[name], expected[name]) for name in expected)


def more(x: Tensor) -> Tensor:
    """An input of another batch size."""
    return torch.cat((x, x + 1))


def traced(model: nn.Module, x: Tensor) -> float:
    """The error of a trace, on another batch size too, and of its gradients."""
    trace = torch.jit.trace(model, x, check_trace=False)
    with torch.no_grad():
        bare = torch.jit.trace(model, x, check_trace=False)
    outputs = [error(run(y), model(y)) for run in (trace, bare) for y in (x, more(x))]
    return max(*outputs, worst(gradients(model, trace, x), eager_gradients(model, x)))


def exported_to_onnx(model: nn.Module, x: Tensor) -> float:
    """The error of the exporter that rests on `torch.jit.trace`."""
    file = io.BytesIO()
    names: dict[str, Any] = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(model, (x,), file, dynamo=False, **names)  # type: ignore[arg-type]
    return max(error(_run_onnx(file.getvalue(), y), model(y)) for y in (x, more(x)))


def exported_by_dynamo(model: nn.Module, x: Tensor) -> float:
    """The error of the exporter that rests on `torch.export`."""
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    return error(_run_onnx(program.model_proto.SerializeToString(), x), model(x))


def _run_onnx(file: bytes, x: Tensor) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(output)


def per_sample(model: nn.Module, x: Tensor) -> float:
    """The error of the sum of all samples' gradients, by `vmap(grad(functional_call))`."""

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, values, (sample[None],)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))({name: value.detach() for name, value in trained(model).items()}, x)
    expected = eager_gradients(model, x)
    return worst({name: one.sum(0) for name, one in each.items()}, {name: expected[name] for name in each})


def _outputs(model: nn.Module, x: Tensor) -> tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor]]:
    """The model's outputs as a function of what it trains, and that."""
    values = {name: value.detach() for name, value in trained(model).items()}
    return lambda values: functional_call(model, values, (x,)), values


def pushed_forward(model: nn.Module, x: Tensor) -> float:
    """The error of `jvp`: of the output, and of the loss's slope along a direction."""
    run, values = _outputs(model, x)
    direction = {name: torch.randn_like(value) for name, value in values.items()}
    output, along = jvp(run, (values,), (direction,))
    expected = eager_gradients(model, x)
    # Relative to what is added up, of which little may be left.
    parts = torch.cat([(expected[name] * direction[name]).flatten() for name in values])
    slope = float((2 * output * along).sum().detach() - parts.sum()) / max(1.0, float(parts.abs().sum()))
    return max(error(output, model(x)), abs(slope))


def jacobian(model: nn.Module, x: Tensor) -> float:
    """The error of the loss's gradient, from the Jacobian of `jacrev`."""
    run, values = _outputs(model, x)
    output, expected = model(x).detach(), eager_gradients(model, x)
    found = {name: torch.tensordot(2 * output, one, dims=output.dim()) for name, one in jacrev(run)(values).items()}
    return worst(found, {name: expected[name] for name in values})


def exported(model: nn.Module, x: Tensor) -> float:
    """The error of `torch.export`, for a fixed and for a varying batch."""
    fixed = torch.export.export(model, (x,))
    varying = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    runs = ((fixed, x), (varying, x), (varying, more(x)))
    return max(error(program.module()(y), model(y)) for program, y in runs)


def scripted(model: nn.Module, x: Tensor) -> float:
    """The error of `torch.jit.script` after `tnpeft.merge`, written and read again."""
    with torch.no_grad():
        attached = model(x)
        tnpeft.merge(model)
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(model), file)
        file.seek(0)
        return error(torch.jit.load(file)(x), attached)  # type: ignore[no-untyped-call]


def compiled(model: nn.Module, x: Tensor, backend: str = "aot_eager") -> float:
    """The error of `torch.compile` as one graph, on another batch size too, and of its gradients."""
    torch.compiler.reset()
    run = torch.compile(model, backend=backend, fullgraph=True)
    outputs = [error(run(y), model(y)) for y in (x, more(x))]
    return max(*outputs, worst(gradients(model, run, x), eager_gradients(model, x)))


OBSERVERS: Mapping[str, Callable[[nn.Module, Tensor], float]] = {
    "trace": traced,
    "onnx": exported_to_onnx,
    "per-sample": per_sample,
    "jvp": pushed_forward,
    "jacrev": jacobian,
    "export": exported,
    "script": scripted,
    "compile": compiled,
    "inductor": lambda model, x: compiled(model, x, "inductor"),
    "onnx-dynamo": exported_by_dynamo,
}
ONE_KIND, NAMED = ("export", "script", "compile"), ("inductor", "onnx-dynamo")


def cases(specs: list[str], observers: list[str]) -> Iterator[tuple[str, str, str, str]]:
    """Spec, kind of layer, mode and observer: the quick ones of all kinds first."""
    every = [name for name in observers if name not in (*ONE_KIND, *NAMED)]
    kinds = {spec: [kind for kind in KINDS if kind in tnpeft.load_spec(spec).layers] for spec in specs}
    for spec in specs:
        for kind, mode, observer in itertools.product(kinds[spec], MODES, every):
            yield spec, kind, mode, observer
    for observer in (name for name in NAMED if name in observers):
        for kind, spec, mode in PAIRS:
            yield spec, kind, mode, observer
    for place, spec in enumerate(specs):
        for mode, observer in itertools.product(MODES, (name for name in ONE_KIND if name in observers)):
            yield spec, kinds[spec][place % len(kinds[spec])], mode, observer  # a kind after the other


def measure(spec: str, kind: str, mode: str, observer: str) -> float | str:
    """The error, or why there is none."""
    try:
        model, x = subject(kind, spec, mode)
        return float(f"{OBSERVERS[observer](model, x):.1e}")
    except tnpeft.TnpeftError as refusal:
        return str(refusal)
    except Exception as failure:  # noqa: BLE001 - what it is stands in the table
        return f"{FAILED}{type(failure).__name__}: {failure}"[:500]


def main() -> None:
    options = common.parser(__doc__, "observers.json")
    options.add_argument("--specs", nargs="+", default=list(tnpeft.list_specs()), help="shipped specs (default: all)")
    options.add_argument("--observers", nargs="+", default=list(OBSERVERS), choices=list(OBSERVERS))
    options.add_argument("--again", action="store_true", help="measure rows again that failed or are too far off")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # torch says of each of its own exporters that another one is better
    logging.disable(logging.WARNING)
    known = _known(arguments.out, arguments.again)
    written = time.monotonic()
    for case in cases(arguments.specs, arguments.observers):
        if case in known:
            continue
        known[case] = measure(*case)
        if not _is_right(known[case]):
            print(*case, known[case], flush=True)
        if time.monotonic() - written > 5:
            write(arguments.out, known)
            written = time.monotonic()
    write(arguments.out, known)
    show(known)


Known = dict[tuple[str, str, str, str], float | str]


def _known(out: Path, again: bool) -> Known:
    rows = json.loads(out.read_text())["results"] if out.exists() else []
    known: Known = {}
    for row in rows:
        case = row.pop("spec"), row.pop("kind"), row.pop("mode")
        known.update({(*case, observer): found for observer, found in row.items() if not again or _is_right(found)})
    return known


def write(out: Path, known: Known) -> None:
    """One line for each adapted layer, as a whole or not at all."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for (spec, kind, mode, observer), found in known.items():
        rows.setdefault((spec, kind, mode), {"spec": spec, "kind": kind, "mode": mode})[observer] = found
    lines = ",\n".join(json.dumps(row) for row in rows.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    half = out.with_suffix(".part")
    half.write_text(f'{{"environment": {json.dumps(common.environment())},\n"results": [\n{lines}\n]}}\n')
    half.replace(out)


def _is_right(found: float | str) -> bool:
    return not found.startswith(FAILED) if isinstance(found, str) else found <= TOLERANCE


def show(known: Known) -> None:
    """For each observer: how many rows, how large the errors."""
    cells = []
    for observer in OBSERVERS:
        own = [found for (*_, name), found in known.items() if name == observer]
        errors = sorted(found for found in own if not isinstance(found, str))
        failed = sum(isinstance(found, str) and found.startswith(FAILED) for found in own)
        off = sum(one > TOLERANCE for one in errors)
        middle, largest = (f"{errors[place]:.1e}" if errors else "" for place in (len(errors) // 2, -1))
        refused = len(own) - len(errors) - failed
        cells.append([observer, *map(str, (len(own), refused, failed, off)), middle, largest])
    columns = ["observer", "rows", "refused", "failed", "off by more than 1e-5", "median error", "largest"]
    common.show("Outputs and gradients against the eager layer", columns, cells)


if __name__ == "__main__":
    main()
