"""What each (β, γ) will give, predicted from responses of π₀ before any training: reward, KL, entropy."""

from distalign.frontier.estimates import Band, BestOfN, Point, best_of_n, default_grid, predict
from distalign.frontier.frontier import Frontier, Recommendation, predict_frontier

__all__ = [
    "Band",
    "BestOfN",
    "Frontier",
    "Point",
    "Recommendation",
    "best_of_n",
    "default_grid",
    "predict",
    "predict_frontier",
]
