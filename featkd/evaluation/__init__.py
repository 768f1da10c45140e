"""Scores of models on images: top-k accuracy of their logits, kNN on their features."""

from featkd.evaluation.knn import knn_predict
from featkd.evaluation.topk import Evaluation, EvaluationError, evaluate

__all__ = ["Evaluation", "EvaluationError", "evaluate", "knn_predict"]
