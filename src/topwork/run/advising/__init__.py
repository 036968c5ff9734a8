"""What `topwork advise` looks at before it gives advice."""
