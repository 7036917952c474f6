"""ONNX files: exported, rewritten, read."""
