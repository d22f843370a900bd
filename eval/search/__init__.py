"""Search in an index: vectors in, full lists of hits with their metadata out."""
