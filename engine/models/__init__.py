"""Model families: typed configuration, checkpoint loading, layers. Knows no requests."""
