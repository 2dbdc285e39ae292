"""Image classification on mmengine: a classifier around any timm model, data sets, metrics.

Importing this package registers everything that `configs/classification` names.
"""

import vqmoe_vision.analysis.validation_picture
import vqmoe_vision.engine  # noqa: F401  registers hooks and optimizer wrappers

from . import datasets, transforms
from .classifier import Classifier
from .evaluation import Accuracy

__all__ = ['Accuracy', 'Classifier', 'datasets', 'transforms']
