"""Between text and tokens: a tokenizer.json's calls, long texts, pieces of answers, what a row has seen."""
