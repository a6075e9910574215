"""One automatic decision a file: `resolve(...)` gives a frozen choice with its reason."""
