"""What source + LoRA is asked: prompt formats, the prompts that tell most, and the answers that it writes."""
