"""Files in the formats of others, as records: a function for each, and a table of what each is (`table`)."""
