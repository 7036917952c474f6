"""Graphs of ONNX files: read, run in parts, and edited."""
