"""Plan to program: straight-line torch code of pairwise contractions."""

from tnpeft.program.model import Program, build_program
from tnpeft.program.total import Constants, without_autocast

__all__ = ["Constants", "Program", "build_program", "without_autocast"]
