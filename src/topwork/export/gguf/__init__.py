"""GGUF, the file that llama.cpp reads: a model with its tokenizer and chat template in one."""
