"""Objectives on groups of outputs: what plug-ins and callers use; each objective has a file of its own."""

from nemo_brain.objectives.base import LogWeights, Objective, ObjectiveInputs, ObjectiveOutput, coefficients
from nemo_brain.objectives.brain import Brain
from nemo_brain.objectives.dpo_sft import DPOSft
from nemo_brain.objectives.goodness import GOODNESS
from nemo_brain.objectives.registry import OBJECTIVES, make_objective, register

__all__ = [
    "GOODNESS",
    "OBJECTIVES",
    "Brain",
    "DPOSft",
    "LogWeights",
    "Objective",
    "ObjectiveInputs",
    "ObjectiveOutput",
    "coefficients",
    "make_objective",
    "register",
]
