"""Adapters and models of others' making, turned into what is read here (`run/convert.py`)."""
