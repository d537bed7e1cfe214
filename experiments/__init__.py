"""The paper's figures in a world small enough to enumerate: ``make figures``. What they show: docs/figures.md."""
