"""Real calibrations as JSON, one per model and accelerator."""
