"""BRAIn: iterations of sampling, scoring and steps."""
