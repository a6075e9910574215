"""What the ranks train on: who gets which samples, and how they are tokenised once a node."""
