from run.fixtures import make_recipe, tickets, tiny_llama, topwork, trained

__all__ = ["make_recipe", "tickets", "tiny_llama", "topwork", "trained"]
