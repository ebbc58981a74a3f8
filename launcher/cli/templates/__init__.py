"""Templates of `launcher new`: a recipe that trains unchanged, and its YAML."""
