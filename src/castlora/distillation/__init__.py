"""Training target + LoRA to predict what source + LoRA does."""
