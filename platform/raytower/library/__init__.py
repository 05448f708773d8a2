"""What `import raytower` offers to other programs: models, indexes and commands as Python objects."""
