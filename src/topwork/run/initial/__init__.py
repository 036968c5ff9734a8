"""What `topwork init` is made of: the base, the rows and how they become tokens, and the recipe's lines."""
