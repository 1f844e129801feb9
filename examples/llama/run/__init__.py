"""The surroundings of a training: set-up, checkpoints, logs, processes and errors."""
