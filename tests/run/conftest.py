from run.fixtures import commands, make_recipe, tickets, tiny_llama, topwork, trained

__all__ = ["commands", "make_recipe", "tickets", "tiny_llama", "topwork", "trained"]
