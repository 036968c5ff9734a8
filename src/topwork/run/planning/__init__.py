"""What `topwork plan` is made of: where a run would be, what it takes, and how that is told."""
