"""The engine of an API process under test: it answers what our routes ask of it, and computes
nothing."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import LlamaConfig

from flexllm_vllm.config import KEY, FinetuningConfig


def _model() -> Any:
    return SimpleNamespace(
        max_model_len=512,
        model="path/to/demo",
        hf_text_config=LlamaConfig(num_hidden_layers=30),
    )


@dataclass
class Engine:
    """What the plugin and vLLM's model registry ask of an engine client, and tell it.

    Attributes:
        root: folder of the store; None where no plugin reads the configuration.
        tokenizer: what its renderer has.
        in_use: ids of adapters that requests need.
        unloaded: ids of adapters that it was told to forget.
    """

    root: Path | None = None
    tokenizer: Any = None
    in_use: set[int] = field(default_factory=set)
    unloaded: list[int] = field(default_factory=list)
    model_config: Any = field(default_factory=_model)
    input_processor: Any = None
    log_stats: bool = True

    def __post_init__(self) -> None:
        self.renderer = SimpleNamespace(get_tokenizer=lambda: self.tokenizer)
        self.vllm_config = SimpleNamespace(
            model_config=self.model_config, additional_config=self._additional_config()
        )
        self.engine_core = self

    def _additional_config(self) -> dict[str, Any]:
        if self.root is None:
            return {}
        return {KEY: FinetuningConfig(dir=self.root, activation_cache_tokens=128).to_dict()}

    async def adapters_in_use(self) -> list[set[int]]:
        return [set(self.in_use)]

    async def call_utility_all_async(self, method: str, *args: int) -> list[list[Any]]:
        if method == "finetuning_iterations":  # of two engines
            [last] = args
            return [[{"start_time": 2 * i + k} for i in range(last)] for k in (0, 1)]
        assert method == "finetuning_adapters_in_use"
        return [list(self.in_use)]

    async def remove_lora(self, int_id: int) -> bool:
        self.unloaded.append(int_id)
        return True
