"""YAML → a validated `Spec`, source positions kept. No torch here."""

from tnpeft.spec.inits import init_function, register_init
from tnpeft.spec.library import find_shipped, list_specs, load_spec
from tnpeft.spec.model import Core, Spec, Term

__all__ = ["Core", "Spec", "Term", "find_shipped", "init_function", "list_specs", "load_spec", "register_init"]
