"""What the experts of a trained model do: numbers over a data set, and pictures of them.

`analyze` looks at any model and says what is wrong. `survey` looks at a data set in one pass,
`record` at single tokens, and `measures` are the numbers. They need no more than the models do. The
pictures need matplotlib (extra `train`), the corruptions imagecorruptions-imaug (extra `analyze`).
"""

from .look import Analysis, analyze
from .record import mean_statistics, patch_experts, token_experts

__all__ = ['Analysis', 'analyze', 'mean_statistics', 'patch_experts', 'token_experts']
