"""What arrived: scores, answers side by side, and the proof that the written adapter is the trained one."""
