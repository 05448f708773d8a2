"""`raytower up`: from texts to a served search page in one command."""
