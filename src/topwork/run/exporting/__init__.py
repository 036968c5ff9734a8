"""How `topwork export` writes and checks each format."""
