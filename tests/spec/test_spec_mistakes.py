"""Every mistake that DESIGN section 1 lists, each with its whole text."""

from __future__ import annotations

import pytest

import tnpeft

GOOD = """\
tnpeft: 1
name: demo
layers: [Conv3d]
params: {r: 4}
bond: r
sizes:
  o: out_channels
  i: in_channels
  kd kh kw: kernel_size
cores:
  up:   {legs: o a, init: zeros}
  mid:  a b kd kh kw
  down: b i
weight: o i kd kh kw
start: zero
"""

# what is wrong, the text it replaces, the wrong text, and every message it gives (after "demo.yaml:")
MISTAKES = [
    (
        "unknown key",
        "layers: [Conv3d]",
        "layer: [Conv3d]",
        [
            (
                "3:1: unknown key 'layer' in the file: expected one of bond, compose, cores, factors, init, layers, "
                "name, params, scale, seed, sizes, source, start, start_std, terms, title, tnpeft, weight, found "
                "'layer'. "
                "Did you mean `layers`?"
            ),
        ],
    ),
    (
        "dangling",
        "mid:  a b kd",
        "mid:  a b c kd",
        [
            (
                "12:13: core 'mid', index 'c' dangles: expected a second core or a place in `weight`, found core "
                "'mid' alone. Add 'c' to another core, or to `weight`."
            ),
        ],
    ),
    (
        "dangling typo",
        "down: b i",
        "down: bb i",
        [
            (
                "12:11: core 'mid', index 'b' dangles: expected a second core or a place in `weight`, found core "
                "'mid' alone. Add 'b' to another core, or to `weight`. Did you mean `bb`?"
            ),
            (
                "13:9: core 'down', index 'bb' dangles: expected a second core or a place in `weight`, found "
                "core 'down' alone. Add 'bb' to another core, or to `weight`."
            ),
        ],
    ),
    (
        "weight in no core",
        "weight: o i kd",
        "weight: o ii kd",
        [
            (
                "13:11: core 'down', index 'i' dangles: expected a second core or a place in `weight`, found "
                "core 'down' alone. Add 'i' to another core, or to `weight`. Did you mean `ii`?"
            ),
            "14:11: `weight`, index 'ii': expected a core that has it, found none. Did you mean `i`?",
        ],
    ),
    (
        "no bond",
        "bond: r\n",
        "",
        [
            (
                "10:18: core 'up', index 'a' has no size: expected `bond`, or a line in `sizes`, found neither. "
                "Add `a: ...` to `sizes`."
            ),
            (
                "11:11: core 'mid', index 'b' has no size: expected `bond`, or a line in `sizes`, found neither. "
                "Add `b: ...` to `sizes`."
            ),
        ],
    ),
    (
        "open no size",
        "  o: out_channels\n",
        "",
        [
            (
                "10:16: core 'up', index 'o' has no size: expected a line in `sizes`, found none. Add `o: ...` "
                "to `sizes`."
            ),
        ],
    ),
    (
        "wrong rank",
        "weight: o i kd kh kw",
        "weight: o i kd (kh kw)",
        [
            (
                "14:9: `weight`: expected 5 axes for Conv3d, found 4. The axes are out_channels, in_channels and "
                "each kernel axis; parentheses group legs."
            ),
        ],
    ),
    (
        "kinds",
        "[Conv3d]",
        "[Conv3d, Linear]",
        [
            (
                "9:13: `sizes`, kd kh kw: expected 3 sizes to unpack, found 0 (Linear). Write `k...` for one "
                "index per kernel axis, or leave Linear out of `layers`."
            ),
            (
                "14:9: `weight`: expected 2 axes for Linear, found 5. The axes are out_channels, in_channels and "
                "each kernel axis; parentheses group legs."
            ),
        ],
    ),
    (
        "unproved zero",
        "{legs: o a, init: zeros}",
        "o a",
        [
            (
                "15:8: `start: zero`: expected exactly one trainable core with `init: zeros`, found none. Give "
                "one core `init: zeros`, or write `start: frozen_copy`."
            ),
        ],
    ),
    (
        "two zeros",
        "  down: b i",
        "  down: {legs: b i, init: zeros}",
        [
            (
                "15:8: `start: zero`: expected exactly one trainable core with `init: zeros`, found 2, 'up', "
                "'down'. Two never receive a gradient: give all but one another init."
            ),
        ],
    ),
    (
        "frozen zeros",
        "init: zeros}",
        "init: zeros, frozen: true}",
        [
            (
                "15:8: `start: zero`: expected exactly one trainable core with `init: zeros`, found 'up' frozen. "
                "Train that core: the update would be zero for ever."
            ),
        ],
    ),
    (
        "unknown init",
        "init: zeros",
        "init: zeroes",
        [
            (
                "11:27: unknown init 'zeroes': expected one of zeros, ones, eye, constant, normal, uniform, "
                "kaiming_uniform, orthogonal, cosine, sine, svd_u, svd_s, svd_v, svd_us, svd_vs, value, choice, "
                "random, largest, smallest, entries, places, found `zeroes`. Did you mean `zeros`?"
            ),
        ],
    ),
    (
        "init args",
        "init: zeros",
        "init: normal(0.1, 2)",
        [
            (
                "11:39: core 'up', key '2)': expected a quoted value, found the rest of one that a comma split. "
                'A comma ends a value inside `{...}`: quote this, `init: "kaiming_uniform(fan=8, gain=relu)"`.'
            ),
        ],
    ),
    (
        "expr syntax",
        "o: out_channels",
        "o: out_channels +",
        [
            ("7:6: `sizes`, o: expected an expression, found 'out_channels +'. Write it as Python would: `2 * r`."),
        ],
    ),
    (
        "expr pow",
        "o: out_channels",
        "o: out_channels ** 2",
        [
            (
                "7:6: `sizes`, o: expected a size expression, found `**`. Sizes know + - * / // %, comparisons, "
                "`a if c else b`, tuples, subscripts and functions."
            ),
        ],
    ),
    (
        "expr name",
        "o: out_channels",
        "o: out_chanels",
        [
            (
                "7:6: `sizes`, o: expected params, layer names and indices in `sizes`, found 'out_chanels'. Did "
                "you mean `out_channels`?"
            ),
        ],
    ),
    (
        "expr div0",
        "o: out_channels",
        "o: out_channels // 0",
        [
            "7:6: `sizes`, o: expected a divisor other than zero, found zero. Guard it with `max(..., 1)`.",
        ],
    ),
    (
        "size 0",
        "bond: r",
        "bond: r - 4",
        [
            "5:7: `bond`: expected a size from 1 to 16777216, found 0. Change its size.",
        ],
    ),
    (
        "size fraction",
        "bond: r",
        "bond: r / 3",
        [
            "5:7: `bond`: expected a whole size, found 1.33333. Use `//`, `floor` or `ceil`.",
        ],
    ),
    (
        "absurd",
        "bond: r",
        "bond: 100000000",
        [
            "5:7: `bond`: expected a size from 1 to 16777216, found 1e+08. Change its size.",
        ],
    ),
    (
        "unsupported layers",
        "[Conv3d]",
        "[Conv4d]",
        [
            (
                "3:10: `layers`: expected one of Linear, Conv1d, Conv2d, Conv3d, ConvTranspose1d, "
                "ConvTranspose2d, ConvTranspose3d, any, conv, conv_transpose, found 'Conv4d'. Did you mean "
                "`Conv3d`?"
            ),
        ],
    ),
    (
        "circular",
        "o: out_channels",
        "o: i\n  i: o\n  x: in_channels",
        [
            "10:3: key 'i': expected each key once, found it again, first on line 8. Remove one of the two.",
        ],
    ),
    (
        "circular2",
        "o: out_channels\n  i: in_channels",
        "o: i * 1\n  i: o * 1",
        [
            ("7:3: circular `sizes`: expected no circle, found o -> i -> o. Give one of them a size of its own."),
        ],
    ),
    (
        "unused",
        "  o: out_channels\n",
        "  o: out_channels\n  z: 3\n",
        [
            "8:3: `sizes`, 'z': expected a core or an expression that uses it, found none. Remove it.",
        ],
    ),
    (
        "dup key",
        "bond: r\n",
        "bond: r\nbond: 3\n",
        [
            "6:1: key 'bond': expected each key once, found it again, first on line 5. Remove one of the two.",
        ],
    ),
    (
        "size twice",
        "  i: in_channels\n",
        "  i: in_channels\n  o kk: 3\n",
        [
            "9:3: `sizes`, 'o': expected each name once, found it again. Give each index one size.",
        ],
    ),
    (
        "unpack",
        "kd kh kw: kernel_size",
        "kd kh kw: factorize(in_channels, 2)",
        [
            (
                "9:13: `sizes`, kd kh kw: expected 3 sizes to unpack, found 2 (Conv3d). Name 2 indices, or "
                "change `factorize(in_channels, 2)`."
            ),
        ],
    ),
    (
        "product",
        "o: out_channels",
        "o: out_channels + 1",
        [
            (
                "14:9: `weight`, axis 1 (o), on Conv3d(64, 128, 3), as on all layers tried: expected a product of 128 "
                "(out_channels), found 129. Change `sizes` or `factors`, or group the legs of `weight` otherwise."
            ),
        ],
    ),
    (
        "factors",
        "params:",
        "factors: {32: [4, 4, 3]}\nparams:",
        [
            (
                "4:11: `factors`, 32: expected factors with product 32, found 4 x 4 x 3 = 48. Mend the entry; "
                "others are factorised by rule."
            ),
        ],
    ),
    (
        "factors name",
        "params:",
        "factors: tenvo\nparams:",
        [
            "4:10: `factors`: expected one of tenvoo, found 'tenvo'. Did you mean `tenvoo`?",
        ],
    ),
    (
        "no terms",
        "weight: o i kd kh kw",
        "terms: []",
        [
            (
                "14:8: `terms`: expected at least one term, found none. For example "
                "`terms: [{cores: [up, down], weight: o i}]`."
            ),
        ],
    ),
    (
        "comma",
        "init: zeros}",
        "init: kaiming_uniform(fan=2, gain=relu)}",
        [
            (
                "11:50: core 'up', key 'gain=relu)': expected a quoted value, found the rest of one that a comma "
                'split. A comma ends a value inside `{...}`: quote this, `init: "kaiming_uniform(fan=8, '
                'gain=relu)"`.'
            ),
        ],
    ),
    (
        "leg twice",
        "down: b i",
        "down: b i i",
        [
            (
                "13:13: core 'down', index 'i': expected each leg once, found it twice. Name the second one "
                "otherwise; a trace needs a core of ones."
            ),
        ],
    ),
    (
        "weight twice",
        "weight: o i",
        "weight: o i i",
        [
            (
                "14:13: `weight`, index 'i': expected each index once, found it twice. Each open leg makes one "
                "part of the weight."
            ),
        ],
    ),
    (
        "keyword",
        "o: out_channels",
        "lambda: out_channels",
        [
            (
                "7:3: `sizes`, index 'lambda': expected an ASCII word that is no Python keyword, found 'lambda'. "
                "Use letters, digits and `_`, starting with a letter."
            ),
        ],
    ),
    (
        "k beside",
        "a b kd kh kw\n",
        "a b kd kh kw k k...\n",
        [
            "12:22: index 'k': expected no `k` beside `k...`, found both. Choose another name.",
            (
                "12:22: core 'mid', index 'k' dangles: expected a second core or a place in `weight`, found core "
                "'mid' alone. Add 'k' to another core, or to `weight`. Did you mean `kw`?"
            ),
            (
                "12:24: core 'mid', index 'k...' dangles: expected a second core or a place in `weight`, found "
                "core 'mid' alone. Add 'k...' to another core, or to `weight`."
            ),
        ],
    ),
    (
        "scale zero",
        "start: zero",
        "scale: r - 4\nstart: zero",
        [
            (
                "15:8: `scale`: expected a number other than zero, found 0. A scale of zero trains nothing; the "
                "published code has it below rank 4."
            ),
        ],
    ),
    (
        "no start",
        "start: zero\n",
        "",
        [
            (
                "1:1: the file has no `start`: expected `zero` or `frozen_copy`, found nothing. Write `start: "
                "zero` where one core is zeros, else `start: frozen_copy`."
            ),
        ],
    ),
    (
        "start",
        "start: zero",
        "start: one",
        [
            (
                "15:8: `start`: expected `zero` or `frozen_copy`, found 'one'. Write `start: zero` where one "
                "core is zeros, else `start: frozen_copy`."
            ),
        ],
    ),
    (
        "version",
        "tnpeft: 1",
        "tnpeft: 3",
        [
            (
                "1:9: `tnpeft`: expected the language version 1 or 2, found 3. This file needs a newer tnpeft: "
                "upgrade it, or write `tnpeft: 1`."
            ),
        ],
    ),
    (
        "one leg",
        "down: b i",
        "down: b i\n  s: a",
        [
            (
                "14:3: core 's' of one leg: expected an init, found none. For example `s: {legs: a, init: "
                "normal(0.02)}`."
            ),
        ],
    ),
    (
        "param refers later",
        "{r: 4}",
        "{a: r, r: 4}",
        [
            (
                "4:13: param 'a': expected numbers and earlier params, found 'r'. A default may read the params "
                "above it."
            ),
        ],
    ),
    (
        "reserved",
        "{r: 4}",
        "{r: 4, seed: 1}",
        [
            (
                "4:16: param 'seed': expected a name of its own, found `seed`, an argument of `attach`. Choose "
                "another name."
            ),
        ],
    ),
    (
        "fan legs",
        "down: b i",
        "down: {legs: b i, init: 'kaiming_uniform(fan=[j])'}",
        [
            "13:27: core 'down', `fan`: expected legs of this core, found 'j'. Its legs are b i.",
        ],
    ),
    (
        "fan last",
        "down: b i",
        "down: {legs: b i, init: kaiming_uniform(fan=last(3))}",
        [
            "13:27: core 'down', `fan`: expected legs it has, found last(3) of 2. Lower the count.",
        ],
    ),
    (
        "param index",
        "o: out_channels",
        "o: out_channels\n  r: 5",
        [
            (
                "8:3: `sizes`, 'r': expected the param's value, found `5`. Remove it from `sizes`, or name the "
                "index otherwise; a param's index is written `r: r`."
            ),
        ],
    ),
    (
        "yaml",
        "params: {r: 4}",
        "params: {r: 4",
        [
            (
                "5:5: not valid YAML: expected one YAML document, found while parsing a flow mapping expected "
                "',' or '}', but got ':'. Mend the syntax here."
            ),
        ],
    ),
    (
        "tag",
        "name: demo",
        "name: !!python/name:os.system demo",
        [
            ("2:7: a tag: expected plain YAML, found 'tag:yaml.org,2002:python/name:os.system'. Remove the tag."),
        ],
    ),
    (
        "not list",
        "[Conv3d]",
        "3",
        [
            (
                "3:9: `layers`: expected a layer kind or a list of them, found 3. For example `layers: [Linear, "
                "Conv3d]`, or `any`."
            ),
        ],
    ),
    (
        "no",
        "bond: r",
        "bond: no",
        [
            "5:7: `bond`: expected params, layer names and indices in `sizes`, found 'no'. Did you mean `o`?",
        ],
    ),
    (
        "tuple size",
        "o: out_channels",
        "o: kernel_size",
        [
            ("7:6: core 'up', index 'o': expected one size, found 3 sizes. Name one index for each on the left."),
        ],
    ),
    (
        "paren",
        "weight: o i",
        "weight: (o i",
        [
            "14:9: `weight`: expected `)`, found the end. Close the parenthesis.",
        ],
    ),
]


def test_the_spec_that_the_mistakes_are_made_in_is_good():
    spec = tnpeft.Spec.from_yaml(GOOD)
    assert (spec.name, spec.layers, [core.name for core in spec.cores]) == ("demo", ("Conv3d",), ["up", "mid", "down"])


@pytest.mark.parametrize(
    ("old", "new", "messages"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES]
)
def test_a_mistake_says_where_what_and_how_to_mend_it(old, new, messages):
    assert old in GOOD
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Spec.from_yaml(GOOD.replace(old, new, 1), "demo.yaml")
    assert str(caught.value) == "\n".join(f"demo.yaml:{message}" for message in messages)


def test_a_wrong_init_for_all_cores_is_the_only_mistake_where_a_core_has_one_leg():
    text = "tnpeft: 1\nname: s\nlayers: [Linear]\nsizes: {o: out_features, i: in_features}\ninit: INIT\n"
    text += "cores: {a: o, b: i}\nweight: o i\nstart: frozen_copy\n"
    assert tnpeft.Spec.from_yaml(text.replace("INIT", "ones"))
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Spec.from_yaml(text.replace("INIT", "onez"), "s.yaml")
    (problem,) = caught.value.problems
    assert str(problem.where) == "s.yaml:5:7"
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Spec.from_yaml(text.replace("init: INIT\n", ""), "s.yaml")
    assert [problem.core for problem in caught.value.problems] == ["a", "b"]


def test_mistakes_are_collected_over_all_stages():
    """One of the shape, one between parts, one of an init, one of a name: four reports in the file's order."""
    text = GOOD.replace("name: demo", "name: demo\ntitel: x").replace("down: b i", "down: b j")
    text = text.replace("init: zeros", "init: zeroes").replace("o: out_channels", "o: out_chanels")
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Spec.from_yaml(text, "demo.yaml")
    found = [(problem.where.line, problem.where.column) for problem in caught.value.problems]
    assert found == [(3, 1), (8, 6), (12, 27), (14, 11), (15, 11)]
    assert [problem.what for problem in caught.value.problems] == [
        "unknown key 'titel' in the file",
        "`sizes`, o",
        "unknown init 'zeroes'",
        "core 'down', index 'j' dangles",
        "`weight`, index 'i'",
    ]


def test_the_readme_example_of_the_style_guide():
    text = """\
# dW[o,i,kd,kh,kw] = sum_ab U[o,a] G[a,b,kd,kh,kw] V[b,i]
tnpeft: 1
name: tucker2
layers: [Conv3d]
params: {r: 8}
sizes: {o: out_channels, i: in_channels, kd kh kw: kernel_size}
bond: r
cores:
  U: {legs: o, init: zeros}
  V: b i
  G: a b kd kh kw
weight: o i kd kh kw
start: zero
"""
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Spec.from_yaml(text, "typo.yaml")
    assert str(caught.value) == (
        "typo.yaml:11:6: core 'G', index 'a' dangles: expected a second core or a place in `weight`, "
        "found core 'G' alone. Add 'a' to another core, or to `weight`."
    )
    (problem,) = caught.value.problems
    assert (problem.core, problem.index) == ("G", "a")
