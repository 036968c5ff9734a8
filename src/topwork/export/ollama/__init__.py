"""Folders that `ollama create` reads: a Modelfile beside GGUF files."""
