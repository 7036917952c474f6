"""Parts of the HTML pages as values: tiles, and layers with their factors."""
