"""Metrics of attribution: how specific, how biased, how right."""

from retrac_scale.evaluate.specificity import largest_share, unique_fraction

__all__ = ["largest_share", "unique_fraction"]
