"""A dataset whose samples are asked about in some ways, in place of whole and as they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from retrac_scale.columns import as_column, check_ids
from retrac_scale.task.items import brought, dataset_ids


class Asked(ABC):
    """Map-style: every sample of a dataset, once for each way.

    Args:
        dataset: map-style, as for `sketch`.
        ways: one for all samples, or {name: way}: then a sample has the id "id: name" in each.

    Attributes:
        ids: of the samples, None where the dataset brings none and there are no names.
        columns: those of the dataset.
        frozen: likewise.
        stamps: likewise.
        region: of a dataset that is in parts already.
        concept: of a dataset that is asked about one already.
    """

    def __init__(self, dataset: Any, ways: Any) -> None:
        own, count = dataset_ids(dataset), len(dataset)
        named = isinstance(ways, Mapping)
        self._dataset = dataset
        self._ways = list(ways.values()) if named else [ways]
        self.ids = own
        if named:
            self.ids = [f"{sample}: {name}" for sample in check_ids(own, count).tolist() for name in ways]
        columns, stamps = brought(dataset, "columns"), brought(dataset, "stamps")
        times = len(self._ways)
        self.columns = columns and {name: np.repeat(as_column(values), times) for name, values in columns.items()}
        self.stamps = None if stamps is None else np.repeat(np.asarray(stamps), times)
        self.frozen: Any = brought(dataset, "frozen")
        self.region: Any = brought(dataset, "region")
        self.concept: Any = brought(dataset, "concept")

    def __len__(self) -> int:
        return len(self._dataset) * len(self._ways)

    def __getitem__(self, row: int) -> Any:
        sample, way = divmod(range(len(self))[row], len(self._ways))
        return self.asked(self._dataset[sample], self._ways[way], sample)

    @abstractmethod
    def asked(self, item: Any, way: Any, row: int) -> Any:
        """The item of a row, asked about in a way."""
