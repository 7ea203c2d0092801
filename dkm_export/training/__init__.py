"""The training stage: a recipe to a palettized model."""
