"""Embeddings in, numbers with error bars out; FAISS lives here, and no file of training data."""
