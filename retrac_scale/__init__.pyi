"""The public names; __init__.py imports each from here when it is first used."""

from . import datasets, evaluate, gradients, projections, report
from .api.index import build_index
from .api.sketch import sketch
from .estimators import DAS, DTRAK, TRAK, Estimator, GradCos, GradDot, RelatIF, RenormIF, ReTrac, ReTracRidge, TracIn
from .estimators.self_influence import self_influence
from .index.reader import StaleIndexError
from .measurement.halves import MeasuredOnceError, Repeatability
from .measurement.repeatability import repeatability
from .projections import CountSketch, Dense, GradientSketcher, Identity, LowRank
from .projections.preconditioning import adam_divisors
from .query.explain import Explanation
from .query.index import Index, open_index
from .query.topk import TopK
from .runtime.tasks import FailedTasksError
from .sketching.check import ModelCheck, check_model
from .sketching.content import ChangedItemsError
from .sketching.curvature import fisher_divisors, kronecker_divisors
from .sketching.encoded import EncodedDataset, encode
from .sketching.journey import Journey, sample_journey, sketch_journey
from .sketching.samples import Samples
from .store import DamagedStoreError, IncompleteStoreError, Layout, SketchStore, StoreWriter, open_store, write_store
from .store.taking import take
from .store.verify import repair_store, verify_store
from .task.calling import ThroughUNet
from .task.checkpoints import find_checkpoints
from .task.concepts import Concept, Concepts, Unadapted
from .task.diffusion import DiffusionTask
from .task.noising import timestep_numbers
from .task.regions import AllBut, Regions
from .task.timesteps import EvenlySpaced, Explicit, draw_noise
from .task.views import Views
from .task.weighting import Huber, MinSNR, PseudoHuber, SD3Weighting
from .training.callbacks import lightning_callback, transformers_callback
from .training.record import TrainingRecord, read_record
from .training.recorded import Recorded
from .training.recorder import TrainingRecorder

__all__ = [
    "DAS",
    "DTRAK",
    "TRAK",
    "AllBut",
    "ChangedItemsError",
    "Concept",
    "Concepts",
    "CountSketch",
    "DamagedStoreError",
    "Dense",
    "DiffusionTask",
    "EncodedDataset",
    "Estimator",
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
    "Regions",
    "RelatIF",
    "RenormIF",
    "Repeatability",
    "SD3Weighting",
    "Samples",
    "SketchStore",
    "StaleIndexError",
    "StoreWriter",
    "ThroughUNet",
    "TopK",
    "TracIn",
    "TrainingRecord",
    "TrainingRecorder",
    "Unadapted",
    "Views",
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
