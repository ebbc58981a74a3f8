"""What `launcher new` writes: a recipe that trains as it is, and its YAML."""
