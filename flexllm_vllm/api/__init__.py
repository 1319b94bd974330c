"""The HTTP surface: files, finetuning jobs, iterations, in OpenAI's objects and errors."""
