"""What is refused before it takes time, memory or a file: tuples of tuples, names, unused params, plans too large."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import networkx
import pytest
import torch
from fuzz_inputs import spec_of_graph
from networks import GRAPHS, network_of_graph
from safetensors import safe_open
from safetensors.torch import save_file
from terminal import mistakes
from timing import takes_less_than
from torch import nn
from typer.testing import CliRunner

import tnpeft
from tnpeft.adapters import memory_need
from tnpeft.cli.app import app
from tnpeft.cli.costs import bytes_text
from tnpeft.documents.paths import is_file, is_folder, is_there, resolved
from tnpeft.documents.recognise import recognise
from tnpeft.draw import is_current
from tnpeft.draw.files import write
from tnpeft.fitting.checkpoint import Checkpoint
from tnpeft.io.manifest import KEY, digest
from tnpeft.planning import nominal_call
from tnpeft.schedule import plan, predict
from tnpeft.schedule.predict import FOREVER
from tnpeft.verify.oracle import dense_delta, entry

TUPLES = """\
tnpeft: 1
name: tuples
layers: [Linear]
sizes:
  t: (in_features, out_features)
  u: (t, t)
  o: out_features if u == u else 1
  i: in_features
cores: {a: o i}
weight: o i
start: frozen_copy
"""
REFUSED = (
    "6:6: `sizes`, u: expected a tuple of numbers, found 2 numbers in place of one. "
    "Pick one with `[0]`, or write the entries out."
)


def test_tuples_hold_no_tuples() -> None:
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Spec.from_yaml(TUPLES, "demo.yaml")
    assert str(caught.value) == f"demo.yaml:{REFUSED}"


PLAIN = TUPLES.replace("  u: (t, t)\n", "").replace("  t: (in_features, out_features)\n", "").replace("u == u", "1")
BONDED = PLAIN.replace("a: o i}", "a: o b, c: b i}")


@pytest.mark.parametrize(
    "keys",
    ["params: {r: X}\nbond: r\n", "bond: X\n", "bond: 2\nscale: X\n", "bond: 2\ninit: constant(X)\n"],
)
def test_nor_does_any_other_expression(keys: str) -> None:
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Spec.from_yaml(BONDED + keys.replace("X", '"((1, 2), 3)[1]"' if "(X" not in keys else "((1,2),3)[1]"))
    found = [(problem.expected, problem.found) for problem in caught.value.problems]
    assert ("a tuple of numbers", "a tuple in a tuple") in found


def test_an_adapter_file_with_tuples_of_tuples_says_so(tmp_path: Path) -> None:
    model, path = nn.Sequential(nn.Linear(4, 4)), tmp_path / "a.safetensors"
    tnpeft.attach(model, tnpeft.Spec.from_yaml(PLAIN), match="0")
    tnpeft.save(model, path)
    with safe_open(path, "pt") as file:
        fields = json.loads(file.metadata()[KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    number, _ = fields.pop("format"), fields.pop("sha256")
    fields["specs"][0]["text"], fields["specs"][0]["file"] = TUPLES, "demo.yaml"
    save_file(tensors, path, {KEY: json.dumps(fields | {"format": number, "sha256": digest(fields, tensors)})})
    with pytest.raises(tnpeft.AdapterFileError) as caught:
        tnpeft.load(nn.Sequential(nn.Linear(4, 4)), path)
    assert str(caught.value) == f"{path}: demo.yaml:{REFUSED}"


def test_aliases_count_their_text() -> None:
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Spec.from_yaml(f"a: &a {'x' * 30_000}\nb: *a\nc: *a\n", "demo.yaml")
    assert str(caught.value) == (
        "demo.yaml:3:4: too much text: expected at most 65536 characters with aliases, found more. "
        "A spec is a small file; write it out flat."
    )


def test_products_beyond_a_message_are_cut() -> None:
    names = " ".join(f"n{number}" for number in range(700))
    text = TUPLES.replace("  u: (t, t)\n", f"  ? {names}\n  : 16777216\n").replace("u == u", "1")
    text = text.replace("a: o i", f"a: o i {names}").replace("weight: o i", f"weight: (o {names}) i")
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Spec.from_yaml(text, "demo.yaml")
    assert all(len(str(problem)) < 600 for problem in caught.value.problems)
    assert "= more than 1000000000000000000" in str(caught.value)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            "{r: 4, blocks: 3}",
            "4:16: param `blocks` is used nowhere: expected an index, or an expression, that reads it, found none. "
            "Write `b: blocks` in `sizes` if it is the size of 'b', which has the bond's now.",
        ),
        (
            "{r: 4, s: r}",
            "4:16: param `s` is used nowhere: expected an index, or an expression, that reads it, found none. "
            "Remove it, or write it where it belongs.",
        ),
        ("{s: 4, r: s}", None),
        ("{r: 4, b: 3}", None),
    ],
)
def test_a_param_that_nothing_reads(params: str, message: str | None) -> None:
    text = f"tnpeft: 1\nname: demo\nlayers: [Linear]\nparams: {params}\nbond: r\nstart: frozen_copy\n"
    text += "sizes: {o: out_features, i: in_features}\ncores: {up: o b, down: b i}\nweight: o i\n"
    tnpeft.Spec.from_yaml(text, known_inits=False)  # as a file that was saved before has it
    if message is None:
        tnpeft.Spec.from_yaml(text)
        return
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Spec.from_yaml(text, "demo.yaml")
    assert str(caught.value) == f"demo.yaml:{message}"


NAMES = [
    "x" * 300,
    "x" * 300 + ".yaml",
    "a\0b",
    "a\0b.yaml",
    "\ud800",
    "d/" * 3000 + "x",
    "d/" * 3000 + "x.yaml",
    "é" * 200,
]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_no_file_can_have_are_unknown_names(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    recipe = f"tnpeft: 1\nname: demo\nadapters: [{{spec: {json.dumps(name)}, match: x}}]\n"
    uses: tuple[Callable[[], object], ...] = (
        lambda: tnpeft.load_spec(name),
        lambda: tnpeft.load_recipe(name),
        lambda: tnpeft.attach(model, name, match="0"),
        lambda: tnpeft.Recipe.from_yaml(recipe),
        lambda: tnpeft.draw_network(name),
        lambda: write(Path(name), b""),
        lambda: tnpeft.load(model, name),
        lambda: tnpeft.load_foreign(model, name),
        lambda: tnpeft.inspect(name),
        lambda: Checkpoint(name),
    )
    for use in uses:
        with pytest.raises(tnpeft.TnpeftError) as caught:
            use()
        assert len(str(caught.value)) < 2000
    assert not is_current(name, tnpeft.load_spec("lora"))
    assert recognise(Path(name)) is None
    assert (is_file(name), is_folder(name), is_there(name)) == (False, False, False)
    assert not is_there(resolved(name))


@pytest.mark.parametrize("name", ["y" * 400, "y/" * 3000])
def test_inspect_says_that_no_file_can_have_a_name(name: str) -> None:
    text = (
        f"{ascii(name.removesuffix('/'))[:196]}...': adapter file: expected a path that can be used, "
        "found File name too long. Choose another path."
    )
    with pytest.raises(tnpeft.AdapterFileError) as caught:
        tnpeft.inspect(name)
    assert str(caught.value) == text
    assert mistakes("inspect", name) == [text]


def test_a_circle_of_links_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("circle").symlink_to("circle")
    assert resolved("circle") == tmp_path.resolve() / "circle"
    files = ("extract", "base.safetensors", "tuned.safetensors", "--spec", "lora", "--match", "all", "-m", "m:net")
    assert mistakes(*files, "-o", "circle/a.safetensors", status=2) == [
        "--output: expected a file name in a folder that exists, found no folder 'circle'. "
        "For example -o adapter.safetensors."
    ]
    with pytest.raises(tnpeft.AdapterFileError) as caught:
        tnpeft.inspect("circle")
    assert str(caught.value) == (
        "circle: adapter file: expected a path that can be used, found Too many levels of symbolic links. "
        "Choose another path."
    )


def test_the_text_about_such_names() -> None:
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.load_spec("lora" + "x" * 300 + ".yaml")
    shown = ascii("lora" + "x" * 300)[:196] + "...'"
    assert str(caught.value) == (
        f"{shown}: cannot read this spec: expected a readable file, found File name too long. Check the path."
    )
    with pytest.raises(tnpeft.DrawError) as drawn:
        write(Path("x" * 300), b"")
    assert str(drawn.value) == (
        f"{ascii('x' * 300)[:196]}...': picture: expected to be written, found File name too long. "
        "Choose a shorter name of plain characters."
    )


@pytest.mark.parametrize(
    "command",
    [
        ["show", "X"],
        ["check", "X"],
        ["draw", "X", "-o", "p.svg"],
        ["draw", "lora", "-o", "X"],
        ["draw", "lora", "loha", "-o", "X"],
        ["verify", "X"],
        ["count", "X", "--model", "x:y"],
        ["budget", "X", "--model", "x:y", "--params", "9"],
        ["fit", "X", "X", "--model", "x:y", "--spec", "lora", "--match", "x", "-o", "X"],
        ["convert", "X", "X", "--model", "x:y"],
        ["list", "--markdown", "X"],
    ],
    ids=" ".join,
)
def test_commands_take_any_name(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        result = CliRunner().invoke(app, [name if word == "X" else word for word in command])
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code in (1, 2)


def test_numbers_that_no_float_holds() -> None:
    spec = tnpeft.load_spec("lora")
    for value in (10**400, 10**6000, -(10**400)):
        with pytest.raises(tnpeft.BindError) as caught:
            spec.bind("Linear", in_features=4, out_features=4, alpha=value)
        assert str(caught.value) == (
            "spec 'lora', param 'alpha': expected a number of at most 1e+12, found a larger one. Write `alpha=4`."
        )


def test_a_contraction_of_more_steps_than_a_float_holds() -> None:
    network = network_of_graph(GRAPHS["complete"], bond=8)  # 2**1025 multiplications and more in one step
    assert str(plan(network, "auto"))
    assert "1e+364 EFLOP" in str(plan(network))
    assert predict(plan(network), nominal_call(network.layer)).step >= FOREVER
    assert bytes_text(10**400) == "9.313e+290 GiB"


SHAPES = {
    "tree": lambda: networkx.random_labeled_tree(256, seed=1),
    "star": lambda: networkx.star_graph(255),
    "grid": lambda: networkx.grid_2d_graph(12, 12),
    "complete": lambda: networkx.complete_graph(60),
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", [*SHAPES, "hyperedges"])
def test_hundreds_of_cores_are_planned_and_drawn_in_seconds(shape: str) -> None:
    choose = random.Random(0)
    hyperedges: list[list[int]] = []
    graph = networkx.empty_graph(40) if shape == "hyperedges" else SHAPES[shape]()
    graph = networkx.convert_node_labels_to_integers(graph)
    if shape == "hyperedges":
        hyperedges = [choose.sample(range(40), 3) for _ in range(30)]
    bond = 1 if shape in ("star", "complete") else 2  # a core has 2**32 elements at most
    spec = tnpeft.Spec.from_yaml(spec_of_graph(graph, hyperedges, bond))
    network = spec.bind("Linear", in_features=7, out_features=5)
    assert takes_less_than(12.0, lambda: (plan(network, "auto"), tnpeft.draw_network(network).page))


def spec_of_chain(count: int) -> tnpeft.Spec:
    """out - c0 - c1 - ... - in, with a frozen copy and bonds of 16, so that the input passes many links."""
    legs = [*(f"b{place}" for place in range(count - 1)), "i"]
    before = ["o", *legs]
    cores = "".join(
        f"  c{place}: {{legs: {before[place]} {legs[place]}, init: normal(0.25)}}\n" for place in range(count)
    )
    return tnpeft.Spec.from_yaml(
        "tnpeft: 1\nname: chain\nlayers: [Linear]\nsizes: {o: out_features, i: in_features}\nbond: 16\n"
        f"cores:\n{cores}weight: o i\nstart: frozen_copy\n"
    )


@pytest.mark.parametrize(
    ("count", "mode"), [(120, "dense"), (200, "hybrid"), *((256, mode) for mode in ("dense", "factored", "hybrid"))]
)
def test_long_chains_equal_the_product_of_their_matrices(count: int, mode: str) -> None:
    """Pair legs, one a link, have letters that nothing else has."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16, bias=False)).double(), torch.randn(3, 16, dtype=torch.float64)
    tnpeft.attach(model, spec_of_chain(count), match="0", mode=mode)
    adapter = model[0].adapter("default")
    start = functools.reduce(torch.matmul, (core.detach().clone() for core in adapter.cores.values()))
    assert torch.equal(model(x), nn.functional.linear(x, model[0].base.weight))
    with torch.no_grad():
        for core in adapter.cores.values():
            core.mul_(1.01)
    delta = functools.reduce(torch.matmul, adapter.cores.values()) - start
    expected = nn.functional.linear(x, model[0].base.weight + adapter.network.scale * delta)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(model(x).square().sum(), list(adapter.cores.values())),
        torch.autograd.grad(expected.square().sum(), list(adapter.cores.values())),
        rtol=1e-9,
        atol=1e-12,
    )


def test_verify_adds_up_hundreds_of_cores_in_seconds() -> None:
    network = spec_of_chain(256).bind("Linear", in_features=16, out_features=16)
    cores = {core.name: torch.randn(16, 16, dtype=torch.float64) / 4 for core in network.cores}
    assert takes_less_than(3.0, lambda: [entry(network, cores, (place, 0)) for place in range(15)])
    found = dense_delta(network, cores, None)
    expected = network.scale * functools.reduce(torch.matmul, cores.values())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


def test_sums_of_many_terms_are_drawn_as_far_as_a_page_goes() -> None:
    terms = "terms:\n" + "  - {cores: [a], weight: o i}\n" * 100
    spec = tnpeft.Spec.from_yaml(PLAIN.replace("weight: o i\n", terms))
    page = tnpeft.draw_network(spec).page
    assert len(page.panels) == 24
    assert [text.text for text in page.texts if "terms" in text.text] == ["the first 24 of 100 terms"]


K6 = spec_of_graph(networkx.complete_graph(6), (), 20)


def test_attach_says_what_a_plan_needs_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        memory_need, "_memory_of", lambda kind, index: memory_need._Limit(64 << 30, "the memory of this machine")
    )
    model = nn.Sequential(nn.Linear(1, 1))
    spec = tnpeft.Spec.from_yaml(K6)
    text = (
        "spec 'made': expected a need of at most 68,719,476,736 bytes (the memory of this machine), "
        "found 6,553,766,400,000 bytes: 153,600,000 of cores, the rest while they are contracted. "
        "Use a smaller rank or another topology, or allow more with `tnpeft.memory_limit(bytes)` "
        "(on the command line with TNPEFT_MEMORY_LIMIT)."
    )
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(model, spec, match="0")
    assert str(caught.value) == f"layer '0', {text}"
    assert type(model[0]) is nn.Linear
    with pytest.raises(tnpeft.BindError) as compiled:
        tnpeft.compile(spec, model[0])
    assert str(compiled.value) == f"Linear(1, 1), {text}"
    tnpeft.attach(model, spec, match="0", r=2)
    with torch.device("meta"):
        abstract = nn.Sequential(nn.Linear(1, 1))
    tnpeft.attach(abstract, spec, match="0")


def test_layers_are_counted_together_and_the_bound_can_be_moved(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    fresh = copy.deepcopy(model)
    with tnpeft.memory_limit(30_000), pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(model, "lora", match=".", r=8)  # 4 layers of 2 x 64 x 8 numbers, and one delta weight
    assert str(caught.value) == (
        "4 layers together, the largest '0' with 4,096 bytes: expected a need of at most 30,000 bytes "
        "(`tnpeft.memory_limit`), found 32,768 bytes: 16,384 of cores, the rest while they are contracted. "
        "Use a smaller rank or another topology, or allow more with `tnpeft.memory_limit(bytes)` "
        "(on the command line with TNPEFT_MEMORY_LIMIT)."
    )
    with tnpeft.memory_limit(32_768):
        tnpeft.attach(model, "lora", match=".", r=8)
    tnpeft.save(model, tmp_path / "a.safetensors")
    with tnpeft.memory_limit(30_000), pytest.raises(tnpeft.AdapterFileError) as refused:
        tnpeft.load(fresh, tmp_path / "a.safetensors")
    assert str(refused.value) == f"{tmp_path / 'a.safetensors'}: {caught.value}"
    with tnpeft.memory_limit(None):
        tnpeft.load(fresh, tmp_path / "a.safetensors")


def test_shared_cores_are_counted_once() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(40)))
    cores = 64 * 2 * 256 * 4 + 40 * (256 + 64) * 4  # two for all layers, two vectors for each
    with tnpeft.memory_limit(2 * cores + 1_000_000):
        tnpeft.attach(model, "vera", match=".")


def test_a_factored_layer_needs_no_delta_weight() -> None:
    """What runs factored is not refused for what dense would take."""
    layer = nn.Linear(2000, 2000)
    with tnpeft.memory_limit(1_000_000):
        with pytest.raises(tnpeft.BindError):
            tnpeft.compile("lora", layer, mode="dense")
        tnpeft.compile("lora", layer)


@pytest.mark.parametrize("most", [0, -1, "x", True, 1.5])
def test_bounds_are_numbers_of_bytes(most: object) -> None:
    with pytest.raises(tnpeft.BindError) as caught, tnpeft.memory_limit(most):  # type: ignore[arg-type]
        pass
    assert str(caught.value) == (
        f"memory_limit: expected a positive whole number of bytes, or None, found {most!r}. "
        "For example `tnpeft.memory_limit(64 << 30)`, or None for no bound."
    )


def test_the_environment_moves_the_bound_too(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(64, 64)
    monkeypatch.setenv("TNPEFT_MEMORY_LIMIT", "1e3")
    with pytest.raises(tnpeft.BindError) as caught:
        tnpeft.compile("lora", layer, mode="dense")
    assert "at most 1,000 bytes (TNPEFT_MEMORY_LIMIT)" in str(caught.value)
    with tnpeft.memory_limit(1 << 30):
        tnpeft.compile("lora", layer, mode="dense")
    monkeypatch.setenv("TNPEFT_MEMORY_LIMIT", "much")
    with pytest.raises(tnpeft.BindError) as wrong:
        tnpeft.compile("lora", layer)
    assert str(wrong.value) == (
        "TNPEFT_MEMORY_LIMIT: expected a positive number of bytes, found 'much'. "
        "For example TNPEFT_MEMORY_LIMIT=64e9, or leave it unset."
    )


def test_a_gpu_has_its_own_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    memory_need._memory_of.cache_clear()
    properties = SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert memory_need._memory_of("cuda", 1) == memory_need._Limit(80 << 30, "the memory of cuda:1")
    memory_need._memory_of.cache_clear()
    assert memory_need._memory_of("cpu", None).most is not None


def test_parts_of_a_container_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_need, "_container_memory", lambda: iter([1 << 20, 1 << 62]))
    memory_need._memory_of.cache_clear()
    assert memory_need._memory_of("cpu", None).most == 1 << 20
    memory_need._memory_of.cache_clear()
    assert list(itertools.islice(memory_need._host_memory(), 1))


def test_a_checkpoint_that_is_not_there_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(tnpeft.AdapterFileError) as caught:
        Checkpoint("none.safetensors")
    assert str(caught.value) == (
        "none.safetensors: checkpoint: expected a file that can be read, found No such file or directory. "
        "Pass a .safetensors file, or a folder that holds one or shards with an index."
    )
