"""New API keys: the file for the server has their hashes, the keys themselves are printed once.

python -m examples.tenants.make_keys keys.toml acme globex
vllm serve MODEL --enable-finetuning --finetuning-keys-file keys.toml
"""

import argparse
import hashlib
import os
import secrets
from pathlib import Path

KEY = """\
[[keys]]
sha256 = "{sha256}"
organization = "{organization}"
role = "admin"
quotas = {{ max_jobs = 4, max_bytes = 1_000_000_000 }}

"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("file", type=Path)
    options.add_argument("organizations", nargs="+")
    args = options.parse_args()
    keys = {name: f"sk-{secrets.token_urlsafe(32)}" for name in args.organizations}
    entries = [
        KEY.format(sha256=hashlib.sha256(key.encode()).hexdigest(), organization=name)
        for name, key in keys.items()
    ]
    # Replaced in one step: a running server reads the file again when it changes.
    new = args.file.with_suffix(".new")
    new.write_text("".join(entries))
    os.replace(new, args.file)
    for name, key in keys.items():
        print(f"{name}={key}")


if __name__ == "__main__":
    main()
