"""One sample behind several steps through a chain with kinks: an iterated smoother."""
