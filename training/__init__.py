"""What surrounds a training step: devices, several processes, the run folder, diagnostics, experiments."""
