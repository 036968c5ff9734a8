"""Rows for objectives that compare answers, judge them or ask for them."""
