"""Direct Preference Optimization."""

import torch

from flexllm_vllm.plan import PreferenceLoss


def preference_loss(
    logps: torch.Tensor, reference: torch.Tensor, preference: PreferenceLoss
) -> tuple[torch.Tensor, torch.Tensor]:
    """``-log sigmoid(beta ((p - r)_preferred - (p - r)_other))``, DPO's sigmoid loss.

    As ``trl.DPOTrainer`` with ``loss_type="sigmoid"`` and no label smoothing.

    Args:
        logps: ``[2 * num_pairs]`` float64, log-probabilities under the policy, in pairs, the
            preferred sequence first.
        reference: like ``logps``, those under the reference.
        preference: beta and the number of pairs.

    Returns:
        The losses ``[num_pairs]``, and ``[2 * num_pairs]`` the derivative of the batch's mean loss
        by each sequence's negative log-probability.
    """
    rewards = preference.beta * (logps - reference)
    margin = rewards[0::2] - rewards[1::2]
    slope = preference.beta / preference.num_pairs * torch.sigmoid(-margin)
    return torch.nn.functional.softplus(-margin), torch.stack([slope, -slope], 1).flatten()
