"""Everything on disk: model files, data, ONNX files, result directories."""
