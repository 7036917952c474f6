"""Static int8 forms of ONNX models: the form in which networks are deployed on CPUs."""
