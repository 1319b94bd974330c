"""PEFT folders: what is in one, whether the base model can serve it, archives, merges."""
