"""What the experts of a trained model do: statistics here, pictures in `pictures` and `curves`.

The pictures need matplotlib (extra `train`); the statistics need no more than the models do.
"""

from .statistics import mean_statistics, patch_experts, token_experts

__all__ = ['mean_statistics', 'patch_experts', 'token_experts']
