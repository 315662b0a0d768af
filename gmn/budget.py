"""How many images fine-tuning may see: the same for every row of a comparison."""

from __future__ import annotations

import math

from gmn.settings import Fit, Recipe
from gmn.training import epoch_and_batch


def images(settings: Fit, available: int) -> int:
    """Images that a training sees, of a set with so many: whole batches, an epoch's last few are left out.

    >>> images(Fit(epochs=2, lr=0.1, batch_size=16, images_per_epoch=50), available=200)
    96
    """
    count, size = epoch_and_batch(settings, available)
    return size * (settings.iterations or settings.epochs * (count // size))


def budget(recipe: Recipe, available: int) -> int:
    """Images that every row sees in fine-tuning."""
    return sum(images(settings, available) for settings in _fits(recipe))


def _fits(recipe: Recipe) -> list[Fit]:
    fits = (recipe.data_models.initial_fit, recipe.finetune.after_meta, recipe.finetune.after_prune)
    return [settings for settings in fits if settings]


def merged(recipe: Recipe, available: int) -> Fit | None:
    """The whole budget as one fine-tuning: the last one's, with more epochs before its first milestone.

    Epochs are a little shorter where they would add up to more; never less than the budget, at most a batch each above.
    """
    fits, total = _fits(recipe), budget(recipe, available)
    if not fits:
        return None
    last = fits[-1]
    if last.iterations:
        return last.model_copy(update={"iterations": math.ceil(total * last.iterations / images(last, available))})
    epoch, size = images(last, available) // last.epochs, epoch_and_batch(last, available)[1]
    epochs = math.ceil(total / epoch)
    shift, own = epochs - last.epochs, math.ceil(total / (epochs * size)) * size
    shorter = {"images_per_epoch": own} if own < epoch else {}
    return last.model_copy(update={"epochs": epochs, "milestones": [m + shift for m in last.milestones], **shorter})
