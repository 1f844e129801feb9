"""What surrounds a training: set-up, checkpoints, logs, processes and errors."""
