"""Checks that a converted model computes what the original does.

Each layer is checked alone, and the whole model in torch and in ONNX Runtime. Tolerances are derived, from
rounding and from the certificates of the layers.
"""
