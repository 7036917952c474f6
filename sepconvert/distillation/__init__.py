"""Fine-tuning of a converted model by distillation from the original."""
