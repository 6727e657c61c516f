"""What PEFT's folders hold beside layers: embeddings, `target_parameters`, `modules_to_save`, dropout. Both ways."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import assert_same, loaded, move, peft_of, with_peft
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tnpeft
from tnpeft.errors import AdapterFileError, TnpeftWarning

peft = pytest.importorskip("peft")

TOKENS = torch.arange(10).view(2, 5)


class Experts(nn.Module):
    """Two stacks of experts, a router and a square matrix; transposed ones are stored as (slices, inputs, outputs)."""

    def __init__(self, transposed: bool, slices: int) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = torch.randn(slices, 12, 6) / 3, torch.randn(slices, 6, 12) / 3
        self.up = nn.Parameter(up.mT.contiguous() if transposed else up)
        self.down = nn.Parameter(down.mT.contiguous() if transposed else down)
        self.gate = nn.Linear(6, slices)
        self.mix = nn.Parameter(torch.randn(6, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(-1)
        up, down = (self.up.mT, self.down.mT) if self.is_transposed else (self.up, self.down)
        hidden = torch.einsum("...i,eoi->...eo", x @ self.mix, up).tanh()
        return (torch.einsum("...ei,eoi->...eo", hidden, down) * shares[..., None]).sum(-2)


class Words(nn.Module):
    """An embedding, an attention, experts, and a head of several modules."""

    def __init__(self, transposed: bool = False, slices: int = 3, norm: Callable[[int], nn.Module] = nn.LayerNorm):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 6)
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)
        self.experts = Experts(transposed, slices)
        self.norm = norm(6)
        self.head = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        x = x + self.experts(x)
        return self.head(self.norm(x.flatten(0, 1)))


TARGETS = "target_parameters"
STACKS = ["experts.up", "experts.down"]
CASES: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["words"]},
    "embedding, DoRA": {"target_modules": ["words"], "use_dora": True},
    "embedding, rank and alpha of its own": {
        "target_modules": ["words", "gate"],
        "use_rslora": True,
        "rank_pattern": {"words": 4},
        "alpha_pattern": {"words": 9},
    },
    "stacks": {"target_modules": [], "target_parameters": STACKS},
    "parameters and a layer inside their owner": {
        "target_modules": ["gate", "words"],
        "target_parameters": ["experts.up", "down", "mix"],
        "rank_pattern": {"experts.up": 3},
        "alpha_pattern": {"down": 9},
    },
    "an attention's parameter": {"target_modules": [], "target_parameters": ["attend.in_proj_weight"]},
    "a layer's weight": {"target_modules": [], "target_parameters": ["gate.weight"]},
    "an embedding's weight": {"target_modules": [], "target_parameters": ["words.weight"]},
    "a whole head": {"target_modules": ["gate"], "modules_to_save": ["head"]},
    "some of a head, and biases": {"target_modules": ["words"], "modules_to_save": ["head.1", "norm"], "bias": "all"},
    "a whole embedding": {"target_modules": ["gate"], "modules_to_save": ["words"], "bias": "lora_only"},
    "dropout": {"target_modules": ["gate", "words"], "lora_dropout": 0.25},
}
KINDS = {"stacks": (False, 3), "transposed": (True, 3), "one slice": (False, 1)}


@pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"
)  # of parameters, which it takes
@pytest.mark.parametrize(
    ("case", "kind"),
    [
        (case, kind)
        for case in CASES
        for kind in KINDS
        if kind == "stacks" or "experts.up" in CASES[case].get(TARGETS, [])
    ],
)
def test_both_ways(case: str, kind: str, tmp_path: Path):
    make = lambda: Words(*KINDS[kind])  # noqa: E731 - a name for what is made thrice
    theirs = with_peft(peft.LoraConfig(r=2, lora_alpha=5, **CASES[case]), make())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = loaded(tmp_path / "theirs", make())
    assert_same(ours(TOKENS), theirs(TOKENS))
    tnpeft.save_foreign(ours, tmp_path / "ours", "peft")
    assert_same(peft_of(tmp_path / "ours", make())(TOKENS), theirs(TOKENS))
    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert config["lora_dropout"] == CASES[case].get("lora_dropout", 0.0)


def test_lora_dropout_is_ours(tmp_path: Path):
    with_peft(peft.LoraConfig(r=2, target_modules=["gate", "words"], lora_dropout=0.25), Words()).save_pretrained(
        tmp_path
    )
    model = loaded(tmp_path, Words())
    adapters = tnpeft.Handle(model, "default").adapters
    assert {name: str(each.dropout) for name, each in adapters.items()} == {
        "words": "None",
        "experts.gate": "input 0.25",
    }


def test_dropout_of_kronecker_products(tmp_path: Path):
    config = peft.LoKrConfig(r=2, target_modules=["gate"], rank_dropout=0.5, module_dropout=0.25)
    with_peft(config, Words()).save_pretrained(tmp_path / "theirs")
    model = Words()
    with pytest.warns(TnpeftWarning) as caught:
        handle = tnpeft.load_foreign(model, tmp_path / "theirs")
    assert str(caught[0].message) == (
        f"{tmp_path / 'theirs'}: `rank_dropout`: expected an option that has a counterpart here, found PEFT's, which "
        "drops rows of an update. The update is the same; training here drops none: `dropout={'bond': ...}` of "
        "`attach` drops entries of bonds."
    )
    assert str(handle.adapters["experts.gate"].dropout) == "module 0.25"
    tnpeft.save_foreign(model, tmp_path / "ours", "peft")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["module_dropout"] == 0.25


def test_dropout_that_peft_has_no_word_for(tmp_path: Path):
    model = Words()
    tnpeft.attach(model, "lora", match="gate", dropout={"bond": 0.5})
    with pytest.warns(TnpeftWarning) as caught:
        tnpeft.save_foreign(model, tmp_path / "ours", "peft")
    assert str(caught[0].message) == (
        f"{tmp_path / 'ours'}: `dropout`: expected `input` alone, alike on all layers and without parameters, which is "
        "PEFT's `lora_dropout`, found bond 0.5. The folder says none: set it there, if training goes on."
    )


def test_running_statistics_go_with_their_norm(tmp_path: Path):
    model = Words(norm=nn.BatchNorm1d)
    tnpeft.attach(model, "lora", match="gate", train={"norm": True})
    move(model)
    model.train()(TOKENS)
    model.eval()
    tnpeft.save_foreign(model, tmp_path, "peft")
    assert_same(peft_of(tmp_path, Words(norm=nn.BatchNorm1d))(TOKENS), model(TOKENS))
    assert_same(loaded(tmp_path, Words(norm=nn.BatchNorm1d))(TOKENS), model(TOKENS))


def test_a_module_whose_name_others_end_with(tmp_path: Path):
    """PEFT takes those too, and wants their values in the file."""
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(13)))
    base = copy.deepcopy(model)
    tnpeft.attach(model, "lora", match="^3$", train={"also": ["^2"]})
    move(model)
    tnpeft.save_foreign(model, tmp_path, "peft")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["12", "2"]
    assert_same(peft_of(tmp_path, copy.deepcopy(base))(torch.eye(3)), model(torch.eye(3)))
    assert_same(loaded(tmp_path, base)(torch.eye(3)), model(torch.eye(3)))


def test_orientations_and_frozen_copies_as_peft_takes_them(tmp_path: Path):
    """Of a stack that PEFT takes the other way round, and of a spec with a frozen copy, which is twice the rank."""
    model = Words()
    tnpeft.attach(model, "pissa", match="words", parameters={"experts.up": "e i o", "mix": "i o"}, r=2)
    move(model)
    tnpeft.save_foreign(model.eval(), tmp_path, "peft")
    assert_same(peft_of(tmp_path, Words())(TOKENS), model(TOKENS))


def attached(match: Any, spec: str = "lora", make: Callable[[], nn.Module] = Words, **options: Any) -> nn.Module:
    model = make()
    tnpeft.attach(model, spec, match=match, **options)
    return model


class Bag(Words):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(11, 6)


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(6))


class Beside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.line = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)


class Meta(Words):
    """With a bias that has no values here."""

    def __init__(self) -> None:
        super().__init__()
        self.head[0].bias = nn.Parameter(torch.empty(6, device="meta"))


KEEP = "Merge it into the model instead, or keep it in tnpeft's own file."
OWN = "expected a module of its own, which nothing else adapts, found"
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "method of an embedding": (
        lambda: attached("words", "loha"),
        f"layer 'words': PEFT's embeddings: expected LoRA on an `nn.Embedding`, found loha on Embedding. {KEEP}",
    ),
    "bag": (
        lambda: attached("words", make=Bag),
        f"layer 'words': PEFT's embeddings: expected LoRA on an `nn.Embedding`, found lora on EmbeddingBag. {KEEP}",
    ),
    "method of a parameter": (
        lambda: attached("gate", "dora", parameters={"mix$": "o i"}),
        "parameter 'experts.mix': PEFT's `target_parameters`: expected LoRA without magnitudes, found DoRA. " + KEEP,
    ),
    "parameter of the model itself": (
        lambda: attached((), make=Root, parameters={"mix": "o i"}),
        "parameter 'mix': PEFT's `target_parameters`: expected a parameter of a module inside the model, found one of "
        f"the model itself. {KEEP}",
    ),
    "output projection of an attention": (
        lambda: attached("out_proj"),
        "layer 'attend.out_proj': PEFT's layers: expected a layer that is called: its LoRA has no effect on others, "
        f"found the output projection of an attention. {KEEP}",
    ),
    "module around an adapter": (
        lambda: attached("gate", train={"also": [r"experts\.mix"]}),
        f"module 'experts': PEFT's `modules_to_save`: {OWN} one with an adapter on 'experts.gate'. {KEEP}",
    ),
    "a name that others end with": (
        lambda: attached(
            "12", make=lambda: nn.Sequential(*(nn.Linear(3, 3) for _ in range(13))), train={"also": ["^2"]}
        ),
        f"module '12': PEFT's `modules_to_save`: {OWN} one with an adapter on '12', and PEFT takes each whose name "
        f"ends with '2'. {KEEP}",
    ),
    "the model itself": (
        lambda: attached(["line"], make=Beside, train={"also": ["scale"]}),
        f"module '': PEFT's `modules_to_save`: {OWN} the model itself. {KEEP}",
    ),
    "on the meta device": (
        lambda: attached("gate", make=Meta, train={"also": [r"head\.0\.weight"]}),
        "PEFT's `modules_to_save`: expected values of the whole module, found none of 'head.0.bias'. Bring it back "
        "from where it is offloaded to, or keep the adapter in tnpeft's own file.",
    ),
    "biases beside LoHa": (
        lambda: attached("gate", "loha", train={"bias": "adapted"}),
        "parameters trained beside the cores: expected no biases of adapted layers beside LoHa and LoKr, found "
        "'experts.gate.bias'. Train the cores alone, or merge the adapter.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_hold(case: str, tmp_path: Path):
    make, text = REFUSED[case]
    model = make()
    with pytest.raises(AdapterFileError) as caught:
        tnpeft.save_foreign(model, tmp_path / "a", "peft")
    assert str(caught.value) == f"{tmp_path / 'a'}: {text}"
    assert not (tmp_path / "a").exists()


def test_files_that_do_not_fit(tmp_path: Path):
    config = peft.LoraConfig(r=2, target_modules=["words"], target_parameters=STACKS)
    with_peft(config, Words()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    root = "base_model.model"

    def refused(model: nn.Module | None = None, options: dict[str, Any] | None = None, **changed: Tensor | None) -> str:
        values = {**tensors, **{key.replace("__", "."): value for key, value in changed.items()}}
        save_file({key: value for key, value in values.items() if value is not None}, path)
        said = tmp_path / "adapter_config.json"
        said.write_text(json.dumps({**json.loads(said.read_text()), **(options or {"target_parameters": STACKS})}))
        with pytest.raises(AdapterFileError) as caught:
            tnpeft.load_foreign(Words() if model is None else model, tmp_path)
        return str(caught.value).removeprefix(f"{tmp_path}: ")

    up = f"{root}.experts.base_layer.lora_A.weight"
    made_for = "Load the file onto the model it was made for."
    assert refused(**{up: torch.ones(7, 6)}) == (
        f"layer 'experts.up': tensor '{up}': expected an axis 0 that 3 slices divide, found (7, 6). {made_for}"
    )
    assert refused(options={"target_parameters": ["experts.up"]}) == (
        f"tensor '{up}': expected one of the 1 parameters of 'experts' that `target_parameters` has, found the one "
        f"before 1 others. {made_for}"
    )
    assert refused(options={"target_parameters": "experts.up"}) == (
        "`target_parameters`: expected a list of names, found 'experts.up'. Mend `adapter_config.json`."
    )
    words = torch.zeros(11, 6)
    assert refused(**{f"{root}.words.base_layer.weight": words}) == (
        "weight 'words.weight' below an adapter: expected that of this model, found another. Give the model this "
        "weight first: the file has it, and an adapter on top of it."
    )
    assert refused(options={"lora_dropout": 2, "target_parameters": STACKS}) == (
        "`dropout`, `input`: expected a probability below 1, found 2. Write how likely an entry is to be dropped, such "
        "as 0.1."
    )


def test_the_base_below_an_embedding_is_left_out(tmp_path: Path):
    """PEFT saves it with the adapter, for vocabularies that grew."""
    theirs = with_peft(peft.LoraConfig(r=2, target_modules=["words"]), Words())
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.words.base_layer.weight": Words().words.weight.detach()}, path)
    model = loaded(tmp_path, Words())
    assert_same(model(TOKENS), theirs(TOKENS))
    assert tnpeft.Handle(model, "default").report().also == 0
