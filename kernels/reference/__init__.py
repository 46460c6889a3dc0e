"""The reference implementations: each function here *is* the operation it names."""
