"""How `topwork merge` plans and checks what it writes."""
