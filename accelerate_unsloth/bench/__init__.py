"""The same fine-tune in separate launches: plain Unsloth, ours, and each of our choices taken back one by one."""
