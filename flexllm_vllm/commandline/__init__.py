"""The ``flexllm`` command line: OpenAI's finetuning API from a shell, over HTTP alone."""
