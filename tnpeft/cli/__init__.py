"""The command line, the only room that prints. torch is imported only by the commands that build a model."""

from tnpeft.cli.app import app, main

__all__ = ["app", "main"]
