"""Prompts and training data of the engine tests."""

import json

SUBJECTS = ["rivers", "bread", "glass", "the moon", "chess", "rice", "bees", "copper", "wool",
            "tides", "paper", "ice", "maps", "salt", "trains", "violins", "sand", "tea", "wind",
            "clocks"]  # fmt: skip

PROMPTS = [
    f"<|im_start|>user\nTell me one fact about {s}.<|im_end|>\n<|im_start|>assistant\n"
    for s in SUBJECTS
]


def shouting(count: int) -> list[str]:
    """Chat examples that teach to answer in capitals."""
    return [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"Tell me {i} things about {subject}."},
                    {"role": "assistant", "content": f"{i} THINGS ABOUT {subject.upper()}! WOW!"},
                ]
            }
        )
        for i, subject in ((i, SUBJECTS[i % len(SUBJECTS)]) for i in range(count))
    ]
