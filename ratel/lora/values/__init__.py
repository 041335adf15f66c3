"""The numbers of an adapter: how it begins, what it is beside another base, merged, and of which base it is."""
