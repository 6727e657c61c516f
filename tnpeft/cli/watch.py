"""`--watch`: a command that runs again for files that changed, until Ctrl-C."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from tnpeft.cli.output import Output
from tnpeft.documents.paths import is_file
from tnpeft.editing.watching import changes
from tnpeft.errors import TnpeftError
from tnpeft.spec import list_specs
from tnpeft.spec.library import shipped_folder

__all__ = ["watch"]


def watch(output: Output, names: Sequence[str], action: Callable[[Sequence[str]], object]) -> None:
    """Run `action` on all names, then on each file that changes. Its mistakes are printed, and the watch goes on."""
    shipped = {str(shipped_folder() / f"{name}.yaml"): name for name in names if name in list_specs()}
    with contextlib.suppress(KeyboardInterrupt):
        for number, changed in enumerate(changes([*names, *shipped])):
            there = [shipped.get(file, file) for file in sorted(changed) if is_file(file)]
            try:
                if there or not number:
                    action(there if number else names)
            except TnpeftError as error:
                for problem in error.problems:
                    output.mistake(problem)
