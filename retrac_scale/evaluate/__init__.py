"""Metrics of attribution, and ground truths to judge scores by: how specific, how biased, how right.

Names stand in `__init__.pyi` and are imported when they are first used: judging needs no torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
