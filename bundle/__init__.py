"""An archive of the project for machines without a network: ``make`` packs it, ``check`` goes along (docs/gpu.md)."""
