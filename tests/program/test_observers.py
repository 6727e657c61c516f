"""Whoever looks on at an adapted model sees what it computes: tracers, exporters, compilers and `torch.func`."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from observers import (
    compiled,
    eager_gradients,
    error,
    gradients,
    jacobian,
    per_sample,
    pushed_forward,
    subject,
    traced,
    trained,
    worst,
)
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import tnpeft
from tnpeft.errors import ExecutionError
from tnpeft.execution.dispatch import needs_plain_ops

# torch itself would rather be compiled or exported.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
]

MODES = ("auto", "dense", "factored", "hybrid")
SAMPLE = [
    ("Linear", "lora"),
    ("Linear", "dora"),
    ("Linear", "tt_lora"),
    ("Linear", "quanta"),
    ("Conv1d", "loha"),
    ("Conv2d", "lokr"),
    ("Conv2d", "dora"),
    ("Conv3d", "tenvoo_l"),
    ("ConvTranspose2d", "lora"),
    ("ConvTranspose3d", "glora"),
]
# Each pair in the mode that has a plain path of its own, and in one of the others; benchmarks/observers.py has all.
CASES = [
    (*pair, mode) for place, pair in enumerate(SAMPLE) for mode in ("factored", ("auto", "dense", "hybrid")[place % 3])
]


@pytest.mark.parametrize("started", [False, True], ids=["start", "later"])
@pytest.mark.parametrize(("kind", "spec", "mode"), CASES)
def test_a_trace_computes_what_the_model_computes(kind, spec, mode, started):
    model, x = subject(kind, spec, mode, started)
    assert traced(model, x) < 1e-5


def test_a_trace_of_an_untouched_adapter_is_the_base():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(4, 8)
    base = model(x)
    tnpeft.attach(model, "lora", match="0", r=2)
    assert torch.equal(torch.jit.trace(model, x, check_trace=False)(x), base)


@pytest.mark.parametrize(("kind", "spec", "mode"), CASES)
def test_per_sample_gradients_and_jacobians_are_those_of_backward(kind, spec, mode):
    model, x = subject(kind, spec, mode)
    assert per_sample(model, x) < 1e-5
    assert pushed_forward(model, x) < 1e-5
    assert jacobian(model, x) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "spec", "mode"), CASES[::5])
def test_a_compiled_model_computes_and_trains_alike(kind, spec, mode):
    model, x = subject(kind, spec, mode)
    assert compiled(model, x) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "start", "mode"),
    [
        ("Linear", "lora", "factored"),
        ("Linear", "frozen", "hybrid"),
        ("Conv3d", "lora", "hybrid"),
        ("Conv3d", "frozen", "factored"),
    ],
)
def test_a_compiled_model_starts_as_its_base_in_every_mode(kind, start, mode):
    spec = start if start == "lora" else {"Linear": "quanta", "Conv3d": "tenvoo_l"}[kind]
    torch.compiler.reset()
    model, x = subject(kind, spec, mode, started=False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with tnpeft.disabled(model):
        base = compiled(x)
    assert torch.equal(compiled(x), base)


def test_a_compiled_graph_runs_factored_where_that_is_quicker():
    """LoRA on a large linear layer: its graph has no product of the weight's size but that with the base weight."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(512, 512)), torch.randn(64, 512)
    tnpeft.attach(model, "lora", match="0", r=4)
    sizes: list[list[int]] = []

    def look(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        products = [node for node in graph.graph.nodes if node.target in (torch.mm, torch.bmm)]
        sizes.append([node.meta["example_value"].numel() for node in products])
        return graph

    torch.compile(model, backend=look, fullgraph=True)(x)
    assert sizes == [[64 * 4, 64 * 512]]
    # A graph for any number of rows is dense.
    torch.compile(model, backend=look, fullgraph=True, dynamic=True)(torch.randn(32, 512))
    assert sizes[1:] == [[512 * 512]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "spec", "mode", "varies", "strict"),
    [
        ("Linear", "lora", "factored", False, True),
        ("Linear", "lora", "factored", True, False),
        ("Linear", "quanta", "auto", True, True),
        ("Conv2d", "dora", "dense", True, False),
        ("Conv3d", "tenvoo_l", "factored", False, False),
        ("ConvTranspose2d", "lora", "hybrid", True, True),
    ],
)
def test_an_exported_model_computes_what_the_model_computes(kind, spec, mode, varies, strict):
    model, x = subject(kind, spec, mode)
    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},) if varies else None
    program = torch.export.export(model, (x,), dynamic_shapes=sizes, strict=strict)
    assert error(program.module()(x), model(x)) < 1e-5
    assert error(program.run_decompositions().module()(x), model(x)) < 1e-5
    if varies:
        more = torch.cat((x, x + 1))
        assert error(program.module()(more), model(more)) < 1e-5


@pytest.mark.parametrize(("kind", "spec", "mode"), CASES)
def test_an_fx_graph_has_the_layer_as_one_node_and_trains_it(kind, spec, mode):
    model, x = subject(kind, spec, mode)
    graph = torch.fx.symbolic_trace(model)
    assert [(node.op, node.target) for node in graph.graph.nodes] == [
        ("placeholder", "input"),
        ("call_module", "0"),
        ("output", "output"),
    ]
    assert torch.equal(graph(x), model(x))
    assert worst(gradients(model, graph, x), eager_gradients(model, x)) == 0


@pytest.mark.parametrize(("tracing", "pre_dispatch"), [("real", False), ("fake", True), ("symbolic", False)])
@pytest.mark.parametrize("mode", ["factored", "dense"])
def test_make_fx_records_operations_that_fit_any_size(mode, tracing, pre_dispatch):
    model, x = subject("Conv2d", "lokr", mode)
    graph = make_fx(model, tracing_mode=tracing, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True)(x)
    for inputs in (x, torch.cat((x, x + 1))):
        assert error(graph(inputs), model(inputs)) < 1e-5


@pytest.mark.parametrize(("kind", "spec", "mode"), CASES)
def test_batched_backward_passes_are_those_one_by_one(kind, spec, mode):
    model, x = subject(kind, spec, mode)
    output, wanted = model(x), list(trained(model).values())
    directions = torch.randn(3, *output.shape)
    batched = torch.autograd.grad(output, wanted, directions, is_grads_batched=True, retain_graph=True)
    for place, direction in enumerate(directions):
        single = torch.autograd.grad(output, wanted, direction, retain_graph=True)
        assert max(error(many[place], one) for many, one in zip(batched, single, strict=True)) < 1e-5


@pytest.mark.parametrize(("kind", "spec", "mode"), CASES)
def test_forward_mode_and_hessians_follow_each_operation(kind, spec, mode):
    model, x = subject(kind, spec, mode)
    values = {name: value.detach() for name, value in trained(model).items()}
    direction = torch.randn_like(x)
    with forward_ad.dual_level():
        output = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction)))
    leaf = x.clone().requires_grad_()
    upstream = torch.randn_like(output.primal)
    (expected,) = torch.autograd.grad(model(leaf), leaf, upstream)
    assert error((output.tangent * upstream).sum(), (expected * direction).sum()) < 1e-5

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, values, (x,)).square().sum()

    # Along one direction, forward over reverse: second derivatives, which autograd's own way has for dense layers.
    step = {name: torch.randn_like(value) for name, value in values.items()}
    _, seen = torch.func.jvp(torch.func.grad(loss), (values,), (step,))
    dense, _ = subject(kind, spec, "dense")
    wanted = trained(dense)
    first = torch.autograd.grad(dense(x).square().sum(), list(wanted.values()), create_graph=True)
    slope = sum((one * step[name]).sum() for one, name in zip(first, wanted, strict=True))
    second = torch.autograd.grad(slope, list(wanted.values()))
    assert max(error(seen[name], one) for name, one in zip(wanted, second, strict=True)) < 1e-4


SCRIPTED = [
    (nn.Linear(6, 8), (3, 6)),
    (nn.Conv1d(4, 6, 4, padding="same", bias=False), (2, 4, 9)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", stride=2), (2, 4, 9, 8)),
    (nn.Conv2d(4, 6, 3, padding="valid", groups=2), (4, 9, 8)),
    (nn.Conv3d(4, 6, 3, padding=1), (2, 4, 5, 5, 5)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5)),
    (nn.ConvTranspose3d(4, 6, 2, stride=2, groups=2), (4, 3, 3, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), SCRIPTED, ids=lambda case: str(case)[:60])
def test_a_merged_model_is_scripted_and_stays_what_it_is(layer, shape):
    model, x = nn.Sequential(copy.deepcopy(layer)).eval(), torch.randn(shape)
    tnpeft.attach(model, "lora", match="0", r=2, train={"bias": "adapted"} if layer.bias is not None else None)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    before = model(x)
    tnpeft.merge(model)
    script = torch.jit.script(model)
    assert torch.equal(script(x), model(x))
    file = io.BytesIO()
    torch.jit.save(script, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert torch.equal(loaded(x), model(x))
    assert set(loaded.state_dict()) == {"0.weight", *(["0.bias"] if layer.bias is not None else [])}
    tnpeft.unmerge(model)
    assert torch.equal(model(x), before)


class Sized(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, [10, 9])


def test_a_scripted_transposed_convolution_takes_an_output_size():
    model, x = Sized(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1)).eval(), torch.randn(2, 4, 5, 5)
    tnpeft.attach(model, "lora", match="layer", r=2)
    tnpeft.merge(model)
    assert torch.equal(torch.jit.script(model)(x), model(x))


def test_a_model_that_is_not_merged_is_not_scripted():
    model, x = subject("Conv3d", "tenvoo_l", "auto")
    with pytest.raises(ExecutionError) as excinfo:
        torch.jit.script(model)
    assert str(excinfo.value) == (
        "layer '0': torch.jit.script: expected a merged adapter, found an adapter that is not merged. Call "
        "`tnpeft.merge(model)` first, or use `torch.jit.trace`."
    )
    tnpeft.merge(model)
    with tnpeft.disabled(model), pytest.raises(ExecutionError) as excinfo:
        torch.jit.script(model)
    assert str(excinfo.value) == (
        "layer '0': torch.jit.script: expected a merged adapter, found adapters disabled by `tnpeft.disabled`. Leave "
        "the `disabled` context first."
    )
    assert error(torch.jit.script(model)(x), model(x)) == 0


def test_layers_of_one_pass_that_are_watched_contract_their_own():
    """What a pass has made for several layers at once is none of a tracer's that looks at a part of the model."""
    torch.manual_seed(0)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
            self.traces: list[torch.jit.ScriptModule] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layers[0](x)
            self.traces.append(torch.jit.trace(self.layers[1], x.detach(), check_trace=False))
            return self.layers[2](self.layers[1](x))

    for mode in MODES:
        model, x = Outer(), torch.randn(3, 6)
        tnpeft.attach(model, "lora", match="layers", r=2, mode=mode)
        with torch.no_grad():
            for parameter in trained(model).values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model(x)
        model(x)
        assert all(error(trace(x), model.layers[1](x)) < 1e-5 for trace in model.traces)


def test_counting_modes_see_what_runs_without_them():
    model, x = subject("Conv3d", "tenvoo_l", "factored")
    output = model(x)
    with FlopCounterMode(display=False):
        counted = model(x)
    assert torch.equal(output, counted)
    assert not needs_plain_ops(x)
    with torch.device("cpu"):
        assert not needs_plain_ops(x)
    assert needs_plain_ops(x.to("meta"))
