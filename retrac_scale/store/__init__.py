"""SketchStore: raw sketches of gradients per checkpoint, sample and timestep, in Zarr."""

from retrac_scale.store.encoding import Dtype
from retrac_scale.store.errors import DamagedStoreError, IncompleteStoreError
from retrac_scale.store.given import write_store
from retrac_scale.store.growth import grow_store
from retrac_scale.store.handle import StoreHandle
from retrac_scale.store.reader import SketchStore, open_store
from retrac_scale.store.schema import Layout
from retrac_scale.store.stream import StoreWriter
from retrac_scale.store.verify import Finding, Verdict, repair_store, verify_store
from retrac_scale.store.writer import create_store, write_block

__all__ = [
    "DamagedStoreError",
    "Dtype",
    "Finding",
    "IncompleteStoreError",
    "Layout",
    "SketchStore",
    "StoreHandle",
    "StoreWriter",
    "Verdict",
    "create_store",
    "grow_store",
    "open_store",
    "repair_store",
    "verify_store",
    "write_block",
    "write_store",
]
