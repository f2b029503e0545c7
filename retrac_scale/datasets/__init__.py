"""Where images come from: files, Hugging Face datasets, tar shards, arrays, Parquet."""

from retrac_scale.datasets.arrays import Arrays
from retrac_scale.datasets.base import CorruptImageError, ImageDataset
from retrac_scale.datasets.files import ImageFiles
from retrac_scale.datasets.hugging_face import HuggingFace
from retrac_scale.datasets.parquet import Parquet
from retrac_scale.datasets.shards import TarShards

__all__ = ["Arrays", "CorruptImageError", "HuggingFace", "ImageDataset", "ImageFiles", "Parquet", "TarShards"]
