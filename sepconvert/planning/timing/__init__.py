"""Times of models, layers and forms in ONNX Runtime, measured or modelled."""
