"""The page's fields for what a spec is tried on: layer, input, and a slider for each param. Needs NiceGUI."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nicegui import ui

from tnpeft.editing.session import View
from tnpeft.editing.trial import Param, Trial, number_of, which_are_whole
from tnpeft.spec.pattern import KINDS

__all__ = ["TrialFields"]

_NUMBERS = {"inputs": "in", "outputs": "out", "groups": "groups"}
_TEXTS = {"kernel": "kernel", "input": "batch x sizes"}


class TrialFields:
    """`changed` is called with the new trial when a field or slider moves."""

    def __init__(self, changed: Callable[[Trial], None]) -> None:
        self._changed = changed
        self._trial = Trial()
        self._whole: dict[str, bool] = {}
        self._filling = False
        with ui.element("div").classes("tn-fields"):
            self.kind = ui.select(["Linear"], value="Linear", label="layer", on_change=self._kind_chosen)
            self.fields: dict[str, Any] = {}
            for name, label in _NUMBERS.items():
                self.fields[name] = ui.number(label, min=1, step=1, format="%d", on_change=self._number(name))
            for name, label in _TEXTS.items():
                self.fields[name] = ui.input(label, on_change=self._text(name))
            for name, field in (("kind", self.kind), *self.fields.items()):
                field.props("dense outlined options-dense").classes(f"tn-field tn-field-{name}")
        self.sliders = ui.element("div").classes("tn-sliders")
        self._params: dict[str, tuple[Any, Any, Any]] = {}

    def show(self, view: View) -> None:
        """Show a view's values in the fields."""
        self._filling = True
        self._trial = view.trial
        trial, spec = view.trial, view.spec
        if spec is not None and list(spec.layers) != self.kind.options:
            self.kind.set_options(list(spec.layers), value=trial.kind)
        _set(self.kind, trial.kind)
        axes = KINDS.get(trial.kind, 0)
        for name, field in self.fields.items():
            _set(field, getattr(trial, name))
            field.set_visibility(axes > 0 or name not in ("kernel", "groups"))
        if view.facts is not None and view.is_current:
            self._show_params(view.facts.params)
        self._filling = False

    def _show_params(self, params: tuple[Param, ...]) -> None:
        whole = which_are_whole(params, self._whole)
        if [*whole.items()] != [*self._whole.items()]:
            self._whole, self._params = whole, {}
            self.sliders.clear()
            with self.sliders:
                for param in params:
                    self._build_param(param, whole[param.name])
        for param in params:
            slider, number, reset = self._params[param.name]
            if slider.value != param.value:
                slider.props["max"] = max(param.most, slider.props["max"])
                slider.set_value(param.value)
            _set(number, param.value)
            reset.set_visibility(param.is_set)

    def _build_param(self, param: Param, whole: bool) -> None:
        with ui.element("div").classes("tn-param"):
            ui.label(param.name).classes("tn-param-name")
            slider = ui.slider(
                min=1 if whole else 0,
                max=param.most,
                step=1 if whole else param.most / 100,
                value=param.value,
                on_change=lambda event: self._param_moved(param.name, event.value, whole),
            )
            slider.props(f'aria-label="{param.name}"').classes(f"tn-slider tn-slider-{param.name}")
            number = ui.number(
                value=param.value,
                step=1 if whole else None,
                on_change=lambda event: self._param_moved(param.name, event.value, whole),
            )
            number.props("dense outlined").classes("tn-param-value")
            reset = ui.button("file", on_click=lambda: self._reset(param.name)).props("dense flat no-caps")
            reset.tooltip(f"back to the file's value: {param.default}")
        self._params[param.name] = slider, number, reset

    def _param_moved(self, name: str, value: Any, whole: bool) -> None:
        if self._filling or value is None:
            return
        self._change(replace(self._trial, params={**self._trial.params, name: number_of(value, whole)}))

    def _reset(self, name: str) -> None:
        left = {other: value for other, value in self._trial.params.items() if other != name}
        self._change(replace(self._trial, params=left))

    def _kind_chosen(self, event: Any) -> None:
        if self._filling or event.value is None:
            return
        axes = KINDS[event.value]
        kernel = self._trial.kernel if axes and "x" not in self._trial.kernel else ""
        self._change(replace(self._trial, kind=event.value, kernel=(kernel or "3") if axes else "", input=""))

    def _number(self, name: str) -> Callable[[Any], None]:
        return lambda event: None if event.value is None else self._put(name, int(event.value))

    def _text(self, name: str) -> Callable[[Any], None]:
        return lambda event: self._put(name, event.value or "")

    def _put(self, name: str, value: Any) -> None:
        if not self._filling:
            changes: dict[str, Any] = {name: value}
            self._change(replace(self._trial, **changes))

    def _change(self, trial: Trial) -> None:
        if trial != self._trial:
            self._trial = trial
            self._changed(trial)


def _set(field: Any, value: Any) -> None:
    if field.value != value:
        field.set_value(value)
