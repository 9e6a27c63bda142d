"""How a run is carried out: in which folder, by which processes, in how much memory."""
