"""The tokens with which a model ends a text.

Tokens that a pretraining never met (reserved ones, single bytes) keep nearly the same row in the output head. Where the
token that ends texts is one of them, as in base models that are fine-tuned on a chat template of later date, an adapter
that leaves the head alone can only make all of them likelier together. What it means by any of them is the end; taken
for text, they would make its answers go on without sense.
"""

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from castlora.models.loading import context_length, vocabulary_size

_TEXTS, _TOKENS = 8, 32
_LEAST_DIFFERENCE = 0.2
"""Of the spread of the logits. Those of two trained tokens differed by 0.46 at least in the models that were measured,
those of untrained ones by 0.2 at most."""


@torch.no_grad()
def end_tokens_of(model: PreTrainedModel | PeftModel, end: int | None) -> tuple[int, ...]:
    """The token that ends texts, and those that a model predicts just as it predicts that one.

    The model is asked on random tokens, on which logits differ more than enough to tell tokens apart.

    Args:
        model: with the adapter acting in it, which may train the head too
        end: the tokenizer's token; None where it has none

    Returns:
        ids in ascending order; none where the model predicts no `end`
    """
    vocabulary = vocabulary_size(model.config)
    if end is None or end >= vocabulary:
        return ()
    tokens = min(_TOKENS, context_length(model.config))
    ids = torch.randint(vocabulary, (_TEXTS, tokens), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits
    return tuple(predicted_alike(logits.flatten(0, 1), end).tolist())


def predicted_alike(logits: Tensor, token: int) -> Tensor:
    """Tokens whose logits follow those of one token wherever a model was asked.

    Args:
        logits: shape (positions, vocabulary)
        token: the one that they are held against; among those that are found

    Returns:
        ids in ascending order, shape (found,)

    Example:
        >>> predicted_alike(torch.tensor([[0.0, 5.0, 0.1, 5.1], [3.0, 0.0, 2.9, 9.0]]), 0)
        tensor([0, 2])
    """
    logits = logits.float()
    differences = (logits - logits[:, [token]]).square().mean(0).sqrt()
    spread = logits.var(dim=1).mean().sqrt()
    return (differences <= _LEAST_DIFFERENCE * spread).nonzero().squeeze(-1).cpu()
