"""Maps between the activation spaces of two models: statistics, closed forms, the CAST layer, and their starts."""
