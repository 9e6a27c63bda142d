"""Adapters: any that PEFT writes into low-rank factors, factors into the portable form, and adapters inside a model."""
