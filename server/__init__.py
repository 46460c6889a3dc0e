"""The front: gRPC, health, metrics, lifecycle, text <-> ids. Never imports torch."""
