"""Names from other libraries, and the names that they have here."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from tnpeft.errors import Problem, near_miss, ticked

__all__ = ["advice_on", "is_word", "unknown_params"]

# What `attach` takes beside the params of specs.
ATTACH = (
    *("match", "exclude", "kinds", "layers", "ranks", "name", "train", "scopes", "dropout"),
    *("init", "seed", "mode", "autotune"),
)

_MATCH = "`match` says which layers: a regular expression on their names, a list of names, or `all`."
_EXCLUDE = "`exclude` says which layers to leave out: a regular expression on their names, or a list of names."
_BLOCKS = "`layers` says in which numbered blocks: `0-5, 8`, say."
_RANKS = "`ranks` has params by regular expressions on layers' names: `{'q_proj$': {'r': 8}}`, say."
_KINDS = "`kinds` says which kinds of layers of the spec's are meant: `Linear`, say."
_ALSO = "`train` says what trains beside the cores: its `also` takes regular expressions on parameters' names."
_BIAS = "`train` says what trains beside the cores: its `bias` is `none`, `adapted` or `all`."
_NORM = "`train` says what trains beside the cores: its `norm` is `true`, `false` or `all`."
_DROPOUT = "`dropout`, of `attach` and of entries of recipes, says what training drops: `{'input': 0.05}`, say."
_METHOD = "The spec is the method: take another one, such as `loha`."
_DORA = "Take a spec with a trained magnitude, such as `dora`."
_TUCKER = "Take a spec with a Tucker core, such as `locon_tucker`, `loha_tucker` or `lokr_tucker`."
_INIT = "A spec says how each core starts: copy it and change `init` there, or give values by `attach(init=...)`."
_SCALE = "A spec has its own `scale`; `tnpeft.activate(model, {name: scale})` multiplies it."
_NEEDLESS = "tnpeft needs no such setting: leave it out."
_OPTIMISER = "Give it to the optimiser."

# The name here, then the names elsewhere.
_SAME = {
    "r": "rank dim lora_r lora_rank lora_dim network_dim network_rank linear_dim conv_dim n_rank",
    "alpha": "lora_alpha network_alpha linear_alpha conv_alpha alphas",
    "match": "target_modules target_module target_layers target_names targets target modules module_names "
    "layer_names include_modules include pattern patterns regex",
    "exclude": "exclude_modules ignore ignore_modules skip_modules",
    "kinds": "layer_types module_types target_types",
    "layers": "layers_to_transform layers_pattern blocks layer_indices block_indices",
    "ranks": "rank_pattern alpha_pattern block_dims block_alphas",
    "name": "adapter_name adapter",
    "seed": "random_state random_seed manual_seed init_seed",
    "dropout": "lora_dropout network_dropout rank_dropout module_dropout dropout_p dropout_prob hada_dropout",
    "autotune": "tune benchmark",
}
_SENTENCES = {
    _MATCH: _SAME["match"],
    _EXCLUDE: _SAME["exclude"],
    _KINDS: _SAME["kinds"],
    _BLOCKS: _SAME["layers"],
    _RANKS: _SAME["ranks"],
    _ALSO: "modules_to_save trainable_modules trainable_token_indices",
    _BIAS: "bias biases train_bias train_biases",
    _NORM: "norm norms train_norm train_norms",
    _DROPOUT: f"dropout {_SAME['dropout']}",
    _METHOD: "algo algorithm network_module peft_type method adapter_type peft_config config",
    _DORA: "use_dora weight_decompose dora_wd",
    "Take the spec `rslora`.": "use_rslora rs_lora",
    "Take the spec `lokr_both`.": "decompose_both",
    _TUCKER: "use_tucker use_cp use_effective_conv2d conv_cp",
    _INIT: "init inits init_weights init_lora_weights initialization",
    _SCALE: "scale scaling multiplier lora_scale network_multiplier",
    _NEEDLESS: "task_type inference_mode fan_in_fan_out base_model_name_or_path",
    _OPTIMISER: "lr learning_rate weight_decay",
    "Write each param by itself: `r=8`, say.": "params kwargs hyperparameters network_args",
    "Cores are made where their layer's weight is: leave it out.": "device",
}
_MEANT = {word: name for name, words in _SAME.items() for word in words.split()}
_ADVICE = {word: sentence for sentence, words in _SENTENCES.items() for word in words.split()}


def advice_on(name: str, known: Collection[str], also: Collection[str] = ()) -> str:
    """What to write for an unknown name: the name meant, or how that is done here; may be empty.

    `known` are the names allowed in its place, `also` names allowed beside these.
    """
    word = name.casefold()
    meant = _MEANT.get(word)
    if meant in known or (meant in also and word not in _ADVICE):
        return f"Did you mean `{meant}`?"
    if word in _ADVICE:
        return _ADVICE[word]
    if meant is not None:
        return near_miss(name, known) or f"There is no `{meant}` here: leave it out."
    return near_miss(name, [*known, *also])


def is_word(name: str) -> bool:
    """Whether it is another library's name for something that has another name here."""
    return name.casefold() in _MEANT


def unknown_params(
    what: str, given: Iterable[str], known: Collection[str], also: Collection[str] = ()
) -> Iterator[Problem]:
    """A problem for each given name that is no known param; `what` says whose params they are."""
    for name in given:
        if name not in known:
            expected = f"one of {', '.join(known)}" if known else "none"
            fix = advice_on(name, known, also) or "Remove it."
            yield Problem(what, expected, ticked(name), fix)


def value_of_param(name: str, value: object) -> str:
    """What to write for a number beside `params` that belongs in them; empty for others."""
    word = name.casefold()
    if isinstance(value, bool) or not isinstance(value, int | float) or word in _ADVICE or word in ATTACH:
        return ""
    return f"params: {{{_MEANT.get(word, name)}: {value:g}}}"
