"""Sums, shared cores, cores of the base weight and DoRA's magnitudes: what a file may say, and every mistake in it."""

from __future__ import annotations

import pytest
import torch

import tnpeft

GOOD = """\
tnpeft: 1
name: demo
layers: any
params: {r: 2}
sizes: {o: out_channels, i: in_channels, j: in_channels, s: r}
cores:
  w: {legs: o j k..., from: weight}
  a: {legs: j r, shared: model}
  b: {legs: r i, init: zeros}
  c: {legs: o s, init: zeros}
  d: {legs: s i k..., frozen: true, shared: block}
terms:
  - {cores: [w, a, b], weight: o i k...}
  - {cores: [c, d], weight: o i k..., scale: -1}
start: zero
"""

# what is wrong, the text it replaces, the wrong text, and every message it gives (after "demo.yaml:")
MISTAKES = [
    (
        "weight beside terms",
        "terms:",
        "weight: o i k...\nterms:",
        [
            (
                "12:9: `weight`: expected no `weight` beside `terms`, found both. "
                "Write the weight of each term in `terms`, or `weight` alone."
            ),
        ],
    ),
    (
        "neither weight nor terms",
        GOOD[GOOD.index("terms:") : GOOD.index("start:")],
        "",
        [
            (
                "1:1: the file has no `weight`: expected a pattern of open legs, found nothing. "
                "For example `weight: o i k...`."
            ),
        ],
    ),
    (
        "terms that are no list",
        GOOD[GOOD.index("terms:") : GOOD.index("start:")],
        "terms: {cores: [w]}\n",
        [
            (
                "12:8: `terms`: expected a list of terms, found a mapping. "
                "For example `terms: [{cores: [up, down], weight: o i}, ...]`."
            ),
        ],
    ),
    (
        "a term that is no mapping",
        "{cores: [c, d], weight: o i k..., scale: -1}",
        "[c, d]",
        [
            (
                "14:5: `terms`, entry 2: expected a term with `cores` and `weight`, found a list. "
                "For example `- {cores: [up, down], weight: o i}`."
            ),
        ],
    ),
    (
        "a term without weight",
        "[c, d], weight: o i k..., scale: -1",
        "[c, d]",
        [
            (
                "14:5: `terms`, entry 2 has no `weight`: expected a pattern of open legs, found nothing. "
                "For example `weight: o i k...`."
            ),
        ],
    ),
    (
        "a misspelt key in a term",
        "weight: o i k..., scale: -1",
        "weight: o i k..., scal: -1",
        [
            (
                "14:39: unknown key 'scal' in `terms`, entry 2: expected one of cores, scale, weight, found 'scal'. "
                "Did you mean `scale`?"
            ),
        ],
    ),
    (
        "a term's cores as a text",
        "cores: [c, d]",
        "cores: c",
        [
            (
                "14:13: `terms`, entry 2, `cores`: expected a list of cores' names, found 'c'. "
                "For example `cores: [up, down]`."
            ),
        ],
    ),
    (
        "an unknown core in a term",
        "cores: [c, d]",
        "cores: [c, dd]",
        ["14:17: `terms`, entry 2: expected names of `cores`, found 'dd'. Did you mean `d`?"],
    ),
    (
        "a core twice in a term",
        "cores: [c, d]",
        "cores: [c, d, c]",
        [
            "14:20: `terms`, entry 2: expected each core once, found 'c' twice. A core appears once in each term, "
            "or again with other legs, as `up(o s)` has."
        ],
    ),
    (
        "a term of no cores",
        "cores: [c, d]",
        "cores: []",
        ["14:13: `terms`, entry 2: expected at least one core, found none. Name its cores, or remove the term."],
    ),
    (
        "a core of no term",
        "terms:",
        "  e: {legs: o s, init: ones}\nterms:",
        ["12:13: core 'e': expected a term that has it, found none. Name it in the `cores` of a term, or remove it."],
    ),
    (
        "dangling in one term",
        "cores: [c, d]",
        "cores: [c]",
        [
            "11:13: core 'd': expected a term that has it, found none. Name it in the `cores` of a term, or remove it.",
            (
                "10:15: `terms`, entry 2, core 'c', index 's' dangles: expected a second core or a place in `weight`, "
                "found core 'c' alone. Add 's' to another core, or to `weight`."
            ),
            (
                "14:28: `terms`, entry 2, `weight`, index 'i': expected a core that has it, found none. "
                "Add 'i' to a core, or remove it from `weight`."
            ),
            (
                "14:30: `terms`, entry 2, `weight`, index 'k...': expected a core that has it, found none. "
                "Add 'k...' to a core, or remove it from `weight`."
            ),
        ],
    ),
    (
        "a term without zeros",
        "c: {legs: o s, init: zeros}",
        "c: o s",
        [
            (
                "15:8: `start: zero`, term 2: expected exactly one trainable core with `init: zeros`, found none. "
                "Give one core `init: zeros`, or write `start: frozen_copy`."
            ),
        ],
    ),
    (
        "a term of frozen cores",
        "c: {legs: o s, init: zeros}",
        "c: {legs: o s, init: ones, frozen: true}",
        [
            (
                "14:29: `terms`, entry 2: expected at least one core that is trained, found all of them frozen. "
                "Remove it: it would never change."
            ),
            (
                "15:8: `start: zero`, term 2: expected exactly one trainable core with `init: zeros`, found none. "
                "Give one core `init: zeros`, or write `start: frozen_copy`."
            ),
        ],
    ),
    (
        "a scale of zero",
        "scale: -1",
        "scale: r - 2",
        [
            (
                "14:46: `terms`, entry 2, `scale`: expected a number other than zero, found 0. "
                "A scale of zero trains nothing; the published code has it below rank 4."
            ),
        ],
    ),
    (
        "an unknown name in a term's scale",
        "scale: -1",
        "scale: 1 / q",
        [
            (
                "14:46: `terms`, entry 2, `scale`: expected params, layer names and indices in `sizes`, found 'q'. "
                "Add it to `params`, or give it a line in `sizes`."
            ),
        ],
    ),
    (
        "an unknown source",
        "from: weight",
        "from: wieght",
        [
            (
                "7:29: core 'w', `from`: expected `weight`, `svd_u`, `svd_s` or `svd_v`, found 'wieght'. "
                "Write `from: weight` for the base weight itself, say."
            ),
        ],
    ),
    (
        "an init beside from",
        "from: weight",
        "from: weight, init: ones",
        ["7:43: core 'w': expected no `init` beside `from`, found `from: weight` and it. Remove one of them."],
    ),
    (
        "shared beside from",
        "from: weight",
        "from: weight, shared: model",
        [
            (
                "7:45: core 'w': expected no `shared` beside `from`, found `from: weight` and it. "
                "Remove it: each layer has its own weight."
            ),
        ],
    ),
    (
        "trained beside from",
        "from: weight",
        "from: weight, frozen: false",
        [
            (
                "7:45: core 'w': expected a frozen core, found `from: weight`. "
                "Remove it; the inits `svd_u`, `svd_us` and their kin give cores that train."
            ),
        ],
    ),
    (
        "too few axes of the base weight",
        "layers: any",
        "layers: [Conv1d]",
        [],
    ),
    (
        "a base weight without its kernel",
        "w: {legs: o j k..., from: weight}",
        "w: {legs: o j, from: weight}",
        [
            (
                f"7:13: core 'w': expected {2 + axes} axes for {kind}, found 2. "
                "The axes are out_channels, in_channels and each kernel axis; parentheses group legs."
            )
            for axes in (1, 2, 3)
            for kind in (f"Conv{axes}d", f"ConvTranspose{axes}d")
        ]
        + [
            (
                "13:36: `terms`, entry 1, `weight`, index 'k...': expected a core that has it, found none. "
                "Add 'k...' to a core, or remove it from `weight`."
            )
        ],
    ),
    (
        "a scope that is no word",
        "shared: block",
        "shared: a b",
        [
            (
                "11:45: core 'd': expected an ASCII word, found scope 'a b'. "
                "Use letters, digits and `_`, or `model`: one tensor for all layers."
            ),
        ],
    ),
    (
        "singular vectors that are shared",
        "{legs: j r, shared: model}",
        "{legs: j r, shared: model, init: svd_us}",
        [
            (
                "8:13: shared core 'a': expected another init, found `svd_us`, which reads one layer's weight. "
                "Remove `shared`: each layer has its own weight."
            ),
        ],
    ),
    (
        "an unknown composition",
        "start: zero",
        "start: zero\ncompose: oft",
        [
            (
                "16:10: `compose`: expected `dora`, found 'oft'. "
                "Write `compose: dora`, or leave it out: the update is then added to the weight."
            ),
        ],
    ),
    (
        "a core with the name of the magnitude",
        "start: zero",
        "start: zero\ncompose: dora",
        [],
    ),
]


@pytest.mark.parametrize(
    ("old", "new", "messages"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES]
)
def test_a_mistake_says_where_what_and_how_to_mend_it(old: str, new: str, messages: list[str]):
    assert old in GOOD
    text = GOOD.replace(old, new)
    if not messages:
        tnpeft.Spec.from_yaml(text, "demo.yaml")
        return
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Spec.from_yaml(text, "demo.yaml")
    assert sorted(str(caught.value).splitlines()) == sorted(f"demo.yaml:{message}" for message in messages)


def test_the_magnitudes_have_a_name_of_their_own():
    text = GOOD.replace("c:", "magnitude:").replace("[c, d]", "[magnitude, d]") + "compose: dora\n"
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Spec.from_yaml(text, "demo.yaml")
    assert str(caught.value) == (
        "demo.yaml:10:21: core 'magnitude': expected a name of its own, found `magnitude`, which `compose: dora` "
        "trains beside the cores. Choose another name."
    )


def test_a_padded_axis_does_not_fit_the_base_weight():
    text = GOOD.replace("o: out_channels", '"o p": "factorize(out_channels, 2, pad=true)"')
    text = text.replace("legs: o j k...", "legs: (o p) j k...").replace("legs: o s", "legs: o p s")
    text = text.replace("weight: o i", "weight: (o p) i")
    spec = tnpeft.Spec.from_yaml(text, "demo.yaml")
    with pytest.raises(tnpeft.BindError) as caught:
        spec.bind("Linear", in_features=4, out_features=7)
    assert str(caught.value) == (
        "demo.yaml:7:13: core 'w', axis 1 (o p), on Linear(4, 7): expected a product of 7 (out_channels), "
        "found 4 x 2 = 8. The base weight has no padding: factorise without `pad=true`."
    )


def test_a_spec_tells_what_it_is_made_of():
    spec = tnpeft.Spec.from_yaml(GOOD + "compose: dora\n")
    assert spec.scopes == ("block",)
    assert [term.cores for term in spec.terms] == [("w", "a", "b"), ("c", "d")]
    assert (spec.cores[0].origin, spec.cores[0].frozen, spec.cores[1].shared, spec.compose) == (
        "weight",
        True,
        "model",
        "dora",
    )
    network = spec.bind(torch.nn.Conv1d(4, 6, 3))
    assert network.num_parameters == 4 * 2 + 2 * 4 + 6 * 2 + 6
    assert network.formula == "out_channels + (o + i + j) r"
    assert network.einsum == "abc,bd,de->aec + af,fec->aec"
    assert network.reads_weight
    assert [term.scale for term in network.terms] == [1.0, -1.0]
    assert [len(part.cores) for part in network.parts] == [3, 2]
    assert network.graph.nodes["core", "d"]["terms"] == (1,)


def test_terms_share_cores():
    """sum_n c[n] cos[n,o] cos[n,i] - c[n] sin[n,o] sin[n,i], as FourierFT has it."""
    text = """
tnpeft: 1
name: waves
layers: [Linear]
params: {n: 5}
sizes: {o: out_features, i: in_features}
cores:
  c: {legs: n, init: zeros}
  cos_o: {legs: n o, init: cosine(0), frozen: true}
  cos_i: {legs: n i, init: cosine(1), frozen: true}
  sin_o: {legs: n o, init: sine(0), frozen: true}
  sin_i: {legs: n i, init: sine(1), frozen: true}
terms:
  - {cores: [c, cos_o, cos_i], weight: o i}
  - {cores: [sin_i, sin_o, c], weight: o i, scale: -1}
start: zero
"""
    layer = torch.nn.Linear(7, 6)
    adapter = tnpeft.compile(tnpeft.Spec.from_yaml(text), layer)
    assert adapter.network.num_parameters == 5
    with torch.no_grad():
        adapter.cores["c"].normal_()
    c, *waves = (core.detach().double() for core in adapter.cores.values())
    assert torch.allclose(waves[0].square() + waves[2].square(), torch.ones_like(waves[0]), atol=1e-6)
    # Every row is a wave of a whole number of periods: its transform has one pair of lines.
    assert all(int((torch.fft.rfft(row).abs() > 1e-4).sum()) == 1 for row in waves[1])
    expected = torch.einsum("n,no,ni->oi", c, waves[0], waves[1]) - torch.einsum("n,no,ni->oi", c, waves[2], waves[3])
    assert torch.allclose(adapter.delta_weight().double(), expected, atol=1e-6)
    adapter.delta_weight().square().sum().backward()
    reference = c.requires_grad_()
    both = torch.einsum("n,no,ni->oi", reference, waves[0], waves[1]) - torch.einsum(
        "n,no,ni->oi", reference, waves[2], waves[3]
    )
    both.square().sum().backward()
    assert torch.allclose(adapter.cores["c"].grad.double(), reference.grad, rtol=1e-5)


LEFT = "{legs: o2 a o1, from: svd_u}"
VALUES = "{legs: a, from: svd_s}"
RIGHT = "{legs: k... b i, from: svd_v}"
SINGULAR = f"""\
tnpeft: 1
name: demo
layers: any
params: {{r: 2}}
bond: r
sizes: {{o1 o2: "factorize(out_channels, 2)", i: in_channels}}
cores:
  u: {LEFT}
  s: {VALUES}
  m: {{legs: a b, init: zeros}}
  v: {RIGHT}
weight: (o1 o2) i k...
start: zero
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (LEFT, "{legs: o1 o2 a b, from: svd_u}", "8:13: core 'u', `svd_u`: expected the legs 'o1', 'o2' and one bond, "
         "found 'o1', 'o2', 'a', 'b'."),
        (LEFT, "{legs: o1 o2 a k..., init: svd_us}", "8:13: core 'u', `svd_us`: expected the legs 'o1', 'o2' and one "
         "bond, found 'o1', 'o2', 'a', 'k...'."),
        (VALUES, "{legs: a b, from: svd_s}", "9:13: core 's', `svd_s`: expected one bond, found 'a', 'b'."),
        (VALUES, '{legs: "", from: svd_s}', "9:13: core 's', `svd_s`: expected one bond, found none."),
        (RIGHT, "{legs: i k..., from: svd_v}", "11:13: core 'v', `svd_v`: expected the legs 'i', 'k...' and one bond, "
         "found 'i', 'k...'."),
    ],
)  # fmt: skip
def test_singular_vectors_have_the_legs_of_their_side(old: str, new: str, message: str):
    tnpeft.Spec.from_yaml(SINGULAR)
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Spec.from_yaml(SINGULAR.replace(old, new), "demo.yaml")
    message = f"demo.yaml:{message} Choose its legs by the weight, which is unfolded as out x rest."
    assert message in str(caught.value).splitlines()
