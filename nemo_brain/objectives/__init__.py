"""Objectives on groups of outputs: what plug-ins and callers use; each objective has a file of its own."""

from nemo_brain.objectives.base import (
    LogWeights,
    Objective,
    ObjectiveInputs,
    ObjectiveOutput,
    coefficients,
    target_divergences,
)
from nemo_brain.objectives.brain import Brain
from nemo_brain.objectives.dpg import DPG, SNIS, GDCPlusPlus
from nemo_brain.objectives.dpo_sft import DPOSft
from nemo_brain.objectives.f_brain import FBrain
from nemo_brain.objectives.goodness import GOODNESS
from nemo_brain.objectives.nca import NCA, InfoNCA
from nemo_brain.objectives.pairwise import DPO, IPO, RPO, Hinge, SLiC
from nemo_brain.objectives.registry import OBJECTIVES, make_objective, register
from nemo_brain.objectives.regression import REBEL, LogVariance
from nemo_brain.objectives.rloo import RLOO
from nemo_brain.objectives.steerlm2 import SteerLM2

__all__ = [
    "DPG",
    "DPO",
    "GOODNESS",
    "IPO",
    "NCA",
    "OBJECTIVES",
    "REBEL",
    "RLOO",
    "RPO",
    "SNIS",
    "Brain",
    "DPOSft",
    "FBrain",
    "GDCPlusPlus",
    "Hinge",
    "InfoNCA",
    "LogVariance",
    "LogWeights",
    "Objective",
    "ObjectiveInputs",
    "ObjectiveOutput",
    "SLiC",
    "SteerLM2",
    "coefficients",
    "make_objective",
    "register",
    "target_divergences",
]
