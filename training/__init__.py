"""What surrounds a training step. The import of this package prepares the process: see startup."""

from training import startup as startup
