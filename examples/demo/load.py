"""Someone who keeps asking the base model while the adapter is being trained."""

import statistics
import threading
import time

from openai import OpenAI, OpenAIError

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Why is the sky blue?",
    "Give me a short recipe for tea.",
]
PAUSE = 1.0  # seconds between two questions


class BackgroundLoad:
    """Streams chat answers in a thread, and times them."""

    def __init__(self, client: OpenAI, model: str) -> None:
        self._client = client
        self._model = model
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._gaps: list[float] = []
        self.requests = 0
        self.failures = 0

    def __enter__(self) -> "BackgroundLoad":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=60)

    @property
    def tpot_ms(self) -> float:
        """Median time between two tokens of an answer, in milliseconds."""
        return 1e3 * statistics.median(self._gaps) if self._gaps else 0.0

    def _run(self) -> None:
        while not self._stop.wait(PAUSE):
            try:
                self._ask(QUESTIONS[self.requests % len(QUESTIONS)])
                self.requests += 1
            except OpenAIError:
                self.failures += 1

    def _ask(self, question: str) -> None:
        stream = self._client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": question}],
            max_tokens=32,
            temperature=0,
            stream=True,
        )
        previous = None
        for _ in stream:
            now = time.perf_counter()
            if previous is not None:
                self._gaps.append(now - previous)
            previous = now
