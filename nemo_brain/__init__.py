"""BRAIn (Bayesian Reward-conditioned Amortized Inference) for Megatron GPT models in NeMo."""

__version__ = "0.1.0"
