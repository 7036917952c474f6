"""Command `demo`: an embedded classifier, its images, and their conversion in all modes."""
