"""Lets `python -m rdpo` do what the `rdpo` command does."""

from rdpo.cli import script

raise SystemExit(script())
