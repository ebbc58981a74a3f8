"""What `launcher tune` reports: the JSON document, text, HTML page and tables."""
