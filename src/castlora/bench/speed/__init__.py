"""The speed benchmark: what parts of a transfer cost beside what they cannot do without, side by side in one run."""
