"""`make serve`: the demo's server, kept running until Ctrl-C."""

import os
import signal
import socket
import subprocess
import sys
import threading

from examples.server import MODEL_NAME, ROOT, command, wait_until_ready

GREETING = """
Ready at {url}/v1. Try:

curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{{"model": "{model}",
  "messages": [{{"role": "user", "content": "What is the capital of France?"}}],
  "max_tokens": 32, "temperature": 0}}'

or train: BASE_URL={url}/v1 .venv/bin/python -m examples.quickstart
"""


def main() -> None:
    port = int(os.environ.get("PORT", "8000"))
    url = f"http://127.0.0.1:{port}"
    with socket.socket() as s:
        if s.connect_ex(("127.0.0.1", port)) == 0:
            raise SystemExit(f"Port {port} is in use; choose another with PORT=... make serve")
    process = subprocess.Popen(command(port, ROOT / ".demo" / "finetuning"))

    def greet() -> None:
        wait_until_ready(process, url, None)
        print(GREETING.format(url=url, model=MODEL_NAME), flush=True)

    def stop(*_: object) -> None:
        process.terminate()
        sys.exit(process.wait())

    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=greet, daemon=True).start()
    try:
        raise SystemExit(process.wait())
    except KeyboardInterrupt:
        process.wait()


if __name__ == "__main__":
    main()
