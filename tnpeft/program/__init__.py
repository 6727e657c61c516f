"""Plan to program: straight-line torch code of pairwise contractions."""

from tnpeft.program.model import Program, build_program

__all__ = ["Program", "build_program"]
