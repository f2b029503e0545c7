"""retrac-scale: the command line."""

from retrac_scale.cli.main import main

__all__ = ["main"]
