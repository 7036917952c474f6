"""What is learnt from calibration images: statistics of inputs, importance of outputs, held-out judgement."""
