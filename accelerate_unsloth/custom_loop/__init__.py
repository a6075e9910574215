"""A trainer for custom training loops: epochs, steps, evaluation and checkpoints."""
