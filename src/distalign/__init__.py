"""distalign: learn the target language model behind pairwise preferences.

The public names are loaded when they are first used, so that `import distalign` and the command line are quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distalign.data import encode_pairs as encode_pairs
    from distalign.data import read_pairs as read_pairs
    from distalign.engine import Group as Group
    from distalign.engine import score as score
    from distalign.errors import InputError as InputError
    from distalign.evaluation.evaluate import evaluate as evaluate
    from distalign.evaluation.frontier import predict_frontier as predict_frontier
    from distalign.evaluation.metrics import measure_against as measure_against
    from distalign.experiments.compare import compare as compare
    from distalign.experiments.recipe import Recipe as Recipe
    from distalign.experiments.recipe import load_recipe as load_recipe
    from distalign.experiments.train import train as train
    from distalign.judges import Comparison as Comparison
    from distalign.judges import make_judge as make_judge
    from distalign.methods import DPO as DPO
    from distalign.methods import METHODS as METHODS
    from distalign.methods import PD as PD
    from distalign.methods import PMLE as PMLE
    from distalign.methods import REBEL as REBEL
    from distalign.methods import RKL as RKL
    from distalign.methods import RLHF as RLHF
    from distalign.methods import Method as Method
    from distalign.methods import Needs as Needs
    from distalign.methods import Pairs as Pairs
    from distalign.methods import Samples as Samples
    from distalign.models.load import find_model as find_model
    from distalign.models.policy import Policy as Policy
    from distalign.models.policy import make_policy as make_policy
    from distalign.models.targets import Target as Target
    from distalign.models.targets import TargetSettings as TargetSettings
    from distalign.models.targets import Tilt as Tilt
    from distalign.models.targets import make_pairs as make_pairs
    from distalign.rewards import ColumnReward as ColumnReward
    from distalign.rewards import Request as Request
    from distalign.rewards import Reward as Reward
    from distalign.rewards import RewardTraining as RewardTraining
    from distalign.rewards import load_reward as load_reward
    from distalign.rewards import make_reward as make_reward
    from distalign.rollout.sample import sample as sample
    from distalign.training.config import AlignmentConfig as AlignmentConfig
    from distalign.training.trainer import AlignmentTrainer as AlignmentTrainer

__version__ = "0.1.0.dev0"

# Where each public name lives.
_HOMES = {
    "data": ("encode_pairs", "read_pairs"),
    "engine": ("Group", "score"),
    "errors": ("InputError",),
    "evaluation.evaluate": ("evaluate",),
    "evaluation.frontier": ("predict_frontier",),
    "evaluation.metrics": ("measure_against",),
    "experiments.compare": ("compare",),
    "experiments.recipe": ("Recipe", "load_recipe"),
    "experiments.train": ("train",),
    "judges": ("Comparison", "make_judge"),
    "methods": ("METHODS", "PMLE", "PD", "RKL", "DPO", "REBEL", "RLHF", "Method", "Needs", "Pairs", "Samples"),
    "models.load": ("find_model",),
    "models.policy": ("Policy", "make_policy"),
    "models.targets": ("Target", "TargetSettings", "Tilt", "make_pairs"),
    "rewards": ("ColumnReward", "Request", "Reward", "RewardTraining", "load_reward", "make_reward"),
    "rollout.sample": ("sample",),
    "training.config": ("AlignmentConfig",),
    "training.trainer": ("AlignmentTrainer",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = list(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'distalign' has no attribute {name!r}")
    return getattr(import_module(f"distalign.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME_OF]
