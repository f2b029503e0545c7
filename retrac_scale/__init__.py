"""Training-data attribution for diffusion models at scale: Diffusion-TracIn and Diffusion-ReTrac (arXiv 2401.09031)."""

from retrac_scale import evaluate, gradients, projections
from retrac_scale.calling import ThroughUNet
from retrac_scale.check import ModelCheck, check_model
from retrac_scale.checkpoints import find_checkpoints
from retrac_scale.diagonal import self_influence
from retrac_scale.encoded import EncodedDataset, encode
from retrac_scale.estimators import GradCos, GradDot, ReTrac, TracIn
from retrac_scale.explain import Explanation
from retrac_scale.index import Index, StaleIndexError, build_index, open_index
from retrac_scale.noising import timestep_numbers
from retrac_scale.projections import CountSketch, Dense, GradientSketcher, Identity, LowRank
from retrac_scale.query import TopK
from retrac_scale.samples import Samples, take
from retrac_scale.sketching import sketch
from retrac_scale.store import IncompleteStoreError, SketchStore, open_store, write_store
from retrac_scale.task import DiffusionTask
from retrac_scale.timesteps import EvenlySpaced, Explicit, Recorded, TrainingRecorder, draw_noise
from retrac_scale.weighting import Huber, MinSNR, PseudoHuber, SD3Weighting

__all__ = [
    "CountSketch",
    "Dense",
    "DiffusionTask",
    "EncodedDataset",
    "EvenlySpaced",
    "Explanation",
    "Explicit",
    "GradCos",
    "GradDot",
    "GradientSketcher",
    "Huber",
    "Identity",
    "IncompleteStoreError",
    "Index",
    "LowRank",
    "MinSNR",
    "ModelCheck",
    "PseudoHuber",
    "ReTrac",
    "Recorded",
    "SD3Weighting",
    "Samples",
    "SketchStore",
    "StaleIndexError",
    "ThroughUNet",
    "TopK",
    "TracIn",
    "TrainingRecorder",
    "build_index",
    "check_model",
    "draw_noise",
    "encode",
    "evaluate",
    "find_checkpoints",
    "gradients",
    "open_index",
    "open_store",
    "projections",
    "self_influence",
    "sketch",
    "take",
    "timestep_numbers",
    "write_store",
]
