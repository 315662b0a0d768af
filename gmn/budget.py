"""How many images fine-tuning may see: the same for every row of a comparison."""

from __future__ import annotations

import math

from gmn.settings import Fit, Recipe


def images(settings: Fit, available: int) -> int:
    """Images that a training sees, of a set with so many.

    >>> images(Fit(epochs=2, lr=0.1, images_per_epoch=50), available=200)
    100
    """
    if settings.iterations:
        return settings.iterations * min(settings.batch_size, available)
    return settings.epochs * min(settings.images_per_epoch or available, available)


def budget(recipe: Recipe, available: int) -> int:
    """Images that every row sees in fine-tuning."""
    return sum(images(settings, available) for settings in _fits(recipe))


def _fits(recipe: Recipe) -> list[Fit]:
    fits = (recipe.data_models.initial_fit, recipe.finetune.after_meta, recipe.finetune.after_prune)
    return [settings for settings in fits if settings]


def merged(recipe: Recipe, available: int) -> Fit | None:
    """The whole budget as one fine-tuning: the last one's, with more epochs before its first milestone."""
    fits, total = _fits(recipe), budget(recipe, available)
    if not fits:
        return None
    last = fits[-1]
    if last.iterations:
        return last.model_copy(update={"iterations": math.ceil(total * last.iterations / images(last, available))})
    epochs = math.ceil(total / (images(last, available) / last.epochs))  # a baseline never gets less
    shift = epochs - last.epochs
    return last.model_copy(update={"epochs": epochs, "milestones": [m + shift for m in last.milestones]})
