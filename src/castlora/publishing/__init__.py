"""What a finished run leaves behind: manifest, model card, report, and a place on the hub."""
