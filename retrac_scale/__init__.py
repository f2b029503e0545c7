"""Training-data attribution for diffusion models at scale: Diffusion-TracIn and Diffusion-ReTrac (arXiv 2401.09031)."""

from retrac_scale import evaluate, gradients, projections
from retrac_scale.diagonal import self_influence
from retrac_scale.estimators import GradCos, GradDot, ReTrac, TracIn
from retrac_scale.explain import Explanation
from retrac_scale.index import Index, StaleIndexError, build_index, open_index
from retrac_scale.projections import CountSketch, Dense, GradientSketcher, Identity, LowRank
from retrac_scale.query import TopK
from retrac_scale.samples import Samples, take
from retrac_scale.sketching import sketch
from retrac_scale.store import IncompleteStoreError, SketchStore, open_store, write_store
from retrac_scale.task import DiffusionTask
from retrac_scale.tasks import FailedTasksError
from retrac_scale.timesteps import EvenlySpaced, Explicit, Recorded, TrainingRecorder, draw_noise

__all__ = [
    "CountSketch",
    "Dense",
    "DiffusionTask",
    "EvenlySpaced",
    "Explanation",
    "Explicit",
    "FailedTasksError",
    "GradCos",
    "GradDot",
    "GradientSketcher",
    "Identity",
    "IncompleteStoreError",
    "Index",
    "LowRank",
    "ReTrac",
    "Recorded",
    "Samples",
    "SketchStore",
    "StaleIndexError",
    "TopK",
    "TracIn",
    "TrainingRecorder",
    "build_index",
    "draw_noise",
    "evaluate",
    "gradients",
    "open_index",
    "open_store",
    "projections",
    "self_influence",
    "sketch",
    "take",
    "write_store",
]
