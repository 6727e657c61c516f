"""A text on its way to the page: what is shown at once, what follows, and what is given up."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnpeft
from tnpeft.draw import draw_network
from tnpeft.draw.diagram import diagram_of
from tnpeft.draw.placing import place, place_near
from tnpeft.editing.background import Background, Refused
from tnpeft.editing.computing import computed
from tnpeft.editing.document import NEW, shipped_text
from tnpeft.editing.facts import attach_line, facts_of
from tnpeft.editing.live_picture import LivePicture
from tnpeft.editing.reading import read_spec
from tnpeft.editing.session import Session, Slow, View
from tnpeft.editing.tables import cores_html, costs_html, directions_html, mistakes_html, spread_html, summary_html
from tnpeft.editing.trial import Trial, number_of, params_of, typical_trial, which_are_whole
from tnpeft.errors import BindError, TnpeftError
from tnpeft.network import Layer, Spec, load_spec
from tnpeft.verify.case import Case
from tnpeft.verify.directions import directions_on


class Here:
    """Computes in this process what the page's second process does."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.picture = LivePicture()

    async def ask(self, stage: str, text: str, trial: Trial) -> dict[str, Any]:
        self.asked.append((stage, text))
        await asyncio.sleep(0)
        return computed(stage, text, trial, self.picture)


def played(play: Callable[[Session], Awaitable[None]], text: str = NEW) -> tuple[list[View], Here]:
    """The views of a session that `play` edits."""
    views: list[View] = []
    here = Here()

    async def run() -> None:
        session = Session(text, "<spec>", here, views.append)  # type: ignore[arg-type]
        session.edit(trial=Trial("Linear", 12, 8))
        await session.settled()
        await play(session)
        await session.settled()
        session.close()

    asyncio.run(run())
    return views, here


async def nothing(session: Session) -> None:
    pass


def test_a_text_is_shown_drawn_and_computed():
    views, here = played(nothing)
    last = views[-1]
    network = Spec.from_yaml(NEW).bind(Layer("Linear", 12, 8))
    assert last.is_current
    assert last.mistakes == ()
    assert last.svg == draw_network(network).data()
    assert last.facts is not None
    assert last.facts.parameters == 4 * (12 + 8)
    assert [stage for stage, _ in here.asked] == ["costs", "spread", "directions"]
    assert all(slow.current for slow in last.slow.values())
    assert last.slow["directions"].answer == directions_on(Spec.from_yaml(NEW), Case("Linear", 12, 8)).as_dict()
    # mistakes and counts come first, the picture next, the rest one after the other
    assert [view.svg is not None for view in views[:2]] == [False, True]
    assert [sum(slow.current for slow in view.slow.values()) for view in views[1:]] == [0, 1, 2, 3]


def test_a_mistake_leaves_the_last_good_picture_and_says_that_it_is_old():
    async def play(session: Session) -> None:
        session.edit(NEW.replace("zeros", "zeos"))

    views, _ = played(play)
    last = views[-1]
    assert [mistake.line for mistake in last.mistakes] == [8]
    assert not last.is_current
    assert last.svg == views[1].svg is not None
    assert last.facts == views[1].facts is not None
    assert not any(slow.current for slow in last.slow.values())
    assert all(slow.answer for slow in last.slow.values())


def test_a_mistake_that_is_mended_brings_the_picture_up_to_date():
    async def play(session: Session) -> None:
        session.edit(NEW.replace("zeros", "zeos"))
        await session.settled()
        session.edit(NEW.replace("{r: 4}", "{r: 2}"))

    views, _ = played(play)
    network = Spec.from_yaml(NEW.replace("{r: 4}", "{r: 2}")).bind(Layer("Linear", 12, 8))
    assert views[-1].is_current
    assert views[-1].svg == draw_network(network).data()


def test_what_is_superseded_is_not_computed():
    async def play(session: Session) -> None:
        for rank in range(1, 30):
            session.edit(NEW.replace("{r: 4}", f"{{r: {rank}}}"))
            await asyncio.sleep(0.001)

    views, here = played(play)
    texts = [text for stage, text in here.asked if stage == "costs"]
    assert texts[-1] == NEW.replace("{r: 4}", "{r: 29}")
    assert len(texts) < 10
    assert views[-1].network is not None
    assert views[-1].network.params == {"r": 29}


def test_params_of_the_trial_are_tried_and_the_text_stays():
    async def play(session: Session) -> None:
        session.edit(trial=replace(session.view.trial, params={"r": 7}))

    views, _ = played(play)
    last = views[-1]
    assert last.text == NEW
    assert last.network is not None
    assert last.network.params == {"r": 7}
    assert attach_line("a b.yaml", last.network, last.trial) == (
        'handle = tnpeft.attach(model, "a b.yaml", match="all", r=7)'
    )
    assert [
        (param.name, param.value, param.is_set, param.default) for param in params_of(last.network, last.trial)
    ] == [("r", 7, True, "4")]


def test_another_spec_gets_a_layer_that_it_takes():
    async def play(session: Session) -> None:
        session.edit(shipped_text("tenvoo_l"), new=True)

    views, _ = played(play)
    assert views[-1].is_current
    assert views[-1].trial == Trial("Conv3d", 64, 128, "3")


def test_a_layer_that_is_none_is_a_mistake_about_the_layer():
    async def play(session: Session) -> None:
        session.edit(trial=Trial("Conv2d", 12, 8, "3x"))

    views, _ = played(play)
    assert [mistake.text for mistake in views[-1].mistakes] == [
        "the layer's kernel: expected whole numbers with `x` between them, found '3x'. Write `3`, say."
    ]
    assert views[-1].svg is not None


@pytest.mark.parametrize("name", ["lora", "loha", "tenvoo_l", "oft", "glora", "hierarchical_tucker"])
def test_the_live_picture_ends_as_the_command_draws_it(name: str):
    network = typical(name)
    live = LivePicture()
    live.keep(LivePicture().search(network))
    drawing = live.draw(network)
    assert drawing.final
    assert drawing.svg == draw_network(network).data()
    assert live.finish(network, "png") == draw_network(network).data("png")
    assert live.finish(network, "pdf").startswith(b"%PDF-")


def test_a_changed_network_is_drawn_near_to_where_it_was():
    text = shipped_text("tenvoo_l")
    live = LivePicture()
    assert live.draw(typical("tenvoo_l")).final
    changed = Spec.from_yaml(text.replace("kw k l m", "kw k l").replace("o3 m n p", "o3 n p"))
    assert not live.draw(changed.bind(Layer("Conv3d", 64, 128, (3, 3, 3)))).final


def typical(name: str) -> Any:
    spec = load_spec(name)
    return spec.bind(typical_trial(spec).layer())


@pytest.mark.parametrize("name", ["lora", "tenvoo_l", "quanta", "mpo"])
def test_placements_near_the_best_stay_the_best(name: str):
    network = typical(name)
    diagram = diagram_of(network.plain.parts[0], network)
    best = place(diagram)
    known = {node.name: at for node, at in zip(diagram.nodes, best, strict=True)}
    assert place_near(diagram, known) == best
    without = {key: at for key, at in known.items() if key != diagram.nodes[-1].name}
    found = place_near(diagram, without)
    assert len({*found}) == len(found)
    assert np.isfinite(found).all()


def test_trials_survive_json():
    trial = Trial("Conv3d", 8, 6, "3x3x1", 2, "1x4x4x4", {"r": 2})
    assert Trial.from_data(trial.data()) == trial
    assert trial.layer() == Layer("Conv3d", 8, 6, (3, 3, 1), 2)
    assert Trial.on(trial.layer()) == Trial("Conv3d", 8, 6, "3x3x1", 2)


def test_sliders_of_whole_params_give_whole_numbers():
    spec = Spec.from_yaml(NEW.replace("{r: 4}", "{r: 4, alpha: 0.5, beta: r}") + "scale: alpha * beta / r\n")

    def params(**tried: float) -> tuple[Any, ...]:
        trial = Trial("Linear", 12, 8, params=tried)
        return params_of(spec.bind(trial.layer(), **tried), trial)

    whole = which_are_whole(params(), {})
    assert whole == {"r": True, "alpha": False, "beta": True}
    assert which_are_whole(params(beta=0.5, alpha=2), whole) == whole, "tried, not written"
    changed = Spec.from_yaml(spec.text.replace("alpha: 0.5", "alpha: 1"))
    network = changed.bind(Trial("Linear", 12, 8).layer())
    assert which_are_whole(params_of(network, Trial()), whole)["alpha"]
    assert [repr(number_of(value, True)) for value in (5, 5.0, 5.5)] == ["5", "5", "5.5"]
    assert [repr(number_of(value, False)) for value in (5, 5.5)] == ["5.0", "5.5"]


@pytest.mark.parametrize(
    ("trial", "said"),
    [
        (Trial("Conv9d"), "the kind of layer: expected one of Linear, Conv1d, Conv2d, Conv3d, ConvTranspose1d, "
         "ConvTranspose2d, ConvTranspose3d, found 'Conv9d'. Did you mean `Conv3d`?"),
        (Trial("Linear", 0, 4), "the layer's inputs: expected a positive number, found 0. Mend that number."),
        (Trial("Conv2d", 4, 4, "3x3x3"), "the layer's kernel: expected 2 sizes, found 3. Write `3`, or 3x3."),
        (Trial("Conv2d", 4, 6, "3", 4), "groups: expected channel counts that 4 divides, found 4 and 6. "
         "Mend `groups` or the channel counts."),
        (Trial("Conv2d", 4, 4, "0"), "the layer's kernel: expected positive numbers, found a zero. Mend that number."),
    ],
)  # fmt: skip
def test_layers_that_are_none(trial: Trial, said: str):
    with pytest.raises(BindError) as error:
        trial.layer()
    assert str(error.value) == said


def test_inputs_of_a_call():
    layer = Layer("Conv2d", 4, 4, (3, 3))
    assert str(Trial(input="2x5x6").call(layer)) == "batch 2, 5x6 -> 5x6"
    assert str(Trial(input="7").call(Layer("Linear", 4, 4))) == "7 rows"
    with pytest.raises(BindError) as error:
        Trial(input="5").call(layer)
    assert str(error.value) == "the input: expected batch and 2 sizes, found 1 numbers. Write 1x24x24, say."


def test_every_text_of_a_file_is_escaped():
    text = NEW.replace("name: my_adapter", 'name: a\ntitle: "<script>x</script>"').replace("{r: 4}", '{r: "4 < 5"}')
    spec = Spec.from_yaml(NEW)
    network = spec.bind(Layer("Linear", 8, 8))
    facts = replace(facts_of(network, Trial()), formula="<b>", einsum="<i>", cores=(("<u>",) * 5,))
    shown = summary_html(facts) + cores_html(facts)
    assert not any(tag in shown for tag in ("<b>", "<i>", "<u>"))
    mistakes = read_spec(text + "<img src=x onerror=alert(1)>: 3\n").mistakes
    assert mistakes
    assert "<img" not in mistakes_html(mistakes)


def test_tables_hold_what_was_computed():
    spec, trial = Spec.from_yaml(NEW), Trial("Linear", 12, 8)
    picture = LivePicture()
    costs, spread, directions = (
        Slow(computed(stage, spec.text, trial, picture), "", True) for stage in ("costs", "spread", "directions")
    )
    assert "<td>dense</td>" in costs_html(costs)
    assert "std T / std W" in spread_html(spread)
    assert "of the directions" in directions_html(directions)
    assert costs_html(Slow(None, "too large", True)) == "<p>too large</p>"
    assert costs_html(Slow()) == "<p>computing ...</p>"


@pytest.mark.parametrize("stage", ["spread", "directions"])
def test_a_weight_that_would_fill_the_memory_is_not_made(stage: str):
    with pytest.raises(BindError) as error:
        computed(stage, NEW, Trial("Linear", 100_000, 100_000), LivePicture())
    assert str(error.value) == (
        "this weight: expected at most 16,777,216 entries here, found 10,000,000,000. Try a smaller layer."
    )
    assert computed("costs", NEW, Trial("Linear", 100_000, 100_000), LivePicture())["rows"]


def test_a_stage_that_is_refused_says_why_and_the_rest_goes_on():
    class Refusing(Here):
        async def ask(self, stage: str, text: str, trial: Trial) -> dict[str, Any]:
            if stage == "spread":
                raise Refused("No answer in 60 s: try a smaller layer.")
            return await super().ask(stage, text, trial)

    views: list[View] = []

    async def run() -> None:
        session = Session(NEW, "<spec>", Refusing(), views.append)  # type: ignore[arg-type]
        session.edit()
        await session.settled()
        session.close()

    asyncio.run(run())
    assert views[-1].slow["spread"] == Slow(None, "No answer in 60 s: try a smaller layer.", True)
    assert views[-1].slow["directions"].answer


@pytest.mark.slow
def test_the_second_process_answers_refuses_and_is_replaced():
    async def run() -> None:
        background = Background()
        trial = Trial("Linear", 12, 8)
        answer = await background.ask("costs", NEW, trial)
        assert answer == computed("costs", NEW, trial, LivePicture())
        with pytest.raises(Refused) as refusal:
            await background.ask("costs", NEW, replace(trial, kind="Conv9d"))
        assert str(refusal.value).startswith("the kind of layer: expected one of Linear")
        background.stop()
        assert await background.ask("costs", NEW, trial) == answer
        await background.close()

    asyncio.run(run())


NOISY = """\
import json, sys
sys.stdout.write('{"number": 0}\\n[1]\\nhello')
loads = json.loads
def said(text):
    print("a library's warning", end="")
    return loads(text)
json.loads = said
"""


@pytest.mark.slow
@pytest.mark.parametrize("noise", [NOISY, "print('x' * 2**25, end='', flush=True)"], ids=["lines", "no end"])
def test_what_a_library_prints_is_no_answer_and_ends_nothing(noise: str, tmp_path: Path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(noise)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(tnpeft.__file__).parents[1])]))
    trial = Trial("Linear", 12, 8)

    async def run() -> None:
        background = Background()
        if noise == NOISY:
            expected = computed("costs", NEW, trial, LivePicture())
            assert [await background.ask("costs", NEW, trial) for _ in range(2)] == [expected] * 2
        else:
            with pytest.raises(Refused, match=r"The process that computes it ended\."):
                await background.ask("costs", NEW, trial)
        await background.close()

    asyncio.run(run())


@pytest.mark.parametrize("stage", ["spread", "directions"])
def test_cores_larger_than_the_memory_are_refused_before_they_are_made(stage: str):
    trial = Trial("Linear", 64, 128, params={"r": 10**7})
    with pytest.raises(TnpeftError) as refusal:
        computed(stage, NEW, trial, LivePicture())
    assert str(refusal.value) == (
        "these cores: expected at most 16,777,216 entries here, found 1,920,000,000. Try a smaller size of the cores."
    )
