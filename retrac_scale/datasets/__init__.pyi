"""The public names; __init__.py imports each from here when it is first used."""

from .arrays import Arrays
from .base import CorruptImageError, ImageDataset
from .files import ImageFiles
from .hugging_face import HuggingFace
from .parquet import Parquet
from .shards import TarShards

__all__ = ["Arrays", "CorruptImageError", "HuggingFace", "ImageDataset", "ImageFiles", "Parquet", "TarShards"]
