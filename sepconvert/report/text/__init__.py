"""The report in text: numbers, sentences and tables, made from the JSON document."""
