"""Adapted models under torch's own machinery: copies, pickles, compilers, DDP, checkpointing, attention, meta."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from pathlib import Path

import pytest
import torch
from small import TARGETS, Net, attach, bits, chain, net, net_input, same_bits, train
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import tnpeft
from tnpeft.execution import AdaptedLayer, compile
from tnpeft.network import load_spec
from tnpeft.surgery import (
    activate,
    adapters_of,
    detach,
    disabled,
    install,
    merge,
    names_of,
    plain_parameters,
    trained_of,
    unmerge,
)

X = net_input()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def backward(model: nn.Module, x: torch.Tensor = X) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (model(x) - 1).square().mean().backward()
    return gradients(model)


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, msg=name)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "trip", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_and_pickles_stand_on_their_own(trip, merged):
    model = net()
    base = model(X)
    attach(model, name="a")
    train(model, X)
    attach(model, name="b", trained=("norm.bias",))
    train(model, X)
    only_b = model(X)
    if merged:
        merge(model)
    other = trip(model)
    train(model, X) if not merged else None
    assert torch.equal(other(X), only_b)
    assert names_of(other) == ("a", "b")
    unmerge(other)
    unmerge(model)
    with disabled(other):
        assert torch.equal(other(X), base)
    activate(other, "a")
    activate(model, "a")
    assert torch.equal(other(X), model(X))
    train(other, X)
    assert not torch.equal(other(X), model(X))
    detach(other)
    assert torch.equal(other(X), base)
    assert same_bits(bits(other), bits(net()))


def test_a_copy_keeps_optimisers_apart_and_the_optimiser_keeps_its_parameters():
    model = net()
    attach(model)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], 1e-2)
    frozen = copy.deepcopy(model)
    before = frozen(X)
    for turn in range(4):
        with disabled(model):
            assert torch.equal(model(X), net()(X))
        merge(model)
        unmerge(model)
        model.to("cpu")
        optimizer.zero_grad()
        (model(X) - 1).square().mean().backward()
        optimizer.step()
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
            id(p) for p in model.parameters() if p.requires_grad
        }, turn
    assert torch.equal(frozen(X), before)
    assert not torch.equal(model(X), before)


def _in_a_worker(data: bytes, queue: multiprocessing.SimpleQueue) -> None:
    torch.set_num_threads(1)
    model = pickle.loads(data)
    stream = io.BytesIO()
    torch.save({"output": model(X).detach(), "loss": train(model, X)}, stream)
    queue.put(stream.getvalue())


@pytest.mark.slow
def test_a_spawned_worker_gets_a_working_model():
    model = net()
    attach(model, load_spec("lora"))
    train(model, X)
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    worker = context.Process(target=_in_a_worker, args=(pickle.dumps(model), queue))
    worker.start()
    found = torch.load(io.BytesIO(queue.get()), weights_only=True)
    worker.join()
    assert torch.equal(found["output"], model(X))
    assert found["loss"] == train(model, X)


def _ddp_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = net()
    attach(model)
    train(model, net_input(), rate=0.5)
    wrapped = DistributedDataParallel(model)
    for _ in range(2):  # the second round tells whether the first left the reducer in order
        wrapped.zero_grad()
        (wrapped(net_input(seed=rank)) - 1).square().mean().backward()
    if rank == 0:
        merge(wrapped)
        unmerge(wrapped)
        torch.save({"gradients": gradients(model), "names": names_of(wrapped)}, f"{folder}/rank0.pt")
    torch.distributed.barrier()  # who ends while the other still works may abort in gloo's threads
    del wrapped
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ddp_processes_make_the_gradient_of_one(tmp_path: Path):
    torch.multiprocessing.spawn(_ddp_worker, (str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / "rank0.pt", weights_only=True)
    model = net()
    attach(model)
    train(model, net_input(), rate=0.5)
    halves = [{name: grad.clone() for name, grad in backward(model, net_input(seed=rank)).items()} for rank in (0, 1)]
    assert_same({name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}, found["gradients"])
    assert found["names"] == ("default",)


@pytest.mark.slow
@pytest.mark.parametrize(("start", "warm"), [("frozen_copy", False), ("frozen_copy", True), ("zero", False)])
def test_an_adapted_model_compiles_as_one_graph(start, warm):
    torch.compiler.reset()
    model = net()
    base = model(X)
    attach(model, chain(start))
    if warm:
        model(X)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), base)
    train(model, X)
    torch.testing.assert_close(compiled(X), model(X))
    expected = {name: grad.clone() for name, grad in backward(model).items()}
    model.zero_grad()
    (compiled(X) - 1).square().mean().backward()
    assert_same(expected, gradients(model))
    if warm:
        return
    for act in (merge, unmerge):
        act(model)
        torch.testing.assert_close(compiled(X), model(X))
    with disabled(model):
        torch.testing.assert_close(compiled(X), base)


@pytest.mark.slow
def test_exact_start_and_base_agree_when_both_are_compiled():
    torch.compiler.reset()
    model = net()
    base = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)(X)
    attach(model)
    assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(X), base)


@pytest.mark.slow
@pytest.mark.skipif(" " in torch.__file__, reason="inductor does not quote torch's own folder when it links")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_inductor_agrees_with_eager():
    torch.compiler.reset()
    model = nn.Sequential(nn.Conv1d(2, 4, 3))
    x = torch.randn(1, 2, 6)
    attach(model, targets=("0",), trained=("0.bias",))
    train(model, x)
    expected = {name: grad.clone() for name, grad in backward(model, x).items()}
    compiled = torch.compile(model, fullgraph=True)
    model.zero_grad()
    output = compiled(x)
    torch.testing.assert_close(output, model(x))
    (output - 1).square().mean().backward()
    assert_same(expected, gradients(model))


@pytest.mark.parametrize("spec", [chain(), load_spec("lora")], ids=["frozen copy", "zero"])
def test_activation_checkpointing_gives_the_same_gradients(spec):
    class Checkpointed(Net):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    model = net()
    attach(model, spec)
    train(model, X)
    other = Checkpointed().eval()
    other.load_state_dict(net().state_dict())
    attach(other, spec)
    other.load_state_dict(model.state_dict())
    assert_same(backward(model), backward(other))


def test_attention_reads_the_effective_output_projection():
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True)}).eval()
    model.attention.register_forward_hook(lambda module, args, output: output[0])
    x = torch.randn(2, 5, 8)

    def run() -> torch.Tensor:
        return model.attention(x, x, x, need_weights=False)

    with torch.no_grad():
        base = run()
    install(model, "a", {"attention.out_proj": compile(chain(), model.attention.out_proj)}, ["attention.out_proj.bias"])
    with torch.no_grad():
        assert torch.equal(run(), base)
    (run() - 1).square().mean().backward()
    projection = model.attention.out_proj
    assert all(parameter.grad.abs().sum() > 0 for parameter in projection.parameters() if parameter.requires_grad)
    with torch.no_grad():
        for parameter in projection.parameters():
            parameter.add_(0.1) if parameter.requires_grad else None
    with torch.no_grad():
        trained, weight = run(), projection.weight
        detach(model, merge=True)
        assert torch.equal(model.attention.out_proj.weight, weight)
        assert torch.equal(run(), trained)


def test_a_model_whose_cores_have_four_axes_takes_another_memory_format():
    """Of a plain model torch converts the tensors of four and five axes, and no format fits both."""
    model = net()
    tnpeft.attach(model, "tenvoo_l", match=["first", "wide"], r=2)
    train(model, X)
    cores = dict(tnpeft.Handle(model, "default").named_parameters())
    assert any(core.ndim == 4 for core in cores.values())
    values = {name: core.detach().clone() for name, core in cores.items()}
    expected = model(X)
    model.to(memory_format=torch.channels_last_3d)
    assert model.first.base.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert all(core.is_contiguous() and torch.equal(core, values[name]) for name, core in cores.items())
    torch.testing.assert_close(model(X.to(memory_format=torch.channels_last_3d)), expected)
    model.double()
    assert all(core.dtype == torch.float64 and core.shape == values[name].shape for name, core in cores.items())
    torch.testing.assert_close(model(X.double()), expected.double(), rtol=1e-4, atol=1e-5)


def test_channels_last_models_start_exactly_too():
    model = net().to(memory_format=torch.channels_last_3d)
    x = X.to(memory_format=torch.channels_last_3d)
    base = model(x)
    attach(model)
    assert torch.equal(model(x), base)
    train(model, x)
    trained = model(x)
    model.to(memory_format=torch.contiguous_format).to(memory_format=torch.channels_last_3d)
    assert torch.equal(model(x), trained)
    for adapter in adapters_of(model, "default").values():
        assert all(tensor.is_contiguous() for tensor in adapter.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_attached_model_starts_exactly_under_autocast_and_after_casts(dtype):
    model = net()
    attach(model)
    plain = net()
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(model(X), plain(X))
    assert torch.equal(model.to(dtype)(X.to(dtype)), plain.to(dtype)(X.to(dtype)))
    assert all(
        tensor.dtype == torch.float32 for a in adapters_of(model, "default").values() for tensor in a.parameters()
    )


def test_a_model_on_meta_is_attached_to_and_gets_its_values_later():
    source = net()
    attach(source)
    train(source, X)
    with torch.device("meta"):
        model = Net()
    model.eval()
    attach(model)
    assert model(X.to("meta")).shape == (2, 3)
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(model(X), source(X))
    with disabled(model):
        assert torch.equal(model(X), net()(X))
    with torch.device("meta"):
        assigned = Net()
    attach(assigned)
    assigned.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(assigned.eval()(X), source(X))
    narrow = {name: tensor.bfloat16() for name, tensor in source.state_dict().items()}
    assigned.load_state_dict(narrow, assign=True)
    assert all(tensor.dtype == torch.float32 for tensor in assigned.up.adapter("default").state_dict().values())


def test_functional_calls_see_the_parameters_they_are_given():
    model = net()
    attach(model)
    other = copy.deepcopy(model)
    train(other, X)
    values = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    assert torch.equal(torch.func.functional_call(model, values, (X,)), other(X))
    shifted = {name: value + 1 if ".start_" in name else value for name, value in values.items()}
    assert not torch.equal(torch.func.functional_call(model, shifted, (X,)), other(X))
    assert torch.equal(model(X), net()(X))


def test_a_moved_model_keeps_its_adapters_and_its_way_back():
    model = net()
    attach(model)
    train(model, X)
    model.double()
    x = X.double()
    expected = model(x)
    merge(model)
    assert torch.equal(model(x), expected)
    model.to(torch.bfloat16)
    merged = model(X.bfloat16())
    unmerge(model)
    assert torch.equal(model(X.bfloat16()), merged)
    detach(model)
    plain = net().double().bfloat16()
    assert same_bits(bits(model), bits(plain))
    assert all(isinstance(parameter, nn.Parameter) and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("active", [{}, {"a": 0.5}, {"b": 1.0}, {"a": 0.5, "b": 0.5}, {"a": 1.0}], ids=str)
def test_moving_a_model_keeps_every_parameter_the_object_it_is(active):
    model = net()
    model.wide.bias = model.norm.bias
    base = dict(model.named_parameters())
    attach(model, name="a")
    copies = trained_of(model, "a")
    optimizer = torch.optim.SGD(list(copies.values()), 0.1)
    attach(model, name="b", trained=("first.bias", "norm.weight"))
    activate(model, active)
    model.double()
    assert all(copy.dtype == torch.float64 for copy in copies.values())
    activate(model, "a")
    assert all(plain_parameters(model)[name] is copy and copy.requires_grad for name, copy in copies.items())
    assert model.wide.bias is model.norm.bias
    beside = {name: p.requires_grad for name, p in model.named_parameters() if "_tnpeft_" in name}
    assert beside
    assert all(trains is ("_of_a:" in name) for name, trains in beside.items())
    before = model(X.double())
    (before - 1).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model(X.double()), before)
    detach(model)
    after = dict(model.named_parameters())
    assert list(after) == list(base)
    assert all(after[name] is parameter and parameter.requires_grad for name, parameter in base.items())


def test_loading_a_state_dict_into_a_merged_model_merges_again():
    model, other = net(), net()
    attach(model)
    attach(other)
    train(other, X)
    merge(model)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(X), other(X))
    unmerge(model)
    assert torch.equal(model(X), other(X))


def test_a_state_dict_holds_the_whole_adapted_model():
    model = net()
    attach(model, name="a")
    train(model, X)
    attach(model, name="b")
    train(model, X)
    fresh = Net().eval()
    attach(fresh, name="a")
    attach(fresh, name="b")
    fresh.load_state_dict(model.state_dict())
    for scales in ({"a": 1.0}, {"b": 1.0}, {"a": 0.5, "b": 2.0}, {}):
        activate(model, scales)
        activate(fresh, scales)
        assert torch.equal(model(X), fresh(X))


def test_a_graph_built_before_disabled_still_trains():
    model = net()
    attach(model)
    loss = (model(X) - 1).square().mean()
    with disabled(model), torch.no_grad():
        model(X)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_hooks_of_adapted_layers_outlive_the_adapter():
    model = net()
    calls: list[str] = []
    model.wide.register_forward_hook(lambda module, args, output: calls.append(type(module).__name__))
    attach(model)
    assert copy.deepcopy(model.wide)._forward_hooks.keys() == model.wide._forward_hooks.keys()
    copied = copy.deepcopy(model).wide
    assert copied._forward_hooks is copied.base._forward_hooks
    model(X)
    assert isinstance(model.wide, AdaptedLayer)
    detach(model)
    model(X)
    assert calls == ["AdaptedConv", "Conv3d"]


def test_every_target_of_the_net_has_another_wrapper_than_its_neighbour_needs():
    model = net()
    attach(model)
    kinds = [type(dict(model.named_modules())[name]).__name__ for name in TARGETS]
    assert kinds == ["AdaptedConv", "AdaptedConv", "AdaptedConvTranspose", "AdaptedLinear"]
