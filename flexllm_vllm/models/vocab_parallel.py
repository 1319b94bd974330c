"""The loss of a head whose vocabulary is sharded over the ranks of a tensor-parallel group."""

import torch

from flexllm_vllm.kernels.cross_entropy import CHUNK, LogitForm, TokenLosses
from flexllm_vllm.models.parallel import TensorParallel

_SUM, _MAX = torch.distributed.ReduceOp.SUM, torch.distributed.ReduceOp.MAX


def linear_cross_entropy_sharded(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    scale: float,
    form: LogitForm,
    first_token: int,
    parallel: TensorParallel,
) -> tuple[TokenLosses, torch.Tensor | None]:
    """:func:`~flexllm_vllm.kernels.cross_entropy.linear_cross_entropy`, each rank with its tokens.

    Per chunk the ranks exchange three numbers a row (largest logit, sum of exponentials, logit of
    the target), and once the gradient: never the logits. As Megatron-LM's vocabulary-parallel
    cross-entropy.

    Args:
        x: ``[num_tokens, hidden_size]``, the same on every rank.
        weight: ``[num_local_tokens, hidden_size]``, this rank's rows of the head, without padding.
        targets: ``[num_tokens]`` int64, of the whole vocabulary.
        scale: factor of the gradient.
        form: of the logits.
        first_token: the token that the first row of ``weight`` stands for.
        parallel: the group.

    Returns:
        As ``linear_cross_entropy``, equal on every rank.
    """
    found = TokenLosses.empty(x.shape[0], x.device)
    dx = torch.empty_like(x) if scale else None
    for start in range(0, x.shape[0], CHUNK):
        rows = slice(start, start + CHUNK)
        logits, slope = form.bend(x[rows] @ weight.t())
        scores = logits.float()
        if form.scale != 1.0:
            scores = scores * form.scale
        local = targets[rows] - first_token
        is_here = (local >= 0) & (local < len(weight))
        local = torch.where(is_here, local, 0)[:, None]
        largest = parallel.all_reduce_small(scores.amax(dim=-1), _MAX)
        picked = torch.where(is_here, scores.gather(1, local).squeeze(1), 0.0)
        exponentials = scores.sub_(largest[:, None]).exp_()
        total, picked = parallel.all_reduce_small(
            torch.stack([exponentials.sum(dim=-1), picked]), _SUM
        )
        found.losses[rows] = total.log().double() + largest - picked
        found.correct[rows] = (picked >= largest).long()
        if dx is None:
            continue
        gradient = exponentials.div_(total[:, None])
        gradient.scatter_add_(1, local, -is_here[:, None].float())
        gradient *= scale * form.scale
        if slope is not None:
            gradient *= slope
        dx[rows] = gradient.to(weight.dtype) @ weight
    return found, None if dx is None else parallel.all_reduce(dx)
