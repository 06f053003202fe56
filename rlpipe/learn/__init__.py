"""Learning: trajectories replayed as sequences, credit, the one loss, the optimiser step, checkpoints."""
