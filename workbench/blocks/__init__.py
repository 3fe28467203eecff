"""The lecture: one idea of the architecture per file, each readable alone."""
