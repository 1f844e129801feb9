"""The memory of a training step, from compiling it."""
