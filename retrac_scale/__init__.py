"""Training-data attribution for diffusion models at scale: Diffusion-TracIn and Diffusion-ReTrac (arXiv 2401.09031)."""

from retrac_scale import datasets, evaluate, gradients, projections
from retrac_scale.calling import ThroughUNet
from retrac_scale.check import ModelCheck, check_model
from retrac_scale.checkpoints import find_checkpoints
from retrac_scale.curvature import fisher_divisors, kronecker_divisors
from retrac_scale.diagonal import self_influence
from retrac_scale.encoded import EncodedDataset, encode
from retrac_scale.estimators import DAS, DTRAK, TRAK, GradCos, GradDot, RelatIF, RenormIF, ReTrac, TracIn
from retrac_scale.explain import Explanation
from retrac_scale.index import Index, StaleIndexError, build_index, open_index
from retrac_scale.journey import Journey, sample_journey, sketch_journey
from retrac_scale.noising import timestep_numbers
from retrac_scale.preconditioning import adam_divisors
from retrac_scale.projections import CountSketch, Dense, GradientSketcher, Identity, LowRank
from retrac_scale.query import TopK
from retrac_scale.record import TrainingRecord, read_record
from retrac_scale.samples import Samples, take
from retrac_scale.sketching import sketch
from retrac_scale.store import IncompleteStoreError, SketchStore, open_store, write_store
from retrac_scale.task import DiffusionTask
from retrac_scale.tasks import FailedTasksError
from retrac_scale.timesteps import EvenlySpaced, Explicit, Recorded, draw_noise
from retrac_scale.training import TrainingRecorder
from retrac_scale.training_callbacks import lightning_callback, transformers_callback
from retrac_scale.weighting import Huber, MinSNR, PseudoHuber, SD3Weighting

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
    "sample_journey",
    "self_influence",
    "sketch",
    "sketch_journey",
    "take",
    "timestep_numbers",
    "transformers_callback",
    "write_store",
]
