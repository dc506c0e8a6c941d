"""Messages as token ids: the model's own chat template, dialogues, and answers taken apart."""
