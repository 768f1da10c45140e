"""Students and teachers: timm models that return their features [EM26].

Importing this registers the paper's students with timm (see `featkd.models.registered`).
"""

from featkd.models import registered as registered
from featkd.models.export import ExportError, export_model, load_exported
from featkd.models.features import (
    FeatureModel,
    feature_grid,
    num_layers,
    resolve_layers,
    with_features,
)
from featkd.models.lift import Lift
from featkd.models.published import load_published
from featkd.models.students import ARCHS, create_student
from featkd.models.teacher import create_teacher
from featkd.models.weights import CheckpointMismatch, read_state_dict
from featkd.models.widelast import WideLast

__all__ = [
    "ARCHS",
    "CheckpointMismatch",
    "ExportError",
    "FeatureModel",
    "Lift",
    "WideLast",
    "create_student",
    "create_teacher",
    "export_model",
    "feature_grid",
    "load_exported",
    "load_published",
    "num_layers",
    "read_state_dict",
    "resolve_layers",
    "with_features",
]
