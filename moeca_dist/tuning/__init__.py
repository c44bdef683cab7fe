"""Which schedule, policy and order reach a target: exact trajectories once, a cheap proxy over them, then real runs."""
