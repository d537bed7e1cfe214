"""Verifiers: rewards that check an output by a rule, without a model."""
