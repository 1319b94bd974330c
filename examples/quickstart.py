"""Upload, train, use: the stock openai client against a server with --enable-finetuning.

python -m examples.quickstart [train.jsonl]
"""

import os
import sys
import time
from pathlib import Path

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("API_KEY", "none"),
)
model = client.models.list().data[0].id

data = Path(sys.argv[1] if sys.argv[1:] else Path(__file__).parent / "data" / "train.jsonl")
file = client.files.create(file=data, purpose="fine-tune")
job = client.fine_tuning.jobs.create(
    model=model,
    training_file=file.id,
    suffix="orders",
    method={
        "type": "supervised",
        "supervised": {
            "hyperparameters": {"n_epochs": 1, "batch_size": 8, "learning_rate": 1e-3},
            "lora": {"r": 16},
        },
    },
)
while job.status not in ("succeeded", "failed", "cancelled"):
    time.sleep(2)
    job = client.fine_tuning.jobs.retrieve(job.id)
    print(job.status, client.fine_tuning.jobs.list_events(job.id, limit=1).data[0].message)
if job.fine_tuned_model is None:
    raise SystemExit(f"{job.status}: {job.error}")

answer = client.chat.completions.create(
    model=job.fine_tuned_model,
    messages=[{"role": "user", "content": "Mia orders 12 lamps to Oslo."}],
    temperature=0,
    max_tokens=64,
)
print(answer.choices[0].message.content)
