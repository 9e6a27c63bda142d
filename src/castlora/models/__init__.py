"""Base models: loading them, the roles of their modules and which pair, their activations, and what they write."""
