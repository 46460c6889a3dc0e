"""Text <-> token ids, in the front only: the engine never sees a character."""
