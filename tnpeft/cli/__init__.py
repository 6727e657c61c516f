"""The command line, the only room that prints. torch is imported only by the commands that build a model."""

from tnpeft.cli import model_commands as model_commands  # its commands are on the app once it is imported
from tnpeft.cli.app import app, main

__all__ = ["app", "main"]
