"""Training-data attribution for diffusion models at scale: Diffusion-TracIn and Diffusion-ReTrac (arXiv 2401.09031).

Public names stand in `__init__.pyi`, for type checkers as well; each is imported when it is first used (PEP 562), so
that importing the package takes no time.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
