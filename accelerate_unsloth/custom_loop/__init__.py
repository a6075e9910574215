"""A trainer for loops of one's own: its epochs, its steps, its evaluation, and what it saves."""
