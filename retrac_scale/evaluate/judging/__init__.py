"""Judging scores of any method against a ground truth; needs neither torch nor this package's engine."""

from retrac_scale.evaluate.judging.base import Figure, Truth, truth, truths
from retrac_scale.evaluate.judging.groups import Groups
from retrac_scale.evaluate.judging.judgement import Judgement, judge
from retrac_scale.evaluate.judging.subsets import Subsets
from retrac_scale.evaluate.judging.wanted import Wanted

__all__ = ["Figure", "Groups", "Judgement", "Subsets", "Truth", "Wanted", "judge", "truth", "truths"]
