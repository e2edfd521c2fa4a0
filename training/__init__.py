"""Everything around a training step: devices, processes, the run folder, diagnostics, experiments."""

from data import startup

if startup.is_command_of("training"):  # another package's keeps its own signals
    startup.begin(torch=True)
