"""The wire contract: *.proto and the stubs generated from it."""
