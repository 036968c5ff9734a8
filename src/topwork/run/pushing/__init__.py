"""What `topwork push` sends, and how."""
