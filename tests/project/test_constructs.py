"""Sums, shared cores, cores of the base weight and DoRA on real layers, against formulas written a second time."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saved import metadata, refused
from small import layers, move, net, net_input, runs, same_bits, sample_input, train
from torch import Tensor, nn

import tnpeft
from tnpeft.execution import wrap

# What torch says of some layers the strategy draws.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

HEAD = "tnpeft: 1\nname: {}\nlayers: any\nparams: {{r: 2}}\nsizes: {{o: out_channels, i: in_channels{}}}\n"
SPECS = {
    "hira": HEAD.format("hira", "")
    + """\
cores: {w: {legs: o i k..., from: weight}, up: {legs: o r, init: zeros}, down: r i k...}
weight: o i k...
start: zero
""",
    "hira_copied": HEAD.format("hira_copied", "")
    + """\
cores: {w: {legs: o i k..., from: weight}, up: o r, down: r i k...}
weight: o i k...
start: frozen_copy
""",
    "glora": HEAD.format("glora", ", j: in_channels, s: r")
    + """\
cores:
  w: {legs: o j k..., from: weight}
  a: j r
  b: {legs: r i, init: zeros}
  c: {legs: o s, init: zeros}
  d: s i k...
terms:
  - {cores: [w, a, b], weight: o i k...}
  - {cores: [c, d], weight: o i k..., scale: -1 / 2}
scale: 3
start: zero
""",
    "dora": HEAD.format("dora", "")
    + """\
cores: {up: {legs: o r, init: zeros}, down: r i k...}
weight: o i k...
compose: dora
start: zero
""",
    "both": HEAD.format("both", "")
    + """\
cores: {gate: {legs: o, init: ones}, w: {legs: o i k..., from: weight}, up: o r, down: r i k...}
terms:
  - {cores: [gate, w], weight: o i k..., scale: 2}
  - {cores: [gate, up, down], weight: o i k...}
compose: dora
start: frozen_copy
""",
}


def canonical(layer: nn.Module, weight: Tensor) -> Tensor:
    """(out, in // groups, kernel as one axis), entry by entry: stored[g*a + i, o] = canonical[g*b + o, i]."""
    if not isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return weight.reshape(*weight.shape[:2], -1)
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    flat = weight.reshape(*weight.shape[:2], -1)
    rows = [flat[g * inputs : (g + 1) * inputs, o] for g in range(layer.groups) for o in range(outputs)]
    return torch.stack(rows)


def multilinear(name: str, cores: dict[str, Tensor], w: Tensor) -> Tensor:
    """scale * T of the canonical weight, written by hand."""
    core = {key: value.double() for key, value in cores.items()}
    flat = {key: value.reshape(*value.shape[:2], -1) for key, value in core.items() if value.ndim > 1}
    if name == "glora":
        base = torch.einsum("ojk,jr,ri->oik", w, core["a"], core["b"])
        return 3 * (base - 0.5 * torch.einsum("os,sik->oik", core["c"], flat["d"]))
    product = torch.einsum("or,rik->oik", core["up"], flat["down"])
    if name == "both":
        return core["gate"][:, None, None] * (2 * w + product)
    return product if name == "dora" else w * product


def update(name: str, adapter: tnpeft.Adapter, layer: nn.Module) -> Tensor:
    """The canonical update in float64."""
    w = canonical(layer, layer.weight.detach().double())
    delta = multilinear(name, adapter.cores, w)
    if adapter.network.start == "frozen_copy":
        delta = delta - multilinear(name, adapter.start, w)
    if adapter.magnitude is None:
        return delta
    whole = w + delta
    norm = whole.square().sum((1, 2), keepdim=True).sqrt()
    return adapter.magnitude.double()[:, None, None] * whole / norm - w


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SPECS)), layers(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_every_construct_is_its_formula_on_every_layer(name: str, layer: nn.Module, dtype: torch.dtype):
    layer = layer.to(dtype)
    x = sample_input(layer, dtype=dtype)
    before = runs(layer, x).detach()
    adapter = tnpeft.compile(tnpeft.Spec.from_yaml(SPECS[name]), layer, seed=3)
    wrapper = wrap(layer)
    wrapper.add_adapter("default", adapter)
    wrapper.act({"default": 1.0})
    assert adapter.delta_weight().count_nonzero() == 0
    assert torch.equal(wrapper(x), before)
    move(adapter)
    delta = adapter.delta_weight()
    expected = update(name, adapter, layer)
    largest = expected.abs().max() + canonical(layer, layer.weight.detach().double()).abs().max()
    assert delta.shape == layer.weight.shape
    assert (canonical(layer, delta.double()) - expected).abs().max() <= 2e-5 * largest
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad((canonical(layer, delta).double() * direction).sum(), list(adapter.parameters()))
    wanted = torch.autograd.grad((expected * direction).sum(), list(adapter.parameters()))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= 1e-4 * (1 + other.abs().max())


def test_magnitudes_start_as_the_norms_and_turn_the_weight():
    layer = nn.Conv2d(3, 4, 2)
    with torch.no_grad():
        layer.weight[1] = 0  # a channel without a direction
    adapter = tnpeft.compile(tnpeft.Spec.from_yaml(SPECS["dora"]), layer)
    assert torch.allclose(adapter.magnitude, layer.weight.flatten(1).norm(dim=1))
    assert adapter.network.num_parameters == sum(p.numel() for p in adapter.parameters()) == 4 * 2 + 2 * 3 * 4 + 4
    assert list(adapter.trained) == ["up", "down", "magnitude"]
    with torch.no_grad():
        adapter.magnitude[0] *= 3
    assert torch.allclose(adapter.delta_weight()[0], 2 * layer.weight[0], atol=1e-6)
    assert adapter.delta_weight()[1:].count_nonzero() == 0
    move(adapter, 0.01)
    assert bool(adapter.delta_weight().isfinite().all())


def test_a_small_step_of_a_magnitude_keeps_its_digits():
    layer = nn.Linear(64, 48)
    adapter = tnpeft.compile(tnpeft.Spec.from_yaml(SPECS["dora"]), layer)
    with torch.no_grad():
        adapter.cores["up"].normal_(std=1e-6)
    w, delta = layer.weight.detach().double(), adapter.cores["up"].double() @ adapter.cores["down"].double()
    whole = w + delta
    expected = w.norm(dim=1, keepdim=True) * whole / whole.norm(dim=1, keepdim=True) - w
    assert (adapter.delta_weight() - expected).norm() <= 1e-5 * expected.norm()


def test_the_base_weight_is_read_when_it_is_needed():
    """A core of the base weight follows the layer through casts, loading and copies, and is stored nowhere."""
    layer = nn.Linear(5, 4)
    model = nn.Sequential(layer)
    handle = tnpeft.attach(model, tnpeft.Spec.from_yaml(SPECS["hira_copied"]), match="0")
    move(model[0].adapter("default"))
    first = model[0].adapter("default").delta_weight()
    assert list(model[0].adapter("default").cores) == ["up", "down"]
    assert {name for name, _ in handle.named_parameters()} == {"0.up", "0.down"}
    other = copy.deepcopy(model)
    with torch.no_grad():
        model[0].base.weight.mul_(2)
    assert torch.allclose(model[0].adapter("default").delta_weight(), 2 * first, rtol=1e-5)
    assert torch.equal(other[0].adapter("default").delta_weight(), first)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other[0].adapter("default").delta_weight(), model[0].adapter("default").delta_weight())
    assert (
        pickle.loads(pickle.dumps(other))[0]
        .adapter("default")
        .delta_weight()
        .equal(model[0].adapter("default").delta_weight())
    )
    wide = other.double()[0].adapter("default").delta_weight()
    assert wide.dtype == torch.float64
    assert torch.allclose(wide.float(), 2 * first, rtol=1e-4)


SHARED = (
    HEAD.format("shared", ", s: r")
    + """cores:
  left:  {legs: o r, shared: model}
  mid:   {legs: r s, init: zeros}
  right: {legs: s i k..., shared: block}
  base:  {legs: s, init: normal(1), frozen: true, shared: model}
weight: o i k...
start: zero
"""
)


def blocks(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    rows = [nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 4)) for _ in range(3)]
    return nn.Sequential(*rows)


def shared(start: str = "zero", seed: int = 0, name: str = "default") -> tuple[nn.Sequential, tnpeft.Handle]:
    text = SHARED.replace("start: zero", f"start: {start}")
    if start == "frozen_copy":
        text = text.replace(", init: zeros", "")
    model = blocks(seed)
    spec = tnpeft.Spec.from_yaml(text)
    return model, tnpeft.attach(model, spec, match=r"^\d\.[02]$", scopes={"block": r"^(\d)\."}, name=name)


@pytest.mark.parametrize("start", ["zero", "frozen_copy"])
def test_shared_cores_are_one_tensor_that_trains_saves_and_counts_once(start: str, tmp_path):
    model, handle = shared(start)
    x = torch.randn(3, 4)
    before = blocks()(x)
    assert torch.equal(model(x), before)
    adapters = {name: layer.adapter("default") for name, layer in model.named_modules() if hasattr(layer, "adapter")}
    lefts = {id(adapter.cores["left"]) for adapter in adapters.values()}
    assert len(lefts) == 1  # every adapted layer has 6 outputs
    rights = {id(adapter.cores["right"]) for adapter in adapters.values()}
    assert len(rights) == 6  # 4 and 6 inputs, in each of three blocks
    own = 6 * 2 + 6 * (2 * 2) + 3 * (2 * 4 + 2 * 6)
    assert (
        sum(p.numel() for p in handle.parameters())
        == sum(p.numel() for p in model.parameters() if p.requires_grad)
        == own
    )
    report = handle.report()
    assert report.cores == report.trained == own
    assert [(row.core, row.shape, row.layers, row.trained) for row in report.shared][:2] == [
        ("left", (6, 2), 6, True),
        ("right", (2, 4), 1, True),
    ]
    assert "shared: shared.left (6 x 2) of '0.0' by 6 layers" in str(report)
    train(model, x)
    after = model(x)
    assert not torch.equal(after, before)
    file = tmp_path / "shared.safetensors"
    tnpeft.save(model, file)
    fresh = blocks()
    loaded = tnpeft.load(fresh, file, name="again")
    assert torch.equal(fresh(x), after)
    assert loaded.report().trained == own
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), after)
    assert sum(p.numel() for p in copied.parameters() if p.requires_grad) == own
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), after)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), after)
    tnpeft.merge(model)
    assert torch.equal(model(x), after)
    tnpeft.unmerge(model)
    tnpeft.detach(model)
    assert torch.equal(model(x), before)


def test_a_shared_gradient_is_the_sum_over_its_layers():
    model, _ = shared("frozen_copy")
    x = torch.randn(3, 4, dtype=torch.float64)
    model.double()
    train(model, x)
    weights = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "adapter"):
            weights[name] = layer.adapter("default").delta_weight()
    held = model.get_submodule("0.0").adapter("default").cores["left"]
    apart = [torch.autograd.grad(weight.square().sum(), held, retain_graph=True)[0] for weight in weights.values()]
    together = torch.autograd.grad(sum(weight.square().sum() for weight in weights.values()), held)[0]
    assert torch.allclose(together, sum(apart))
    assert all(bool(one.any()) for one in apart)


def test_adapters_of_two_names_share_nothing():
    model, first = shared(name="one")
    spec = tnpeft.Spec.from_yaml(SHARED)
    second = tnpeft.attach(model, spec, match=r"^\d\.[02]$", scopes={"block": r"^(\d)\."}, name="two")
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    # The same file gives the same bits, whatever the adapter is called.
    pairs = zip(first.named_parameters(), second.named_parameters(), strict=True)
    assert all(left == right and torch.equal(one, other) for (left, one), (right, other) in pairs)
    tnpeft.detach(model, name="one")
    assert torch.equal(model(torch.ones(1, 4)), blocks()(torch.ones(1, 4)))


def test_shared_cores_are_cast_and_moved_with_the_model():
    model, handle = shared()
    model.double()
    assert {p.dtype for p in handle.parameters()} == {torch.float64}
    assert model(torch.ones(2, 4, dtype=torch.float64)).dtype == torch.float64
    left = [layer.adapter("default").cores["left"] for layer in model.modules() if hasattr(layer, "adapter")]
    assert len({id(core) for core in left}) == 1
    model.bfloat16()
    assert model(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_shared_cores_of_a_model_that_gets_its_values_later():
    with torch.device("meta"):
        model = blocks()
    spec = tnpeft.Spec.from_yaml(SHARED)
    tnpeft.attach(model, spec, match=r"^\d\.[02]$", scopes={"block": r"^(\d)\."})
    model.to_empty(device="cpu")
    with pytest.raises(tnpeft.ExecutionError, match="memory without values"):
        model(torch.ones(1, 4))
    for layer in model.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    reference, _ = shared()
    for (name, one), (other_name, other) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert name == other_name
        assert ".core_" not in name or torch.equal(one, other)


@pytest.mark.parametrize(
    ("scopes", "message"),
    [
        (
            None,
            "scope 'block' of 'shared': expected a regular expression, found none. "
            "Pass `scopes={'block': r'layers\\.(\\d+)\\.'}`, say, or write it in the recipe.",
        ),
        (
            {"block": "x(.)"},
            "scope 'block' ('x(.)'): expected a match in the name of each layer, found none in '0.0', '0.2', '1.0' "
            "and 3 more. Widen the pattern, or match fewer layers.",
        ),
        (
            {"block": "^([01])"},
            "scope 'block' ('^([01])'): expected a match in the name of each layer, found none in '2.0', '2.2'. "
            "Widen the pattern, or match fewer layers.",
        ),
        (
            {"block": r"(\d)", "blok": r"(\d)"},
            "scope 'blok': expected one of block, found `blok`. Did you mean `block`?",
        ),
        (
            {"block": 3},
            "scope 'block': expected a regular expression, found 3. For example `r'layers\\.(\\d+)\\.'`.",
        ),
        (
            {"block": "("},
            "scope 'block', pattern '(': expected a regular expression, found missing ), unterminated subpattern "
            "at position 0. A dot of a module's name is written `\\.`.",
        ),
        (
            ["block"],
            "`scopes`: expected a mapping of scopes to regular expressions, found ['block']. "
            "For example `scopes={'block': r'layers\\.(\\d+)\\.'}`.",
        ),
    ],
)
def test_scopes_are_checked_before_anything_changes(scopes, message: str):
    model = blocks()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(tnpeft.TnpeftError) as caught:
        tnpeft.attach(model, tnpeft.Spec.from_yaml(SHARED), match=r"^\d\.[02]$", scopes=scopes)
    assert str(caught.value) == message
    assert same_bits(dict(model.state_dict()), before)


@pytest.mark.parametrize(("name", "found"), [("x", "scope 'x'"), (3, "scope 3")])
def test_a_scope_where_no_core_is_shared_is_named(name, found: str):
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(blocks(), "lora", match=r"^0\.0$", scopes={name: r"(\d)"})
    what = "`x`" if name == "x" else "3"
    assert str(caught.value) == (f"{found}: expected none: no core here is shared within one, found {what}. Remove it.")


def test_a_recipe_binds_scopes(tmp_path):
    (tmp_path / "shared.yaml").write_text(SHARED)
    recipe = tmp_path / "recipe.yaml"
    text = "tnpeft: 1\nname: mine\nadapters: [{spec: shared.yaml, match: '^.[.][02]$'}]\nscopes: {block: '^(.)'}\n"
    recipe.write_text(text)
    model = blocks()
    handle = tnpeft.attach(model, recipe)
    assert handle.report().trained == shared()[1].report().trained
    recipe.write_text(text.replace("block:", "blok:"))
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.load_recipe(recipe)
    assert str(caught.value) == (
        f"{recipe}:4:10: scope 'blok': expected one of block, found `blok`. Did you mean `block`?"
    )


def test_frozen_cores_are_left_out_of_the_file_unless_they_were_written_to(tmp_path):
    text = (
        HEAD.format("vera", "")
        + """cores: {b: {legs: o, init: zeros}, B: {legs: o r, frozen: true}, A: {legs: r i k..., frozen: true}}
weight: o i k...
start: zero
"""
    )
    model, file = net(), tmp_path / "vera.safetensors"
    tnpeft.attach(model, tnpeft.Spec.from_yaml(text), match="^(first|up)$", seed=7)
    train(model, net_input())
    with torch.no_grad():
        model.up.adapter("default").cores["A"][0] += 1
    after = model(net_input())
    tnpeft.save(model, file)
    layers_of = metadata(file)["layers"]
    assert {name: sorted(entry["drawn"]) for name, entry in layers_of.items()} == {"first": ["A", "B"], "up": ["B"]}
    fresh = net()
    tnpeft.load(fresh, file)
    assert torch.equal(fresh(net_input()), after)
    assert torch.equal(fresh.first.adapter("default").cores["A"], model.first.adapter("default").cores["A"])


def test_a_frozen_core_that_the_seed_gives_otherwise_is_refused(tmp_path, monkeypatch: pytest.MonkeyPatch):
    text = (
        HEAD.format("vera", "").replace("params: {r: 2}\n", "")
        + """cores: {b: {legs: o, init: zeros}, A: {legs: i k..., init: normal(1), frozen: true}}
weight: o i k...
start: zero
"""
    )
    model, file = net(), tmp_path / "vera.safetensors"
    tnpeft.attach(model, tnpeft.Spec.from_yaml(text), match="^first$")
    tnpeft.save(model, file)
    original = tnpeft.Adapter.initial
    monkeypatch.setattr(tnpeft.Adapter, "initial", lambda *arguments: original(*arguments) + 1)
    assert refused(net(), file) == (
        "FILE: frozen core 'A' of layer 'first': expected the values of its seed, found others. "
        "Save the adapter again where it was made, after writing to that core."
    )
