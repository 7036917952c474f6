"""Readers of ONNX Runtime's profiler: time by operator and by layer, and traces to look at."""
