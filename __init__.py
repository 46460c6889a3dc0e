"""Pilotlight serves large language models over gRPC from a PyTorch engine of its own."""
