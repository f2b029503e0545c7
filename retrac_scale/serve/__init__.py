"""The report's page, live: an HTTP service over indexes."""

from retrac_scale.serve.app import create_app
from retrac_scale.serve.limits import Limits
from retrac_scale.serve.server import run

__all__ = ["Limits", "create_app", "run"]
