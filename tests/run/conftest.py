from run.fixtures import commands, make_recipe, tickets, tiny_llama

__all__ = ["commands", "make_recipe", "tickets", "tiny_llama"]
