"""A differential fuzzer: random models through the library and through a slow reference."""
