"""A made-up machine: how long an iteration takes, from what it holds."""

import math
import random
from dataclasses import dataclass, replace


@dataclass
class Contents:
    """What an iteration held.

    Attributes:
        decode_rows: requests past their prompt.
        context: K/V entries that they read.
        prefill_tokens: tokens of prompts.
        forward_tokens: finetuning tokens run forward.
        backward_tokens: finetuning tokens run backward; of all layers, the loss head included.
        backward_windows: ... in so many windows.
        optimizer_steps: of all jobs.
    """

    decode_rows: int = 0
    context: int = 0
    prefill_tokens: int = 0
    forward_tokens: int = 0
    backward_tokens: float = 0.0
    backward_windows: int = 0
    optimizer_steps: int = 0

    @property
    def has_inference(self) -> bool:
        return self.decode_rows > 0 or self.prefill_tokens > 0

    @property
    def has_finetuning(self) -> bool:
        return self.forward_tokens > 0 or self.backward_tokens > 0

    def without_finetuning(self) -> "Contents":
        return replace(
            self, forward_tokens=0, backward_tokens=0.0, backward_windows=0, optimizer_steps=0
        )


@dataclass(frozen=True)
class Costs:
    """Milliseconds of each part. The defaults: a 70B model in bfloat16, tensor parallel over eight
    A100 of 40 GB, reckoned from their bandwidth (140 GB of weights at 75% of 12.4 TB/s, 160
    all-reduces) and speed (140 GFLOP a token at half of 2.5 PFLOP/s); not measured.

    Attributes:
        constant: of an iteration: the weights are read once.
        empty: of one that holds nothing.
        forward: of a token, decoded, prefilled or finetuned.
        context: of a thousand K/V entries read by decode rows.
        rows: once, where finetuning rows are in the forward.
        backward: of a token, through all layers.
        window: of a backward window.
        step: of an optimizer step.
    """

    constant: float = 18.0
    empty: float = 0.5
    forward: float = 0.11
    context: float = 0.035
    rows: float = 1.5
    backward: float = 0.2
    window: float = 0.3
    step: float = 4.0


class Machine:
    """Linear in what an iteration holds, times noise, a slow drift of speed, and stalls.

    Args:
        seed: of the noise.
        costs: milliseconds of each part.
        roofline: reading the weights and computing overlap, as on a GPU: the longer of the two
            counts (smoothly), which no linear model can follow everywhere.
        noise: sigma of the log-normal noise.
        drift: speed varies by this share, over half an hour.
        stalls: share of iterations that take two to six times as long.
    """

    def __init__(
        self,
        seed: int = 0,
        costs: Costs | None = None,
        roofline: bool = False,
        noise: float = 0.04,
        drift: float = 0.15,
        stalls: float = 0.001,
    ) -> None:
        self.costs = costs or Costs()
        self._random = random.Random(f"machine {seed}")
        self._roofline, self._noise, self._drift, self._stalls = roofline, noise, drift, stalls

    def seconds(self, contents: Contents, now: float) -> tuple[float, float]:
        """How long an iteration takes, and would have taken without its finetuning part.

        Args:
            contents: of the iteration.
            now: seconds since the begin.
        """
        factor = self._random.lognormvariate(0.0, self._noise)
        factor *= 1.0 + self._drift * math.sin(2 * math.pi * now / 1800)
        if self._random.random() < self._stalls:
            factor *= self._random.uniform(2.0, 6.0)
        alone = self._milliseconds(contents.without_finetuning())
        return factor * self._milliseconds(contents) / 1e3, factor * alone / 1e3

    def _milliseconds(self, x: Contents) -> float:
        if not (x.has_inference or x.has_finetuning):
            return self.costs.empty + self.costs.step * x.optimizer_steps
        c = self.costs
        compute = c.forward * (x.decode_rows + x.prefill_tokens + x.forward_tokens)
        both = (c.constant**4 + compute**4) ** 0.25 if self._roofline else c.constant + compute
        return (
            both
            + c.context * x.context / 1e3
            + c.rows * (x.forward_tokens > 0)
            + c.backward * x.backward_tokens
            + c.window * x.backward_windows
            + c.step * x.optimizer_steps
        )
