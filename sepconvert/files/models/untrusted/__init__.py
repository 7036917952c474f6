"""Model files that could run code: pickles and archives, read with a short list of harmless names."""
