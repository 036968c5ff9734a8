"""Checks of a recipe's data as the model will see them, before any weight is read. `rules` is the table of them."""
