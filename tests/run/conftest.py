from run.fixtures import commands, make_recipe, tickets, tiny_llama, topwork

__all__ = ["commands", "make_recipe", "tickets", "tiny_llama", "topwork"]
