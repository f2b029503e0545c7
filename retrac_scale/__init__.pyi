"""The public names; __init__.py imports each from here when it is first used."""

from . import datasets, evaluate, gradients, projections, report
from .calling import ThroughUNet
from .check import ModelCheck, check_model
from .checkpoints import find_checkpoints
from .curvature import fisher_divisors, kronecker_divisors
from .diagonal import self_influence
from .encoded import EncodedDataset, encode
from .estimators import DAS, DTRAK, TRAK, GradCos, GradDot, RelatIF, RenormIF, ReTrac, TracIn
from .explain import Explanation
from .index import Index, StaleIndexError, build_index, open_index
from .journey import Journey, sample_journey, sketch_journey
from .noising import timestep_numbers
from .preconditioning import adam_divisors
from .projections import CountSketch, Dense, GradientSketcher, Identity, LowRank
from .query import TopK
from .record import TrainingRecord, read_record
from .samples import Samples, take
from .sketching import sketch
from .store import IncompleteStoreError, SketchStore, open_store, write_store
from .task import DiffusionTask
from .tasks import FailedTasksError
from .timesteps import EvenlySpaced, Explicit, Recorded, draw_noise
from .training import TrainingRecorder
from .training_callbacks import lightning_callback, transformers_callback
from .weighting import Huber, MinSNR, PseudoHuber, SD3Weighting

__all__ = [
    "DAS",
    "DTRAK",
    "TRAK",
    "CountSketch",
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
    "LowRank",
    "MinSNR",
    "ModelCheck",
    "PseudoHuber",
    "ReTrac",
    "Recorded",
    "RelatIF",
    "RenormIF",
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
    "report",
    "sample_journey",
    "self_influence",
    "sketch",
    "sketch_journey",
    "take",
    "timestep_numbers",
    "transformers_callback",
    "write_store",
]
