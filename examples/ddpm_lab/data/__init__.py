"""Volumes: which files, what is in them, in which order they come, and a population of made-up ones."""
