"""Scores of models on images: top-k accuracy, kNN and a linear probe of their features."""

from featkd.evaluation.features import ImageOutputs, extract_features
from featkd.evaluation.knn import knn_predict
from featkd.evaluation.probe import LinearProbe, linear_probe
from featkd.evaluation.scoring import ModelScores, confusion_matrix, score_model
from featkd.evaluation.topk import Evaluation, EvaluationError, evaluate

__all__ = [
    "Evaluation",
    "EvaluationError",
    "ImageOutputs",
    "LinearProbe",
    "ModelScores",
    "confusion_matrix",
    "evaluate",
    "extract_features",
    "knn_predict",
    "linear_probe",
    "score_model",
]
