"""Extensions of models: LoRA adapters and inserted layers, trained and switched by task."""
