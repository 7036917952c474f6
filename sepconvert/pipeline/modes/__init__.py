"""The modes of a conversion: exact, and approximate with or without all structures."""
