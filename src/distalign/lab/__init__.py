"""The lab: what the theory promises, measured on targets that are known exactly, by the loss functions that users run.

A table is a sequence policy with one-token responses; short sequences are enumerated. An experiment is a class whose
fields are its settings, whose `run` measures and whose `show` says what came out; an eighth is one file and one line
here.
"""

from __future__ import annotations

from distalign.lab.classes import Classes
from distalign.lab.coverage import Coverage
from distalign.lab.degeneracy import Degeneracy
from distalign.lab.estimators import Estimators
from distalign.lab.experiment import Experiment, configure, measure
from distalign.lab.figure1 import Figure1
from distalign.lab.gamma import Gamma
from distalign.lab.sequences import Sequences

__all__ = ["EXPERIMENTS", "Experiment", "configure", "measure"]

_ALL: tuple[type[Experiment], ...] = (Figure1, Classes, Coverage, Degeneracy, Gamma, Estimators, Sequences)
EXPERIMENTS: dict[str, type[Experiment]] = {experiment.name: experiment for experiment in _ALL}
