"""The paper's figures on a real language model, SmolLM2-135M: ``make figures-lm``. What they show: docs/figures.md."""
