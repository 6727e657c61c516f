"""Maps beside PEFT's and LyCORIS's own functions: each peer's layer, and its update put together from maps."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
from lycoris.functional import diag_oft
from peft.tuners.boft.layer import BOFTLayer
from peft.tuners.oft.layer import OFTRotationModule
from peft.tuners.psoft.layer import OrthLayer
from peft.tuners.waveft.wavelet import Wavelet
from torch import Tensor, nn

from tnpeft.program.maps import map_function
from tnpeft.spec.wavelets import FAMILIES, wavelet_filters

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Legged = tuple[Tensor, list[str]]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


def mapped(source: Legged, name: str, takes: str, gives: str, made: Sequence[int] = (), **arguments: Any) -> Legged:
    """A map on some legs of a tensor; the legs that it makes come last."""
    tensor, legs = source
    taken = takes.split()
    rest = [leg for leg in legs if leg not in taken]
    moved = tensor.permute([legs.index(leg) for leg in (*rest, *taken)])
    sizes = moved.shape[: len(rest)]
    at = {"at": arguments.pop("at").unsqueeze(0)} if "at" in arguments else {}
    x = moved.reshape(1, -1, *moved.shape[len(rest) :])
    value = map_function(name)(x, tuple(made) or x.shape[2:], **arguments, **at)
    return value.reshape(*sizes, *value.shape[2:]), [*rest, *gives.split()]


def adapted(config: peft.PeftConfig, outputs: int = 8, inputs: int = 12) -> Any:
    """A linear layer with a peer's adapter, all of its parameters moved."""
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(inputs, outputs, bias=False)), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.base_model.model[0]


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("terms", [4, 5, 8])
def test_oft(terms):
    module = OFTRotationModule(3, 6, 4, 12, num_cayley_neumann_terms=terms)
    weight = 0.2 * torch.randn(3, 6)
    skew = mapped((weight, ["n", "e"]), "skew", "e", "x y", (4, 4))
    close(skew[0], module._pytorch_skew_symmetric(weight, 4))
    near, _ = mapped(skew, "neumann", "x y", "x y", terms=float(terms))
    close(near, module._cayley_batch(weight, 4, True, terms))
    exact, _ = mapped((-skew[0], skew[1]), "cayley", "x y", "x y")  # it turns the other way there
    close(exact, module._cayley_batch(weight, 4, False))


@pytest.mark.parametrize("terms", [2, 3])
def test_oft_with_few_terms_has_a_series_of_its_own(terms):
    """Theirs is I + 2Q with 2 terms, and with 3 what it is with 4; ours always ends with Q^(terms - 1)."""
    module = OFTRotationModule(3, 6, 4, 12)
    weight = 0.2 * torch.randn(3, 6)
    skew = mapped((weight, ["n", "e"]), "skew", "e", "x y", (4, 4))
    value = module._cayley_batch(weight, 4, True, terms)
    wanted = torch.eye(4) + 2 * skew[0] if terms == 2 else mapped(skew, "neumann", "x y", "x y", terms=4.0)[0]
    close(value, wanted)
    assert not torch.allclose(value, mapped(skew, "neumann", "x y", "x y", terms=float(terms))[0], atol=1e-3)


@pytest.mark.parametrize("neumann", [False, True])
def test_psoft(neumann):
    layer = OrthLayer(5, use_cayley_neumann=neumann)
    layer.reset_parameters()  # ones beside the turn
    with torch.no_grad():
        layer.weight.copy_(0.1 * torch.randn(10))
    skew = mapped((layer.weight, ["e"]), "skew", "e", "x y", (5, 5))
    arguments = {"terms": 5.0} if neumann else {}
    turn, _ = mapped(skew, "neumann" if neumann else "cayley", "x y", "x y", **arguments)
    close(turn, layer.get_matrix())


def test_boft():
    data = torch.randn(3, 4, 4)
    q = mapped((-data / 2, ["n", "x", "y"]), "antisymmetric", "x y", "x y")
    close(mapped(q, "cayley", "x y", "x y")[0], BOFTLayer.cayley_batch(None, data))  # it uses nothing of `self`


def test_lycoris_turns():
    blocks = torch.randn(3, 4, 4)
    q = mapped((blocks, ["n", "x", "y"]), "antisymmetric", "x y", "x y")
    close(mapped(q, "cayley", "x y", "x y")[0], diag_oft.get_r(blocks))


def test_hra():
    layer = adapted(peft.HRAConfig(r=4, target_modules=["0"]))
    u = layer.hra_u["default"]
    unit, legs = mapped((u, ["i", "r"]), "unit", "i", "i")  # (r, i)
    product, _ = mapped((unit @ unit.mT, ["r", "s"]), "reflections", "r s", "r s")
    assert legs == ["r", "i"]
    close(torch.eye(12) - unit.mT @ product @ unit, layer.get_delta_weight("default"))


def test_hra_with_orthogonal_vectors():
    layer = adapted(peft.HRAConfig(r=4, target_modules=["0"], apply_GS=True))
    columns, _ = mapped((layer.hra_u["default"], ["i", "r"]), "qr", "i r", "i r")
    close(torch.eye(12) - 2 * columns @ columns.mT, layer.get_delta_weight("default"))


def test_c3a():
    layer = adapted(peft.C3AConfig(block_size=4, target_modules=["0"]))
    block, legs = mapped((layer.c3a_kernel["default"], ["m", "n", "y"]), "roll", "y", "x y", (4, 4))
    assert legs == ["m", "n", "x", "y"]
    close(block.permute(0, 2, 1, 3).reshape(8, 12) / 12, layer.get_delta_weight("default"))


def test_shira():
    layer = adapted(peft.ShiraConfig(r=2, target_modules=["0"]))
    rows, columns = layer.shira_indices["default"].long()
    update, _ = mapped((layer.shira_weight["default"], ["n"]), "scatter", "n", "o i", (8, 12), at=rows * 12 + columns)
    close(update, layer.get_delta_weight("default").to_dense())


def test_vblora():
    config = peft.VBLoRAConfig(r=2, topk=3, num_vectors=16, vector_length=4, target_modules=["0"])
    layer = adapted(config)
    bank = layer.vblora_vector_bank["default"]
    a, b = layer._get_lora_matrices("default")
    pick_a, _ = mapped((layer.vblora_logits_A["default"], ["r", "t", "v"]), "topk_softmax", "v", "v", k=3.0)
    pick_b, _ = mapped((layer.vblora_logits_B["default"], ["u", "r", "v"]), "topk_softmax", "v", "v", k=3.0)
    assert (pick_a != 0).sum(-1).unique().tolist() == [3]
    close((pick_a @ bank).reshape(2, 12), a)
    close((pick_b @ bank).permute(0, 2, 1).reshape(8, 2), b)


def test_unilora():
    layer = adapted(peft.UniLoraConfig(r=2, target_modules=["0"], theta_d_length=16))
    a, b = layer._get_lora_matrices("default")
    theta = (layer.unilora_theta_d["default"], ["d"])
    for name, made, wanted in (("A", (2, 12), a), ("B", (8, 2), b)):
        at = getattr(layer, f"unilora_indices_{name}")["default"]
        picked, _ = mapped(theta, "gather", "d", "x y", made, at=at)
        close(picked * getattr(layer, f"unilora_scales_{name}")["default"], wanted)


@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_delora(scale):
    """Below its floor a vector is not brought to length 1."""
    layer = adapted(peft.DeloraConfig(r=2, target_modules=["0"]))
    a, b = layer.delora_A["default"], layer.delora_B["default"]
    with torch.no_grad():
        a.mul_(scale)
    unit_a, _ = mapped((a, ["r", "i"]), "unit", "i", "i", floor=1e-4)
    unit_b, _ = mapped((b, ["o", "r"]), "unit", "o", "o", floor=1e-4)  # (r, o)
    length, _ = mapped((layer.get_base_layer().weight, ["o", "i"]), "norm", "o", "")
    close(length, layer.delora_w_norm["default"])
    strength = layer.delora_lambda["default"]
    close(strength / 2 * unit_b.mT @ unit_a * length, layer.get_delta_weight("default"))


@pytest.mark.parametrize("method", ["relu", "qr"])
def test_deft(method):
    layer = adapted(peft.DeftConfig(r=3, target_modules=["0"], decomposition_method=method))
    p = layer.deft_P["default"]
    _, right = layer._project(p, "default")
    if method == "qr":
        close(mapped((p, ["o", "r"]), "qr", "o r", "o r")[0], right)
    else:
        close(map_function("relu")(p, ()), right)


@pytest.mark.parametrize(("outputs", "inputs"), [(8, 12), (9, 7), (5, 10)])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "haar"])
def test_waveft(family, outputs, inputs):
    """The column filter goes by the row half there, and the row filter by the column half."""
    config = peft.WaveFTConfig(n_frequency=15, target_modules=["0"], wavelet_family=family)
    layer = adapted(config, outputs, inputs)
    rows, columns = layer.waveft_indices["default"]
    extra = len(wavelet_filters(family)[0]) - 2
    a, b = -(-(outputs + extra) // 2), -(-(inputs + extra) // 2)
    places = rows * inputs + columns
    update = mapped((layer.waveft_spectrum["default"], ["n"]), "scatter", "n", "row col", (outputs, inputs), at=places)
    update = mapped(update, "pad", "row", "p a", (2, a))
    update = mapped(update, "pad", "col", "q b", (2, b))
    update = mapped(update, "wavelet", "q a", "o", (outputs,), family=family)
    update = mapped(update, "wavelet", "p b", "i", (inputs,), family=family)
    assert update[1] == ["o", "i"]
    close(config.scaling * update[0], layer.get_delta_weight("default"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_filters_are_pefts(family):
    low, high = wavelet_filters(family)
    theirs = Wavelet(family)
    assert max(abs(ours - other) for ours, other in zip(low, theirs.rec_lo, strict=True)) < 1e-11
    assert max(abs(ours - other) for ours, other in zip(high, theirs.rec_hi, strict=True)) < 1e-11


def test_what_peft_has_beside_our_families_is_not_orthonormal():
    """Why two are missing: sums of products of a filter with its even shifts must be 0, and its squares sum to 1."""
    table = importlib.import_module("peft.tuners.waveft.wavelet")._WAVELET_COEFFS
    assert {*table} - {*FAMILIES} == {"coif4", "coif5"}
    for name in ("coif4", "coif5"):
        low = Wavelet(name).rec_lo
        shifted = [sum(a * b for a, b in zip(low, low[shift:], strict=False)) for shift in range(0, len(low), 2)]
        assert max(abs(shifted[0] - 1), *map(abs, shifted[1:])) > 1e-2
