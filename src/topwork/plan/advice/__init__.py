"""What to do with a task, rows and a machine: one table of rules, each with its reason and source. Free of torch."""
