"""Pre-training LLaMA models with AdamW and APOLLO, side by side."""
