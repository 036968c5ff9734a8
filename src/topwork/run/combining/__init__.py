"""Where the adapters that are combined come from, and what a combination is scored on."""
