"""From YAML to a checked `Declaration` that keeps source positions. No torch here."""

from tnpeft.spec.declaration import Core, Declaration, Term
from tnpeft.spec.inits import init_function, register_init
from tnpeft.spec.library import find_shipped, list_specs
from tnpeft.spec.maps import register_map

__all__ = [
    "Core",
    "Declaration",
    "Term",
    "find_shipped",
    "init_function",
    "list_specs",
    "register_init",
    "register_map",
]
