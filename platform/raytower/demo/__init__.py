"""The whole way on a sample of real data, in one command."""
