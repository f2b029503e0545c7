"""The public names; __init__.py imports each from here when it is first used."""

from . import datasets, evaluate, gradients, projections, report
from .check import ModelCheck, check_model
from .content import ChangedItemsError
from .curvature import fisher_divisors, kronecker_divisors
from .diagonal import self_influence
from .estimators import DAS, DTRAK, TRAK, GradCos, GradDot, RelatIF, RenormIF, ReTrac, ReTracRidge, TracIn
from .execution import FailedTasksError
from .explain import Explanation
from .halves import MeasuredOnceError, Repeatability
from .index import Index, StaleIndexError, open_index
from .indexing import build_index
from .journey import Journey, sample_journey, sketch_journey
from .preconditioning import adam_divisors
from .projections import CountSketch, Dense, GradientSketcher, Identity, LowRank
from .repeatability import repeatability
from .samples import Samples, take
from .sketching import sketch
from .store import DamagedStoreError, IncompleteStoreError, Layout, SketchStore, open_store, write_store
from .store.verify import repair_store, verify_store
from .task.calling import ThroughUNet
from .task.checkpoints import find_checkpoints
from .task.diffusion import DiffusionTask
from .task.encoded import EncodedDataset, encode
from .task.noising import timestep_numbers
from .task.weighting import Huber, MinSNR, PseudoHuber, SD3Weighting
from .timesteps import EvenlySpaced, Explicit, Recorded, draw_noise
from .topk import TopK
from .training.callbacks import lightning_callback, transformers_callback
from .training.record import TrainingRecord, read_record
from .training.recorder import TrainingRecorder

__all__ = [
    "DAS",
    "DTRAK",
    "TRAK",
    "ChangedItemsError",
    "CountSketch",
    "DamagedStoreError",
    "Dense",
    "DiffusionTask",
    "EncodedDataset",
    "EvenlySpaced",
    "Explanation",
    "Explicit",
    "FailedTasksError",
    "GradCos",
    "GradDot",
    "GradientSketcher",
    "Huber",
    "Identity",
    "IncompleteStoreError",
    "Index",
    "Journey",
    "Layout",
    "LowRank",
    "MeasuredOnceError",
    "MinSNR",
    "ModelCheck",
    "PseudoHuber",
    "ReTrac",
    "ReTracRidge",
    "Recorded",
    "RelatIF",
    "RenormIF",
    "Repeatability",
    "SD3Weighting",
    "Samples",
    "SketchStore",
    "StaleIndexError",
    "ThroughUNet",
    "TopK",
    "TracIn",
    "TrainingRecord",
    "TrainingRecorder",
    "adam_divisors",
    "build_index",
    "check_model",
    "datasets",
    "draw_noise",
    "encode",
    "evaluate",
    "find_checkpoints",
    "fisher_divisors",
    "gradients",
    "kronecker_divisors",
    "lightning_callback",
    "open_index",
    "open_store",
    "projections",
    "read_record",
    "repair_store",
    "repeatability",
    "report",
    "sample_journey",
    "self_influence",
    "sketch",
    "sketch_journey",
    "take",
    "timestep_numbers",
    "transformers_callback",
    "verify_store",
    "write_store",
]
