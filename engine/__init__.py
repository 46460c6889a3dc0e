"""The engine. Its top level is plain Python; torch lives in worker/ and models/ below it."""
