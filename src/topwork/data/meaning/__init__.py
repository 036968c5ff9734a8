"""What rows mean: what a cell is, which column is which field, what of a conversation is learned, and advice."""
