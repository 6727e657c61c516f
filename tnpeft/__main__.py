"""`python -m tnpeft`: the command line."""

from tnpeft.cli import main

main()
