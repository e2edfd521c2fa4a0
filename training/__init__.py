"""Everything around a training step: devices, processes, the run folder, diagnostics, experiments."""
