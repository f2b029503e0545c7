"""Where images come from: files, Hugging Face datasets, tar shards, arrays, Parquet.

Names stand in `__init__.pyi` and are imported when they are first used: pictures are shown without torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
