"""Between text and tokens: the tokenizer, long texts, pieces of answers, hashes of what a row has seen."""
