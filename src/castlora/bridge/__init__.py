"""Maps between two models that are fitted once, and then carry any number of adapters without loading a model."""
