"""Where a checkpoint can come from; every place answers as `source.Source`."""
